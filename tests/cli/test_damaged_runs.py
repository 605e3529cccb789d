"""What a run directory holds may be damaged, of another version, or hostile: one bad run is one line, and no other run's."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
from reported import left_behind

from hpc_cifar import files, records
from hpc_cifar.cli.main import main
from hpc_cifar.runs import Run

RECORDS = (
    *("state.json", "result.json", "plan.json", "jobs.jsonl", "metrics.jsonl", "submitting.json", "cluster.json", "waits.json"),
    *("saved.json", "left-out.json", "failures.jsonl", "interruptions.jsonl", "provenance.json", "sweep.json", ".holder.json"),
    *("evaluation/test/evaluation.json", "wandb-pictures.json", "submitit/local-1_process.json", "experiment.yaml"),
    *("cancelled", ".state.lock", ".lock", ".submit.lock", "submitit/local-1_0_log.out"),
)
TEXTS = {
    "nothing": "",
    "a list": "[1, 2]",
    "null": "null",
    "text": '"x"',
    "deep": "[" * 100_000,
    "deep and whole": "[" * 500 + "]" * 500,
    "deep objects": '{"state":' * 5000,
    "NaN": '{"state": "running", "step": NaN, "seconds": Infinity, "job_id": NaN}',
    "too large": '{"state": "running", "step": 1e999, "gpu_hours": 1e308, "epoch": 1e400}',
    "digits": '{"step": ' + "9" * 5000 + "}",
    "whole but vast": '{"state": "running", "step": 1'
    + "0" * 400
    + ', "kind": "epoch", "epoch": 1, "images_per_second": 5e-324}',
    "objects": json.dumps(
        {
            name: {"x": [1]}
            for kind in (records.RunState, records.Result, records.Job, records.MetricRow, records.Submission)
            for name in kind.__dataclass_fields__
        }
    ),
    "texts": json.dumps(
        {
            name: "x\x1b[31m\ud800"
            for kind in (records.RunState, records.Result, records.Job, records.MetricRow, records.Submission)
            for name in kind.__dataclass_fields__
        }
    ),
    "not UTF-8": "\udcff\udcfe",
    "merge and tags": "a: &a [x]\n<<: *a\nb: !!python/object/apply:os.system ['true']\n",
    "laughs": "a: &a [x, x]\n"
    + "".join(
        f"{new}: &{new} [*{old}, *{old}]\n"
        for old, new in zip("abcdefghijklmnopqrstuvwx", "bcdefghijklmnopqrstuvwxy", strict=True)
    ),
    "deep YAML": "- " * 50_000,
}


def _link(path: Path) -> None:
    path.symlink_to("/etc/passwd")


def _socket(path: Path) -> None:
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as made:  # such a name is short
        made.bind(path.name)


def _vast(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(2**34)


KINDS: dict[str, Callable[[Path], None]] = {
    "FIFO": os.mkfifo,
    "folder": Path.mkdir,
    "link": _link,
    "link to itself": lambda path: path.symlink_to(path.name),
    "socket": _socket,
    "16 GiB": _vast,
    **{
        name: lambda path, text=text: path.write_bytes(text.encode("utf-8", "surrogateescape")) and None
        for name, text in TEXTS.items()
        if name != "nothing"
    },  # type: ignore[misc]
    "nothing": Path.touch,
}
COMMANDS = (
    *(["status"], ["status", "--json"], ["list"], ["list", "--campaign", "c"], ["status", "BAD"], ["wait", "BAD"]),
    *(["logs", "BAD"], ["report", "BAD", "GOOD", "--format", "csv"], ["report", "BAD", "-o", "OUT"], ["cancel", "BAD", "GOOD"]),
    *(["sync", "BAD"], ["evaluate", "BAD"], ["export", "BAD"], ["resume", "BAD"]),
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pair")
    for name in ("bad", "good"):
        run = left_behind(root, tracking={"group": "c", "wandb": "disabled"})
        (run.path / "submitit").mkdir()
        (run.path / "submitit" / "local-1_0_log.out").write_text("hello\n")
        files.write_json(run.path / "submitit" / "local-1_process.json", {"pid": 1, "pid_started": 1, "boot": "x", "host": "y"})
        run.add_job(executor="local", job_id="local-1", host=socket.gethostname())
        run.path.rename(root / name)
    return root


@pytest.fixture
def bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A command that waits for ever fails the test."""

    def late(number: int, frame: FrameType | None) -> None:
        raise AssertionError("the command hangs")

    def refuse(**_: object) -> None:
        raise RuntimeError("no server here")

    monkeypatch.setenv("HPC_CIFAR_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setattr("wandb.init", refuse)
    monkeypatch.chdir(tmp_path)
    old = signal.signal(signal.SIGALRM, late)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


def typed(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main([{"BAD": "bad", "GOOD": "good", "OUT": "out.html"}.get(word, word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def judged(root: Path, name: str, kind: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Put one thing in place of one file, and type one command."""
    path = root / "bad" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    KINDS[kind](path)
    signal.alarm(60)
    code, out, err = typed(words, capsys)
    told = f"{name} as {kind}: {' '.join(words)}: {code}\n{out}{err}"
    assert code in (0, 1, 2) and "unexpected" not in err and "Traceback" not in err, told
    assert len([line for line in err.splitlines() if "bad" in line]) <= 2, told
    if words in (["status"], ["list"]):
        assert code == 0 and sorted(line.split("\t")[0] for line in out.splitlines()) == ["bad", "good", "run"], told
        assert "good\tfinished" in out and "\x1b" not in out, told
    if words == ["status", "--json"]:
        assert "NaN" not in out and "Infinity" not in out and {row["run"] for row in json.loads(out)} == {"bad", "good"}, told
    if "csv" in words and code == 0:
        assert [line for line in out.splitlines() if line.startswith("good,")], told


@pytest.mark.parametrize("name", RECORDS)
def test_no_command_ends_by_a_damaged_file(
    pair: Path, tmp_path: Path, name: str, bounded: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each kind of damage once, with commands in turn; the fuzzers try more."""
    turn = RECORDS.index(name)
    for number, kind in enumerate(KINDS):
        words = COMMANDS[(turn + number) % len(COMMANDS)]
        root = tmp_path / str(number)
        shutil.copytree(pair, root, symlinks=True)
        monkeypatch.setenv("HPC_CIFAR_RUNS", str(root))
        judged(root, name, kind, words, capsys)


@pytest.mark.parametrize("name", ["state.json", "result.json", "plan.json", "jobs.jsonl", "experiment.yaml"])
def test_a_damaged_record_is_the_reason(
    pair: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], bounded: None
) -> None:
    shutil.copytree(pair, tmp_path / "runs", symlinks=True)
    monkeypatch.setenv("HPC_CIFAR_RUNS", str(tmp_path / "runs"))
    (tmp_path / "runs" / "bad" / name).unlink()
    os.mkfifo(tmp_path / "runs" / "bad" / name)
    code, out, _ = typed(["status"], capsys)
    assert code == 0
    assert f"damaged: {name}: is not a regular file" in out


def test_a_run_that_is_removed_while_it_is_listed_is_left_out(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "runs"
    monkeypatch.setenv("HPC_CIFAR_RUNS", str(root))
    for words in (["status"], ["list"], ["status", "--json"]):
        shutil.copytree(pair, root, symlinks=True)
        asked = Run.result

        def removed(self: Run, asked: Callable[[Run], records.Result | None] = asked) -> records.Result | None:
            shutil.rmtree(root / "bad", ignore_errors=True)
            return asked(self)

        with monkeypatch.context() as patch:
            patch.setattr(Run, "result", removed)
            code, out, err = typed(words, capsys)
        assert code == 0 and "good" in out and "bad" not in out, out + err
        shutil.rmtree(root)


def test_what_an_older_or_newer_version_wrote_is_read(pair: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.path.mkdir()
    files.write_json(run.state_file, {"state": "running", "step": 5, "restarts": -1, "new": {"x": [1]}, "val_accuracy": None})
    run.add_job(executor="slurm", job_id=4711, later=[{}])
    assert (run.state().state, run.state().step, run.state().lost_steps, run.state().problem) == ("running", 5, 0, "")
    assert [(job.job_id, job.follows, job.problem) for job in run.jobs()] == [("4711", None, "")]
    run.update_state(state="failed")
    assert files.read_object(run.state_file)["new"] == {"x": [1]}
    run.add_job(executor="slurm", job_id="--user=somebody")
    assert run.last_job().problem == "jobs.jsonl: job_id should be the number of a job, not '--user=somebody'"
