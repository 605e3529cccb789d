"""The preemption matrix: grace time and user signal or none; one task, two nodes, array elements. Cancels stay cancels."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from slurm_site import Site, SlurmCluster, assert_same, call_testbed, why_not

from hpc_cifar import files

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400), pytest.mark.component("slurm")]

EPOCHS = 24
SHORT = ("--set", f"epochs={EPOCHS}")
CELLS = list(itertools.product(("low0", "low6"), (("single", 1), ("single", 2), ("element", 1))))


@pytest.fixture(scope="module", params=[True, False], ids=["user_signal", "no_user_signal"])
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """A cluster that sends the user signal at preemption, and one that does not."""
    if reason := why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    made = SlurmCluster(folder / "c", folder)
    try:
        call_testbed("up", "--dir", str(made.folder), *(["--preempt-send-user-signal"] if request.param else []))
        yield made
    finally:
        call_testbed("down", "--dir", str(made.folder))


@pytest.fixture(scope="module")
def undisturbed(
    cluster: SlurmCluster, digits_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, dict[str, Any]]:
    """Results of runs that nothing happened to, by number of nodes."""
    site = Site(cluster, tmp_path_factory.mktemp("undisturbed"), digits_data)
    submitted = {nodes: site.submit("--partition", "high", "--nodes", str(nodes), *SHORT)[0] for nodes in (1, 2)}
    for run in submitted.values():
        site.call("wait", run)
    return {nodes: site.result(run) for nodes, run in submitted.items()}


def step_rows(site: Site, run: str) -> list[int]:
    rows = files.read_json_lines(site.runs / run / "metrics.jsonl")
    return [row["step"] for row in rows if row["kind"] == "step"]


def segments(site: Site, run: str) -> list[tuple[int, int | None]]:
    """(first step, last step or None if it was killed) of each stretch of a run, from its events and its log."""
    (log,) = (site.runs / run / "submitit").glob("*_0_log.out")  # one log over all stretches
    starts = [0, *(int(text) for text in re.findall(r"resuming at step (\d+) of", log.read_text()))]
    events = files.read_json_lines(site.runs / run / "metrics.jsonl")
    stops = [row["step"] for row in events if row.get("event") in ("requeued", "stopped", "finished")]
    return [(start, next((stop for stop in stops if stop >= start), None)) for start in starts]


def test_every_cell_resumes_and_ends_like_the_undisturbed(
    cluster: SlurmCluster, undisturbed: dict[int, dict[str, Any]], tmp_path: Path, digits_data: Path
) -> None:
    site = Site(cluster, tmp_path, digits_data)
    # enough checkpoints that a cell without a grace time has one to resume from
    blocker = cluster.batch("--partition=high", "--nodes=3", "--exclusive", script="sleep 300")
    cluster.wait(blocker, {"RUNNING"})  # so that all cells start together
    cells: dict[tuple[str, str], tuple[str, str, int]] = {}
    for partition, (kind, nodes) in CELLS:
        options = ("--partition", partition, "--nodes", str(nodes), *SHORT, *(("--seeds", "2") if kind == "element" else ()))
        for made in site.submit_many(*options):
            cells[made] = (partition, kind, nodes)
    cluster.call("scancel", blocker)
    for run, _ in cells:
        site.until_epoch(run, 3)
    high = cluster.batch("--partition=high", "--nodes=3", "--exclusive", script="sleep 1")
    seen: dict[str, list[str]] = {run: [] for run, _ in cells}
    deadline = time.monotonic() + 240
    while any(states[-1:] != ["finished"] for states in seen.values()):
        assert time.monotonic() < deadline, f"{seen}\n{site.logs()}"
        for row in json.loads(site.call("status", "--json")):  # one question for all of them
            if seen[row["run"]][-1:] != [row["state"]]:
                seen[row["run"]].append(row["state"])
        time.sleep(0.3)
    assert cluster.wait(high) == "COMPLETED"
    for (run, job), (partition, kind, nodes) in cells.items():
        cell = f"{partition}, {kind}, {nodes} node(s): {seen[run]}"
        assert {"failed", "cancelled", "stopped"}.isdisjoint(seen[run]), cell
        assert seen[run].index("finished") == len(seen[run]) - 1, cell  # never reported done before it was
        assert site.status(run)["job_id"] == job and cluster.job(job)["Restarts"] == "1", cell
        assert cluster.wait(job) == "COMPLETED", cell  # Slurm says so a moment after the run does
        rows = step_rows(site, run)
        assert rows == sorted(set(rows)), f"{cell}: a step was logged twice"
        assert site.epochs(run) == list(range(1, EPOCHS + 1)), cell
        if not job.endswith("_1"):  # the second element has another seed
            assert_same(site.result(run), undisturbed[nodes])
        assert site.result(run)["restarts"] == 1, cell
        (_, stopped), (resumed, _) = segments(site, run)
        if partition == "low6":
            assert stopped == resumed, f"{cell}: steps were lost though there was a grace time"
        assert resumed > 0, f"{cell}: trained from zero again"


def test_a_preemption_while_the_job_starts(cluster: SlurmCluster, tmp_path: Path, digits_data: Path) -> None:
    """The signals come before Python can listen to them; enough is left to train that it cannot end in the grace time."""
    site = Site(cluster, tmp_path, digits_data)
    run, job = site.submit("--partition", "low6", "--nodes", "1", "--set", "epochs=60")
    cluster.wait(job, {"RUNNING"})
    high = cluster.batch("--partition=high", "--nodes=3", "--exclusive", script="sleep 1")
    assert cluster.wait(high) == "COMPLETED"
    site.call("wait", run)
    assert cluster.job(job)["Restarts"] == "1"
    assert site.epochs(run) == list(range(1, 61))


def test_a_raw_scancel_never_resurrects(cluster: SlurmCluster, tmp_path: Path, digits_data: Path) -> None:
    """It sends the TERM that a preemption sends too, and leaves no marker in the run directory."""
    site = Site(cluster, tmp_path, digits_data)
    run, job = site.submit("--partition", "low6", "--nodes", "2", "--set", "epochs=3000")
    site.until_epoch(run, 1)
    cluster.call("scancel", job)
    cluster.until(lambda: not cluster.call("squeue", "--noheader"), 60, "the job leaves the queue")
    released = time.monotonic() + 7  # a requeued job is held for 5 s
    while time.monotonic() < released:
        assert cluster.call("squeue", "--noheader") == ""
        time.sleep(0.5)
    assert cluster.job(job)["JobState"] == "CANCELLED" and cluster.job(job)["Restarts"] == "0"
    assert site.status(run)["state"] == "cancelled"


def test_cancel_during_the_grace_time_of_a_preemption(cluster: SlurmCluster, tmp_path: Path, digits_data: Path) -> None:
    site = Site(cluster, tmp_path, digits_data)
    run, job = site.submit("--partition", "low6", "--nodes", "1", "--set", "epochs=3000")
    site.until_epoch(run, 1)
    high = cluster.batch("--partition=high", "--nodes=3", "--exclusive", script="sleep 1")
    cluster.until(lambda: site.state(run).get("state") == "requeued" or cluster.state(job) != "RUNNING", 30, "the preemption")
    site.call("cancel", run)
    assert cluster.wait(high) == "COMPLETED"
    cluster.until(lambda: not cluster.call("squeue", "--noheader"), 60, "an empty queue")
    assert cluster.job(job)["JobState"] == "CANCELLED"
    assert site.status(run)["state"] == "cancelled"
