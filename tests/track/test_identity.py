"""One run of W&B for one run, whoever uploads it from wherever; W&B's own variables beside the job file's fields."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from command_line import typed
from mirrored import EXPERIMENT, sync, train
from wandb_server import Server

from hpc_cifar import runs
from hpc_cifar.config.experiment import Experiment
from hpc_cifar.errors import TrackingError
from hpc_cifar.runs import Run
from hpc_cifar.track import companion, identity

SAID = {
    "WANDB_ENTITY": "team",
    "WANDB_PROJECT": "theirs",
    "WANDB_RUN_GROUP": "g",
    "WANDB_NAME": "a name",
    "WANDB_JOB_TYPE": "sweep",
    "WANDB_TAGS": "a, b",
    "WANDB_NOTES": "why it was made",
    "WANDB_RUN_ID": "chosen",
}
OWN = {"entity": "own", "project": "mine", "group": "h", "name": "my name", "tags": ["c"], "notes": "my notes"}


def made(folder: Path, run_id: str = "kept", **tracking: Any) -> Run:
    values = EXPERIMENT | {"name": run_id, "tracking": {"wandb": "online", **tracking}}
    return runs.create(folder, run_id, Experiment.model_validate(values), {"batch_size": 64}, {})


def shell(monkeypatch: pytest.MonkeyPatch, **said: str) -> None:
    """One in which W&B's variables are these, and no others."""
    for name in (*SAID, "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)


def told(run: Run) -> list[str]:
    said: list[str] = []
    identity.note(run, "", said.append)
    return said


@pytest.mark.slow
@pytest.mark.component("wandb")
def test_a_run_stays_where_its_first_upload_was(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made(tmp_path)
    train(run, 0, 10)
    shell(monkeypatch, **SAID, WANDB_DIR=str(tmp_path))
    assert f"W&B: {server.url}/team/theirs/runs/chosen" in sync(run, server)
    assert list((tmp_path / "wandb").glob("run-*-chosen")) and not (run.path / "wandb").exists()
    train(run, 10, 30, ended="finished")
    shell(monkeypatch, WANDB_ENTITY="another", WANDB_NOTES="others", WANDB_API_KEY=server.environment["WANDB_API_KEY"])
    arguments = dict(os.environ), tmp_path
    done = typed(["sync", str(run.path)], *arguments, timeout_s=400)  # and W&B's server is not named
    assert done.returncode == 0, done.stderr
    assert f"{server.url}/team/theirs/runs/chosen" in done.stderr and "not followed: WANDB_ENTITY=another" in done.stderr
    [kept] = server.runs.values()
    assert (kept.entity, kept.project, kept.id, kept.group) == ("team", "theirs", "chosen", "g") and not server.elsewhere
    assert (kept.name, kept.job_type, kept.tags, kept.notes) == ("a name", "sweep", ["a", "b"], "why it was made")
    assert [row["global_step"] for row in kept.history if "step/train_loss" in row] == list(range(1, 31))
    done = typed(["report", str(run.path), "--wandb"], *arguments, timeout_s=400)
    assert done.returncode == 0, done.stdout + done.stderr
    [report] = server.reports
    assert (report["entityName"], report["projectName"]) == ("team", "theirs")


def test_the_variables_of_the_training_count_for_whoever_uploads_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made(tmp_path, wandb="offline")
    shell(monkeypatch, **SAID, WANDB_BASE_URL="https://me:secret@wandb.here/")
    companion.Companions(run, run.experiment().tracking, lambda _: None)
    assert "secret" not in (run.path / identity.FILE).read_text()
    shell(monkeypatch)
    found = identity.decide(run, "")
    assert found.entity == "team" and found.project == "theirs" and found.group == "g" and found.id == "chosen"
    assert found.tags == ("a", "b") and found.notes == "why it was made" and found.job_type == "sweep"
    assert identity.address(found, "") == "https://wandb.here"
    assert identity.address(found, "https://me:secret@wandb.here") == "https://me:secret@wandb.here"


def test_the_order_of_what_says_where_a_run_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shell(monkeypatch, **SAID)
    of_file = identity.decide(made(tmp_path, "file", **OWN), "")
    assert {name: getattr(of_file, name) for name in OWN} == OWN | {"tags": ("c",)}, "the job file, before the variables"
    run = made(tmp_path, "later")
    identity.decide(run, "https://wrong.example")
    shell(monkeypatch, WANDB_ENTITY="right")
    found = identity.decide(run, "https://right.example")
    assert (found.entity, found.base_url, found.project) == ("right", "https://right.example", "theirs"), "not answered yet"
    identity.opened(run, found, "right", "theirs", "https://right.example/theirs")
    shell(monkeypatch, WANDB_ENTITY="too late", WANDB_PROJECT="too late")
    assert identity.decide(run, "https://too-late.example") == identity.kept(run)
    assert (identity.kept(run).entity, identity.kept(run).base_url) == ("right", "https://right.example")
    words = identity.left_aside(run, identity.kept(run), "https://too-late.example")
    assert words.endswith("not followed: WANDB_ENTITY=too late, WANDB_PROJECT=too late, server https://too-late.example")
    shell(monkeypatch)
    plain = identity.decide(made(tmp_path, "plain"), "")
    assert (plain.project, plain.name, plain.job_type, plain.entity) == ("hpc-cifar", "plain", "train", "")


def test_two_runs_never_have_one_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shell(monkeypatch, WANDB_RUN_ID="chosen")
    first, second = made(tmp_path, "first"), made(tmp_path, "second")
    assert told(first) == [] and identity.kept(first).id == "chosen"
    assert told(second) == ["note: WANDB_RUN_ID=chosen is another run's already; second has an id of its own"]
    assert identity.kept(second).id not in ("", "chosen")
    shell(monkeypatch, WANDB_RUN_ID="../escape")
    third = made(tmp_path, "third")
    assert "is no id of a run" in told(third)[0] and not (tmp_path / "escape").exists()
    assert told(third) == [], "it has one now"


def test_a_run_of_an_earlier_version_keeps_its_id(tmp_path: Path) -> None:
    run = made(tmp_path, entity="own")
    assert not identity.is_there(run)
    (run.path / identity.OLD_ID).write_text("0123456789ab")
    assert identity.is_there(run) and identity.kept(run).entity == "own"
    assert identity.decide(run, "").id == "0123456789ab"


@pytest.mark.parametrize("text", ["[]", '{"id": 5}', "{", '{"tags": "one"}'])
def test_a_damaged_record_is_one_line_and_no_second_copy(tmp_path: Path, text: str) -> None:
    run = made(tmp_path)
    (run.path / identity.FILE).write_text(text)
    with pytest.raises(TrackingError, match=f"^W&B: {identity.FILE}: .*uploaded as a new one$"):
        identity.decide(run, "")
    assert len(told(run)) == 1, "a training goes on"
    assert (run.path / identity.FILE).read_text() == text


def test_a_run_that_is_begun_again_is_another_one() -> None:
    assert identity.FILE in runs.OUTCOME and identity.OLD_ID in runs.OUTCOME
