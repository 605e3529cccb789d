"""The preemption matrix: grace time and user signal or none; one task, two nodes, array elements. Cancels stay cancels."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from slurm_site import CHAIN, EPOCHS, PROFILE, STEP_S, Site, SlurmCluster, assert_same, running_cluster

from hpc_cifar import files

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400), pytest.mark.component("slurm")]

KINDS = {
    "two nodes": ("--nodes", "2"),
    "two tasks": ("--nodes", "1", "--set", "resources.processes_per_node=2"),
    "elements": ("--nodes", "1", "--seeds", "2"),
}
EARLY = ("beginning", "prolog", "shell")  # preempted before they trained
# What a job does that knows nothing of this project: the first time it goes back to the queue when it is told to end.
PLAIN = """\
[ ${SLURM_RESTART_COUNT:-0} = 0 ] || exit 0
trap 'scontrol requeue $SLURM_JOB_ID' USR2 TERM
sleep 600 & wait
sleep 600
"""


@pytest.fixture(scope="module", params=[True, False], ids=["user_signal", "no_user_signal"])
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """A cluster that sends the user signal at preemption, and one that does not."""
    with running_cluster(tmp_path_factory.mktemp("slurm"), *["--preempt-send-user-signal"] * request.param) as made:
        yield made


SLOW_PROLOG = """\
trap "" USR2 TERM
[ -e {folder}/begun ] && exit 0
touch {folder}/begun
for _ in $(seq 600); do [ -e {folder}/go ] && exit 0; sleep 0.1; done
"""
SLOW_SHELL = """\
[ -e {folder}/begun ] && exec /bin/sh "$@"
touch {folder}/begun
sleep 60
"""


def slow_start(site: Site, name: str, text: str) -> Path:
    """A program that is slow the first time."""
    folder = site.folder / f"slow-{name}"
    folder.mkdir()
    program = folder / name
    program.write_text("#!/bin/bash\n" + text.format(folder=folder))
    program.chmod(0o755)
    return program


def segments(site: Site, run: str) -> list[tuple[int, int | None]]:
    """(first step, last step or None if it was killed) of each stretch of a run, from its events and its log."""
    (log,) = (site.runs / run / "submitit").glob("*_0_log.out")  # one log over all stretches
    starts = [0, *(int(text) for text in re.findall(r"resuming at step (\d+) of", log.read_text()))]
    stops = [row["step"] for row in site.rows(run, "event") if row["event"] in ("requeued", "stopped", "finished")]
    return [(start, next((stop for stop in stops if stop >= start), None)) for start in starts]


def watch(site: Site, high: str, runs: Iterable[str]) -> dict[str, list[str]]:
    """Until all have finished; the states that ``status`` showed of each, in order. They hasten when ``high`` is through."""
    seen: dict[str, list[str]] = {run: [] for run in runs}
    hastened = False
    with site.start("status", "--watch", "--every", "0.5", "--json") as watching:
        assert watching.stdout is not None
        for line in watching.stdout:
            for row in json.loads(line):
                if seen[row["run"]][-1:] != [row["state"]]:
                    seen[row["run"]].append(row["state"])
            if not hastened and site.cluster.state(high) == "COMPLETED":
                site.hasten()
                hastened = True
    assert {states[-1] for states in seen.values()} == {"finished"}, f"{seen}\n{site.logs()}"
    return seen


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Runs of every kind that were preempted at the same time, and what became of them."""

    site: Site
    cells: list[tuple[str, str, str, str]]  # kind, partition, run, job
    seen: dict[str, list[str]]
    job_ids: dict[str, str]
    restarts: dict[str, str]  # of a plain job, by partition: some versions of Slurm start it once more after its grace time


