"""Checkpoints that were there and are gone: a run is not begun anew without a word, and one without any yet is."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import ranks

from hpc_cifar import files, runs
from hpc_cifar.errors import CheckpointError, first_line
from hpc_cifar.launch.job import one_line
from hpc_cifar.runs import Run
from hpc_cifar.train import checkpoint, saved, trained

AT = 1_700_000_000.0
STARTED = {"kind": "event", "event": "started", "step": 0, "time": AT}
STOPPED = {"kind": "event", "event": "stopped", "step": 70, "time": AT}
RESUMED = {**STARTED, "step": 70}
ROW = {"kind": "step", "step": 70, "time": AT}


@pytest.mark.parametrize(
    ("rows", "step"),
    [
        ([], 0),
        ([STARTED, ROW], 0),  # killed: nobody knows whether there was a checkpoint
        ([STARTED, ROW, STOPPED], 70),
        ([STARTED, ROW, STOPPED, RESUMED], 70),
        ([STARTED, ROW, STOPPED, STARTED, ROW], 0),  # an older version had begun anew
        ([STARTED, ROW, {**STOPPED, "event": "failed"}], 0),
        ([RESUMED, {**ROW, "step": 90}, {**STOPPED, "event": "requeued", "step": 90}], 90),
        ([STARTED, {"kind": "event", "event": "stopped"}], 0),
    ],
)
def test_what_an_older_version_left_says_whether_there_was_a_checkpoint(
    tmp_path: Path, rows: list[dict[str, Any]], step: int
) -> None:
    run = Run(tmp_path)
    run.checkpoints.mkdir()
    run.update_state(state="running", step=70)
    for row in rows:
        files.append_json_line(run.metrics_file, row)
    assert saved.newest(run)[0] == step
    problem = saved.missing(run)
    assert (problem is not None) is bool(step)
    if problem is not None:
        assert f"that of step {step} was written at 2023-11-14T22:13:20+00:00" in str(problem) and "--fresh" in str(problem)
        assert len(str(problem).splitlines()) == 1
    saved.note(run, 0)
    assert saved.missing(run) is None, "what is noted counts"


def test_results_tell_where_the_metrics_are_gone_too(tmp_path: Path) -> None:
    run = Run(tmp_path)
    files.write_json(run.result_file, {"state": "stopped", "steps": 70, "ended": "2026-11-01T00:00:00+00:00"})
    assert "step 70 was written at 2026-11-01" in str(saved.missing(run))
    files.write_json(run.path / "left-out.json", {"steps": [1], "times": 1})  # which may have set all of them aside
    assert saved.missing(run) is None


def test_the_reason_of_damaged_checkpoints_is_a_whole_sentence(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, {"step": step}, step=step, epoch=0)
        (tmp_path / f"step-{step:08d}" / "state.pt").unlink()
    with pytest.raises(CheckpointError) as caught:
        checkpoint.newest_good(tmp_path)
    reason = one_line(caught.value)
    assert "step-00000002/state.pt: is missing" in reason and reason.endswith("--fresh (of train, or of resume)")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("all is lost:\n  one\n  two", "all is lost: one"),
        ("Error(s) in loading state_dict:\n\tMissing key: w\n\tmore", "Error(s) in loading state_dict: Missing key: w"),
        ("\n first \nsecond", "first"),
        ("only:", "only:"),
        ("", "ValueError"),
    ],
)  # fmt: skip
def test_a_line_that_announces_the_next_ones_has_one_of_them(text: str, line: str) -> None:
    error = ValueError(text)
    assert first_line(error) == line
    assert one_line(error) == (f"ValueError: {line}" if text else line)


def test_a_best_checkpoint_whose_files_are_gone_is_not_the_best(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, {"step": step}, step=step, epoch=0, best_step=1)
    for path in (tmp_path / "step-00000001").iterdir():  # a clean-up leaves the folders
        path.unlink()
    (tmp_path / "latest").unlink()
    chosen, _ = checkpoint.newest_good(tmp_path)
    assert chosen is not None and not checkpoint.settle(tmp_path, chosen)
    assert not (tmp_path / "best").is_symlink() and (tmp_path / "latest").readlink() == Path("step-00000002")


def purge(run: Run) -> None:
    for path in run.checkpoints.iterdir():
        path.unlink() if path.is_symlink() else shutil.rmtree(path)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_a_run_whose_checkpoints_are_gone_is_refused_and_begins_again_on_demand(
    tmp_path: Path, digits_data: Path, world: int
) -> None:
    run, calm = (ranks.new_run(tmp_path, ranks.experiment()) for _ in range(2))
    ranks.complete(run, digits_data, world, max_steps=20)
    assert (files.read_json(run.path / "saved.json") or {})["step"] == 20
    kept = run.metrics_file.read_text()
    purge(run)
    for by_events in (False, True):
        if by_events:
            (run.path / "saved.json").unlink()
        assert ranks.finish(ranks.start(run, digits_data, world)) == [1] * world, ranks.logs(run)
        assert run.state().state == "failed" and "that of step 20 was written at 20" in run.state().reason
        assert run.metrics_file.read_text() == kept and run.state().step == 20
    with pytest.raises(CheckpointError, match="no checkpoint is there, though that of step 20"):
        trained.load(run, digits_data)
    aside = run.path / runs.begin_again(run)
    assert (aside / "metrics.jsonl").read_text() == kept and (aside / "result.json").exists()
    result, expected = ranks.complete(run, digits_data, world), ranks.complete(calm, digits_data, world)
    assert {name: result[name] for name in ("state", "test_loss", "restarts")} == {
        name: expected[name] for name in ("state", "test_loss", "restarts")
    }
    first, *_ = files.read_json_lines(run.metrics_file)
    assert (first["event"], first["step"], first["aside"]) == ("begun again", 0, aside.name)
    assert sorted(ranks.losses(run)) == list(range(1, result["steps"] + 1))


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_begins_at_once(tmp_path: Path, digits_data: Path) -> None:
    run = ranks.new_run(tmp_path, ranks.experiment(epochs=30, checkpoint={"every_epochs": 30}, data={"validation": "test"}))
    processes = ranks.start(run, digits_data, 1)
    ranks.wait_for_step(run, 30, processes)
    time.sleep(0.6)  # state.json is written twice a second
    ranks.kill_all(processes)
    assert run.state().step > 0 and not checkpoint.stored(run.checkpoints)
    assert saved.missing(run) is None
    ranks.complete(run, digits_data, 1, max_steps=3)
    assert "resuming" not in ranks.logs(run)


@pytest.mark.slow
def test_what_is_left_of_the_checkpoints_is_used_and_the_rest_said(tmp_path: Path, digits_data: Path) -> None:
    """The newest one is gone, and the files of the best one, which is to be tested."""
    run = ranks.new_run(tmp_path, ranks.experiment(epochs=3, checkpoint={"every_steps": 5, "select": "best", "keep_last": 9}))
    ranks.complete(run, digits_data, 1, max_steps=20)
    shutil.rmtree(run.checkpoints / "step-00000020")
    best = (run.checkpoints / "best").resolve()
    assert best.name == "step-00000013", "the end of the first epoch"
    for path in best.iterdir():
        path.unlink()
    assert ranks.complete(run, digits_data, 1)["state"] == "finished"
    said = ranks.logs(run)
    assert "the checkpoint of step 20, written at " in said and "is gone; going on from an older one" in said
    assert "the best checkpoint so far, of step 13, is gone" in said and "resuming at step 15 " in said
