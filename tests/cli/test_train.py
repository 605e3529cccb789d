"""``hpc-cifar train`` as torchrun starts it: ranks find each other's run, and the same command continues it."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest
from launch_site import Site, eventually

from hpc_cifar import files, runs
from hpc_cifar.runs import Run

pytestmark = pytest.mark.slow  # real processes, seconds each


def ranks(site: Site, *arguments: str, world: int = 2) -> list[tuple[int | None, str, str]]:
    """Start every rank as torchrun does, in wrong order, and wait; exit code, stdout and stderr of each."""
    common = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    own = dict(site.environment)
    children: list[subprocess.Popen[str]] = []
    for rank in reversed(range(world)):
        site.environment = {**own, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        children.insert(0, site.start("train", *arguments))
    site.environment = own
    ended = []
    for child in children:
        out, err = child.communicate(timeout=60)
        assert "Traceback" not in err, err
        ended.append((child.returncode, out, err))
    return ended


def only_run(site: Site) -> Run:
    (run,) = runs.all_runs(site.runs)
    return run


def test_the_same_command_resumes_and_then_says_so(site: Site) -> None:
    job = site.job()
    first = ranks(site, job, "--max-steps", "5")
    assert [code for code, _, _ in first] == [0, 0], first
    run = only_run(site)
    assert run.id.startswith("tiny-")
    assert len(run.id) == len("tiny-") + 8
    assert site.status(run)["state"] == "stopped"
    second = ranks(site, job)
    assert [code for code, _, _ in second] == [0, 0]
    assert only_run(site).id == run.id
    assert [row["step"] for row in site.seen(run)] == [0, 5]
    assert "test accuracy  75.00 %" in second[0][1]
    third = ranks(site, job)
    assert "finished already" in third[0][1]
    assert [out for _, out, _ in (first[1], second[1], third[1])] == ["", "", ""]  # only rank 0 prints
    assert len(site.seen(run)) == 2


def test_fresh_starts_over_on_every_rank(site: Site) -> None:
    job = site.job()
    ranks(site, job, "--max-steps", "5")
    run = only_run(site)
    done = ranks(site, job, "--fresh")
    assert [code for code, _, _ in done] == [0, 0]
    assert "starting over" in done[0][1]
    assert [row["step"] for row in site.seen(run)] == [0] == [row["step"] for row in site.seen(run, 1)]
    old, new = runs.all_runs(site.runs)  # the old one is set aside
    event = files.read_json_lines(new.metrics_file)[0]
    assert new == run and (event["event"], event["aside"]) == ("begun again", old.id)


def test_the_plan_says_what_was_adapted(site: Site) -> None:
    ranks(site, site.job(), "--set", "resources.gpus_per_node=8", "--set", "resources.processes_per_node=8")
    notes = only_run(site).plan().notes  # the training loop prints what it does differently
    assert notes == ("the file asks for 1 node x 8 GPUs; here: 1 node x 2 CPU processes",)


def test_a_problem_ends_every_rank_and_is_said_once(site: Site) -> None:
    (site.data / "digits").rmdir()
    done = ranks(site, site.job())
    assert [code for code, _, _ in done] == [2, 1]
    assert "hpc-cifar prepare digits" in done[0][2]
    assert done[1][1:] == ("", "")
    assert not runs.all_runs(site.runs)


def test_a_failure_is_in_the_run_directory(site: Site) -> None:
    done = ranks(site, site.job("raise=0"), world=1)
    assert done[0][0] == 1
    assert done[0][2] == "hpc-cifar: error: the training loss became nan at step 5\nmore words\n"
    seen = site.status(only_run(site))
    assert (seen["state"], seen["reason"]) == ("failed", "the training loss became nan at step 5")


def test_what_makes_no_other_updates_may_change_and_the_rest_by_force(site: Site) -> None:
    site.cli("train", site.job(), "--name", "mine", "--max-steps", "5")
    harmless = ("--set", "checkpoint.keep_last=7", "--set", "tracking.wandb=offline", "--set", "resources.nodes=3")
    done = site.cli("train", site.job(), "--name", "mine", "--max-steps", "6", *harmless)
    assert "mine: goes on with " in done.stdout and "checkpoint.keep_last: 3 -> 7" in done.stdout
    other = ("--name", "mine", *harmless, "--set", "optimizer.lr=0.5", "--set", "data.augment.flip=random")
    refused = site.cli("train", site.job(), *other, code=1)
    assert "optimizer.lr: 0.1 -> 0.5" in refused.stderr and "data.augment.flip" in refused.stderr
    assert "keep_last" not in refused.stderr and only_run(site).experiment().optimizer.lr == 0.1
    site.cli("train", site.job(), *other, "--set", "data.batch_size=72", "--force")
    assert only_run(site).experiment().optimizer.lr == 0.5 and only_run(site).finished()
    assert only_run(site).plan().batch_size == 72


def test_another_name_and_a_name_that_is_taken(site: Site) -> None:
    site.cli("train", site.job(epochs=1), "--name", "mine")
    assert only_run(site).id == "mine"
    refused = site.cli("train", site.job(epochs=2), "--name", "mine", code=1)
    assert "mine was begun with another experiment (epochs: 1 -> 2); --fresh starts over" in refused.stderr
    assert site.cli("train", site.job(), "--name", "../out", code=2).stderr.startswith("hpc-cifar: error: run name")


def test_a_killed_train_is_seen_and_a_live_one_not_started_twice(site: Site) -> None:
    child = site.start("train", site.job("step_s=0.1", epochs=50))
    run = eventually(lambda: next(iter(runs.all_runs(site.runs)), None))
    site.running(run)
    assert site.status(run)["state"] == "running"
    assert "is being trained right now" in site.cli("train", site.job("step_s=0.1", epochs=50), code=1).stderr
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    seen = site.status(run)
    assert (seen["state"], seen["reason"]) == ("failed", "processes ended without a result")