@pytest.fixture(scope="module")
def matrix(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory, digits_data: Path) -> Matrix:
    site = Site(cluster, tmp_path_factory.mktemp("matrix"), digits_data)
    site.step_takes(STEP_S, after_an_epoch=2.5)  # none ends before all train
    cells = [
        (kind, partition, run, job)
        for kind, options in KINDS.items()
        for partition in ("low0", "low6")  # GraceTime 0 and 6 s
        for run, job in site.submit_many("--partition", partition, *options)
    ]
    plain = {
        partition: cluster.batch("--requeue", "--partition", partition, "--nodes=1", "--signal=B:USR2@60", script=PLAIN)
        for partition in ("low0", "low6")
    }
    site.until_epoch(1, *(run for _, _, run, _ in cells))  # there is a checkpoint, which those without a grace time need
    # one more, whose processes have just begun: the signals come before Python can listen to them
    run, job = site.submit("--partition", "low6", "--nodes", "1")
    cluster.wait(job, {"RUNNING"})
    cells.append(("beginning", "low6", run, job))
    # and two whose tasks are not even that: one's prolog takes until the signals are there, which all come at once then, and in
    # the other one the shell before Python takes long, which they kill
    site.profile("prolog", f"{PROFILE}srun_args: [--task-prolog={slow_start(site, 'prolog', SLOW_PROLOG)}]\n")
    site.profile("shell", f"{PROFILE}setup: ['PATH={slow_start(site, 'sh', SLOW_SHELL).parent}:$PATH']\n")
    for kind in ("prolog", "shell"):
        [(run, job)] = site.submit_many("--partition", "low6", "--nodes", "1", profile=kind)
        cells.append((kind, "low6", run, job))
    cluster.until(lambda: len(list(site.folder.glob("slow-*/begun"))) == 2, 60, "both jobs' first programs")
    high = cluster.batch("--partition=high", "--nodes=3", "--exclusive", script="sleep 1")
    errors = site.runs / run / "submitit" / f"{job}_0_log.err"
    cluster.until(lambda: "task 0: " in errors.read_text(), 60, "the end of the shell")
    (site.folder / "slow-prolog" / "go").touch()
    seen = watch(site, high, [run for _, _, run, _ in cells])
    assert cluster.wait(high) == "COMPLETED"
    assert {cluster.wait(job) for job in plain.values()} == {"COMPLETED"}
    restarts = {partition: cluster.job(job)["Restarts"] for partition, job in plain.items()}
    assert restarts["low0"] == "1" and restarts["low6"] in ("1", "2")
    return Matrix(site, cells, seen, {row["run"]: row["job_id"] for row in site.statuses()}, restarts)


@pytest.mark.parametrize("kind", [*KINDS, *EARLY])
def test_every_cell_resumes_and_ends_like_the_undisturbed(
    matrix: Matrix, undisturbed: dict[int, dict[str, Any]], kind: str
) -> None:
    site, cluster = matrix.site, matrix.site.cluster
    for partition, run, job in (cell[1:] for cell in matrix.cells if cell[0] == kind):
        seen = matrix.seen[run]
        cell = f"{partition}, {job}: {seen}"
        epochs = list(range(1, EPOCHS + 1))
        assert {"failed", "cancelled", "stopped"}.isdisjoint(seen), cell
        assert seen.index("finished") == len(seen) - 1, cell  # never reported done before it was
        assert cluster.wait(job) == "COMPLETED", cell  # Slurm says so a moment after the run does
        # not once more than Slurm starts any job
        assert matrix.job_ids[run] == job and cluster.job(job)["Restarts"] == matrix.restarts[partition], cell
        steps = [row["step"] for row in site.rows(run, "step")]
        assert steps == sorted(set(steps)), f"{cell}: a step was logged twice"
        assert site.epochs(run) == epochs, cell
        assert [row["event"] for row in site.rows(run, "event")].count("finished") == 1, cell
        result = site.result(run)
        if not job.endswith("_1"):  # the second element has another seed
            assert_same(result, undisturbed[2 if kind.startswith("two") else 1])
        # a run that was preempted before its training began has trained in one stretch
        assert result["restarts"] == 1 or (kind in EARLY and result["restarts"] == 0), cell
        logged = re.findall(r"^epoch (\d+)/", site.call("logs", run), re.MULTILINE)
        assert list(dict.fromkeys(logged)) == [str(epoch) for epoch in epochs], f"{cell}: one log, in order"
        if kind in EARLY:
            continue
        (_, stopped), (resumed, _) = segments(site, run)
        assert resumed > 0, f"{cell}: trained from zero again"
        if partition == "low6":
            assert stopped == resumed and result["lost_steps"] == 0, f"{cell}: lost steps though there was a grace time"
        else:  # a checkpoint after every epoch
            assert result["lost_steps"] < 1.5 * result["steps"] / len(epochs), cell


