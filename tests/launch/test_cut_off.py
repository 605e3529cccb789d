"""Whoever submits is cut off: by a signal, a dead pipe, a kill. Slurm's programs are stand-ins here."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any

import pytest
from launch_site import Site, eventually
from queue_site import Queue, chained, ids, is_open, only, state, submit

from hpc_cifar import runs

pytestmark = pytest.mark.slow  # real processes, seconds each


def interrupted(site: Site, queue: Queue, number: int, *options: str) -> tuple[int, str]:
    child = site.start("submit", site.job(processes=1), "--cluster", "slurm", "--parsable", *options)
    eventually((queue.folder / "hanging").exists, 30)
    child.send_signal(number)
    _, err = child.communicate(timeout=60)
    assert "Traceback" not in err
    return child.returncode, err


@pytest.mark.parametrize(
    ("number", "options"),
    [(signal.SIGINT, ()), (signal.SIGTERM, ("--seeds", "3")), (signal.SIGHUP, ("--seeds", "3"))],
)
def test_an_interrupted_submission_is_withdrawn(
    site: Site, queue: Queue, number: signal.Signals, options: tuple[str, ...]
) -> None:
    queue.behaves("takes-and-hangs")
    code, err = interrupted(site, queue, number, *options)
    assert code == 128 + number and "job 77 was withdrawn" in err
    assert (queue.cancelled, queue.jobs) == (["77"], [])
    for run in runs.all_runs(site.runs):
        assert state(run, site)[::2] == ("failed", "not submitted: the command was interrupted; job 77 was withdrawn")
        assert not is_open(run) and not run.cancel_marker.exists()


def test_an_answer_that_comes_after_the_signal_is_heard(site: Site, queue: Queue) -> None:
    queue.set(SBATCH_LIMIT_S="30.0", LAST_WORD_S="20.0")
    queue.behaves("slow")
    code, err = interrupted(site, queue, signal.SIGTERM, "--seeds", "3")
    assert code == 143 and "job 77 was withdrawn" in err
    assert (queue.cancelled, queue.jobs, queue.calls) == (["77"], [], 1)
    assert sorted(ids(run)[0] for run in runs.all_runs(site.runs)) == ["77_0", "77_1", "77_2"]


def test_a_signal_that_comes_when_the_job_is_known_changes_nothing_of_it(site: Site, queue: Queue) -> None:
    module = site.package / "launch" / "submission.py"
    own = "def place(folder: Path, mark: str, job_id: str) -> None:\n"
    module.write_text(module.read_text().replace(own, own + "    os.kill(os.getpid(), 15)\n"))
    queue.behaves("works")
    done = submit(queue, "--seeds", "3", code=143)
    assert "job 77 is submitted all the same" in done.stderr
    made = runs.all_runs(site.runs)
    assert sorted(state(run, site)[1] or "" for run in made) == ["77_0", "77_1", "77_2"]
    assert {state(run, site)[0] for run in made} == {"pending"} and queue.cancelled == []


def test_interrupted_while_nobody_answers_the_job_would_end_at_once(site: Site, queue: Queue) -> None:
    queue.behaves("takes-and-hangs")
    queue.silent(True)
    code, err = interrupted(site, queue, signal.SIGINT)
    assert code == 130 and "whether Slurm has the job is not known; it would end as soon as it starts" in err
    run = only(site)
    assert run.cancel_marker.exists() and is_open(run) and state(run, site)[0] == "failed"
    queue.silent(False)
    assert "Slurm had job 77" in site.cli("resume", run.id).stdout and queue.calls == 1
    assert not run.cancel_marker.exists(), "resume lets its job train"
    assert state(run, site) == ("pending", "77", "Priority")


def test_interrupted_between_links_the_run_stays_queued(site: Site, queue: Queue) -> None:
    queue.behaves("works", "takes-and-hangs")
    code, err = interrupted(site, queue, signal.SIGINT, "--cluster", chained(queue))
    run = only(site)
    assert code == 130 and queue.cancelled == ["78"] and queue.jobs == ["77"]
    assert f"{run.id} is queued as job 77" in err
    assert state(run, site) == ("pending", "77", "Priority")
    assert not run.cancel_marker.exists()


@pytest.mark.parametrize("options", [(), ("--seeds", "3")])
def test_a_submission_whose_process_was_killed_is_found_again(site: Site, queue: Queue, options: tuple[str, ...]) -> None:
    queue.behaves("takes-and-hangs", "works")
    queue.set(SBATCH_LIMIT_S="60.0")
    child = site.start("submit", site.job(processes=1), "--cluster", "slurm", *options)
    eventually((queue.folder / "hanging").exists, 30)
    made = runs.all_runs(site.runs)
    assert state(made[0], site)[::2] == ("pending", "it is being submitted")
    assert "is being submitted by process" in site.cli("resume", made[0].id, code=1).stderr
    child.kill()
    child.communicate()
    rows = json.loads(site.cli("status", "--json").stdout)
    wanted = ["77"] if not options else ["77_0", "77_1", "77_2"]
    assert sorted(row["job_id"] for row in rows) == wanted and {row["state"] for row in rows} == {"pending"}
    assert queue.calls == 1


def test_a_submission_that_was_killed_before_sbatch_is_told_so(site: Site, queue: Queue) -> None:
    queue.behaves("slow", "works")
    child = site.start("submit", site.job(processes=1), "--cluster", "slurm")
    eventually((queue.folder / "hanging").exists, 30)
    child.kill()
    child.communicate()
    run = only(site)
    assert state(run, site)[::2] == (
        "failed",
        "its submission was cut off, and Slurm has no job of it: continue with hpc-cifar resume",
    )
    time.sleep(4)  # sbatch itself went on
    assert "Slurm had job 77" in site.cli("resume", run.id).stdout


def test_a_dead_pipe_leaves_what_was_submitted(site: Site, queue: Queue) -> None:
    queue.behaves("works")
    reader, writer = os.pipe()
    os.close(reader)
    path = site.work / "chain.yaml"
    path.write_text("executor: slurm\nrequeue: false\nchain_links: 1\n")  # elements are jobs of their own, told one by one
    child = site.start("submit", site.job(processes=1), "--seeds", "3", "--cluster", str(path), stdout=writer)
    os.close(writer)
    child.communicate(timeout=60)
    for run in runs.all_runs(site.runs):
        row: dict[str, Any] = site.status(run)
        known = [one for one in ids(run) if one in queue.jobs]
        assert (row["state"] == "pending") == bool(known)
    assert sorted(one for run in runs.all_runs(site.runs) for one in ids(run)) == queue.jobs