def test_a_preemption_does_not_end_a_chain(cluster: SlurmCluster, tmp_path: Path, digits_data: Path) -> None:
    """Where the site forbids requeueing, the next link goes on, though a TERM may be all that the job heard."""
    site = Site(cluster, tmp_path, digits_data)
    site.profile("chain", CHAIN.replace("links: 10", "links: 2") + "preemptible: true\n")
    site.step_takes(STEP_S, after_an_epoch=2.5)
    pairs = [site.submit_many("--partition", partition, "--nodes", "1", profile="chain")[0] for partition in ("low0", "low6")]
    site.until_epoch(1, *(run for run, _ in pairs))
    seen = watch(site, cluster.batch("--partition=high", "--nodes=3", "--exclusive", script="sleep 1"), dict(pairs))
    for run, first in pairs:
        assert {"failed", "cancelled", "stopped"}.isdisjoint(seen[run]), seen
        jobs = [str(row["job_id"]) for row in files.read_json_lines(site.runs / run / "jobs.jsonl")]
        assert jobs[0] == first and len(jobs) == 3
        assert [cluster.job(job)["Restarts"] for job in jobs] == ["0"] * 3
        result = site.result(run)
        assert result["restarts"] == 1 and site.epochs(run) == list(range(1, EPOCHS + 1))


PREEMPTIONS = 5


def test_five_preemptions_in_a_row_hold_no_job(
    cluster: SlurmCluster, tmp_path: Path, digits_data: Path, undisturbed: dict[int, dict[str, Any]]
) -> None:
    """Newer versions hold a job that ends in its grace time and leaves the rest to Slurm: after MaxBatchRequeue preemptions."""
    shown = re.findall(r"^MaxBatchRequeue\s*= (\d+)", cluster.call("scontrol", "show", "config"), re.MULTILINE)
    assert all(int(number) <= PREEMPTIONS for number in shown)  # 22.05 does not show it
    site = Site(cluster, tmp_path, digits_data)
    pairs = [site.submit("--partition", partition, "--nodes", "1") for partition in ("low0", "low6")]
    runs = [run for run, _ in pairs]
    site.until_epoch(1, *runs)
    site.step_takes(1.5)  # none ends before the last preemption
    for number in range(1, PREEMPTIONS + 1):
        high = cluster.batch("--partition=high", "--nodes=3", "--exclusive", script="true")
        assert cluster.wait(high) == "COMPLETED"
        cluster.until(lambda: min(starts(site, run) for run in runs) > number, 90, "both train again")  # noqa: B023
    site.hasten()
    for (_, job), result in zip(pairs, site.finished(*runs), strict=True):
        assert_same(result, undisturbed[1])
        assert result["restarts"] == PREEMPTIONS
        assert cluster.wait(job) == "COMPLETED" and int(cluster.job(job)["Restarts"]) >= PREEMPTIONS


def starts(site: Site, run: str) -> int:
    return [row["event"] for row in site.rows(run, "event")].count("started")


def test_cancel_during_the_grace_time_of_a_preemption(cluster: SlurmCluster, tmp_path: Path, digits_data: Path) -> None:
    site = Site(cluster, tmp_path, digits_data)
    run, job = site.submit("--partition", "low6", "--nodes", "1", "--set", "epochs=3000")
    site.until_epoch(1, run)
    high = cluster.batch("--partition=high", "--nodes=3", "--exclusive", script="sleep 1")
    cluster.until(lambda: site.state(run).get("state") == "requeued" or cluster.state(job) != "RUNNING", 30, "the preemption")
    site.call("cancel", run)
    assert cluster.wait(high) == "COMPLETED"
    cluster.until(lambda: not cluster.call("squeue", "--noheader"), 60, "an empty queue")
    assert cluster.job(job)["JobState"] == "CANCELLED"
    assert [row["event"] for row in site.rows(run, "event")].count("started") == 1, "it has not trained again"
    assert site.status(run)["state"] == "cancelled"


def test_a_raw_scancel_never_resurrects(slurm_cluster: SlurmCluster, tmp_path: Path, digits_data: Path) -> None:
    """It sends the TERM that a preemption sends too, and leaves no marker in the run directory. One job has a grace time, one
    has none, one waits for its second start.
    """
    cluster = slurm_cluster
    site = Site(cluster, tmp_path, digits_data)
    options = ("--nodes", "1", "--set", "epochs=3000")
    pairs = [site.submit("--partition", partition, *options) for partition in ("low6", "low0", "low6")]
    site.until_epoch(1, *(run for run, _ in pairs))
    requeued = pairs[-1][1]
    cluster.call("scontrol", "requeuehold", requeued)
    cluster.wait(requeued, {"PENDING", "REQUEUE_HOLD"})
    cluster.call("scancel", *(job for _, job in pairs))
    cluster.until(lambda: not cluster.call("squeue", "--noheader"), 60, "the jobs leave the queue")
    # they are no longer COMPLETING, so that no process of them is left that could requeue one
    for run, job in pairs:
        assert cluster.state(job) == "CANCELLED" and cluster.job(job)["Restarts"] == str(int(job == requeued))
        assert site.status(run)["state"] == "cancelled"
