"""Many runs at once without Slurm: the local executor's order, what is waited for, and ids as Slurm prints them."""

from __future__ import annotations

import json
import os
import shlex
import stat
import time
from pathlib import Path
from typing import Any

import pytest
from launch_site import Site, eventually

from hpc_cifar import runs
from hpc_cifar.launch import array, slurm, snapshot, status, submit_many
from hpc_cifar.runs import Run

pytestmark = pytest.mark.slow  # real processes, seconds each


def submit(site: Site, *arguments: str) -> list[Run]:
    printed = site.cli("submit", *arguments, "--cluster", "local", "--parsable").stdout
    return [Run(site.runs / line.split("\t")[0]) for line in printed.splitlines()]


def test_elements_run_one_after_another_and_the_second_goes_on_when_the_first_fails(site: Site) -> None:
    one, two, three = submit(site, site.job("step_s=0.05", "raise=0", processes=1), "--seeds", "3")
    rows: set[tuple[str, ...]] = set()

    def ended() -> bool:
        seen = status.statuses([one, two, three])
        rows.add(tuple(row.state for row in seen))
        return all(row.ended for row in seen)

    eventually(ended, 60)
    assert max(row.count("running") for row in rows) == 1
    assert ("running", "pending", "pending") in rows
    assert ("failed", "failed", "failed") in rows
    assert site.cli("wait", one.id, two.id, three.id, code=1).stdout.count("failed (the training loss became nan") == 3
    assert [run.experiment().seed for run in (one, two, three)] == [1, 2, 3]


def test_the_limit_is_how_many_run_at_once(site: Site) -> None:
    made = submit(site, site.job("step_s=0.2", epochs=300, processes=1), "--seeds", "4", "--array-limit", "2")
    for run in made[:2]:
        site.running(run)
    assert [row.state for row in status.statuses(made)][2:] == ["pending", "pending"]
    site.cli("cancel", *(run.id for run in made))
    assert {row.state for row in status.statuses(made)} == {"cancelled"}


def test_cancelling_one_that_waits_leaves_the_others(site: Site) -> None:
    one, two, three = submit(site, site.job("held", epochs=1, processes=1), "--seeds", "3")
    eventually(lambda: site.seen(one), what="its start")
    assert site.cli("cancel", two.id).stdout == f"{two.id}: cancelled\n"
    (site.runs / "go").touch()
    assert site.cli("wait", one.id, two.id, three.id, code=1).stdout.splitlines() == [
        f"{one.id}: finished",
        f"{two.id}: cancelled",
        f"{three.id}: finished",
    ]
    assert not site.seen(two)
    site.cli("resume", two.id)
    assert site.cli("wait", two.id).stdout == f"{two.id}: finished\n"


def test_follow_counts_and_ends_with_a_table(site: Site) -> None:
    done = site.cli("submit", site.job("step_s=0.05", processes=1), "--seeds", "2", "--cluster", "local", "--follow")
    lines = done.stdout.splitlines()
    assert any(line.startswith("2 runs: 1 finished, 1 ") for line in lines)
    assert "2 runs: 2 finished" in lines
    assert len([line for line in lines if "\tfinished\t" in line]) == 2


def test_json_lists_every_element_and_those_at_once_share_out_the_gpus(site: Site) -> None:
    site.environment["CUDA_VISIBLE_DEVICES"] = "4,5,6"
    job = site.job(epochs=1, processes=1)
    options = ("--kfold", "3", "--gpus-per-node", "1", "--array-limit", "2", "--json", "--wait")
    rows = json.loads(site.cli("submit", job, "--cluster", "local", *options).stdout)
    assert len(rows) == 3 and all({"run", "job_id", "path"} <= set(row) for row in rows)
    made = [Run(Path(row["path"])) for row in rows]
    assert [run.experiment().data.fold for run in made] == [0, 1, 2]
    assert [row.state for row in status.statuses(made)] == ["finished"] * 3
    assert [site.seen(run)[0]["CUDA_VISIBLE_DEVICES"] for run in made] == ["4", "5", "4"]


# ---- after -------------------------------------------------------------------------------------------------------------


def test_a_local_run_waits_for_another_and_needs_it_to_finish(site: Site) -> None:
    first = site.submit("held", epochs=1, processes=1)
    [second] = submit(site, site.job(epochs=1, processes=1), "--after", first.id)
    doomed = site.submit("step_s=0.2", epochs=300, processes=1)
    [third] = submit(site, site.job(epochs=1, processes=1), "--after", second.id, "--after", doomed.id)
    (site.runs / "go").touch()
    assert site.cli("wait", second.id).stdout == f"{second.id}: finished\n"
    assert second.jobs()[0].after == (first.id,)
    began = (second.path / "seen-0.jsonl").stat().st_mtime
    assert first.finished() and first.result_file.stat().st_mtime <= began
    site.cli("cancel", doomed.id)
    assert site.cli("wait", third.id, code=1).stdout == (
        f"{third.id}: failed ({doomed.id}, after which this run was to start, has not finished: it is cancelled; "
        "resume that one, then this one)\n"
    )
    assert not site.seen(third)


def test_after_refuses_what_can_never_be(site: Site) -> None:
    run = site.submit("raise=0", processes=1)
    site.cli("wait", run.id, code=1)
    job = site.job(processes=1)
    refused = site.cli("submit", job, "--cluster", "local", "--after", run.id, code=2)
    assert refused.stderr.startswith(
        f"hpc-cifar: error: --after {run.id}: it is failed (the training loss became nan at step 5"
    )
    assert "no such run" in site.cli("submit", job, "--cluster", "local", "--after", "nothing", code=2).stderr
    slow = site.submit("held", processes=1)
    refused = site.cli("submit", job, "--cluster", "slurm", "--dry-run", "--after", slow.id, code=2)
    assert refused.stderr == (
        f"hpc-cifar: error: --after {slow.id}: it runs on this machine without Slurm and the new run would not; "
        f"wait for it first: hpc-cifar wait {slow.id}\n"
    )
    assert len(runs.all_runs(site.runs)) == 2
    site.cli("cancel", slow.id)


# ---- refusals, with commands that stand in for Slurm's -------------------------------------------------------------------


def command(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_a_refused_array_leaves_runs_that_say_so(site: Site) -> None:
    words = "sbatch: error: Batch job submission failed: Invalid job array specification"
    tested = (
        'case "$*" in *--test-only*) echo "sbatch: Job 1 to start at 2026-01-01T00:00:00 using 1 processors" >&2; exit 0;; esac'
    )
    command(site.folder / "bin", "sbatch", f"{tested}\necho {shlex.quote(words)} >&2; exit 1")
    site.environment["PATH"] = f"{site.folder / 'bin'}:/usr/bin:/bin"
    refused = site.cli("submit", site.job(), "--seeds", "3", "--cluster", "slurm", code=1)
    said = "sbatch refused the job: Batch job submission failed: Invalid job array specification"
    assert refused.stderr == f"hpc-cifar: error: {said}\n"
    made = runs.all_runs(site.runs)
    assert [(row.state, row.reason) for row in status.statuses(made)] == [("failed", said)] * 3


def test_what_sbatch_gets_for_an_array_is_what_the_dry_run_shows(site: Site) -> None:
    command(site.folder / "bin", "sbatch", f'cp "$1" {site.folder}/got.sh; echo Submitted batch job 77')
    site.environment["PATH"] = f"{site.folder / 'bin'}:/usr/bin:/bin"
    arguments = ("submit", site.job(), "--cluster", "slurm", "--seeds", "2", "--array-limit", "1")
    shown = site.cli(*arguments, "--dry-run").stdout
    shown = shown[shown.index("#!/bin/bash") : shown.index("in all: ")].strip()
    made = site.cli(*arguments, "--parsable").stdout.split()
    assert made[1::2] == ["77_0", "77_1"]
    [links] = (site.runs / ".arrays").iterdir()
    shown_links = shown.partition("hpc-cifar array ")[2].partition("'")[0]
    assert shown.replace(shown_links, links.name) == (site.folder / "got.sh").read_text().strip()
    assert f'\nexport PYTHONPATH={links}/"$SLURM_ARRAY_TASK_ID"/code${{PYTHONPATH:+:$PYTHONPATH}}\n' in shown.replace(
        shown_links, links.name
    )
    assert (links / "1").resolve() == site.runs / made[2]


# ---- small parts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("123", ["123"]),
        ("123_4", ["123_4"]),
        ("123_[4]", ["123_4"]),
        ("123_[0-2,7,9-10%2]", ["123_0", "123_1", "123_2", "123_7", "123_9", "123_10"]),
        ("123_[0-9:4]", ["123_0", "123_4", "123_8"]),
        ("123_[0-1,...]", ["123_0", "123_1"]),
    ],
)
def test_ids_as_slurm_prints_them(text: str, expected: list[str]) -> None:
    assert set(slurm.expand_ids(text, {*expected, "123_5", "123_11", "9"})) == set(expected)
    assert slurm.expand_ids(text, {"123_7", "9"}) == [one for one in expected if one == "123_7"]


@pytest.mark.parametrize(
    "spans", ["0-30000000", ",".join(["0-999999999"] * 2000), "0-999999999:1%4", "9" * 5000, "²", "0-²", "5-3", "0-9:0"]
)
def test_an_array_of_millions_takes_no_time_and_no_memory(spans: str) -> None:
    begin = time.process_time()
    assert slurm.expand_ids(f"7_[{spans}]", {"7_4", "7_x", "8_4", "7_²"}) in ([], ["7_4"])
    assert time.process_time() - begin < 5


def test_a_queue_of_millions_of_elements_is_asked_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    listing = "".join(f"{job}_[0-30000000]|PENDING|Priority|N/A|\n" for job in range(200))
    monkeypatch.setattr(slurm, "ask", lambda command, **_: slurm.Reply(listing if command[0] == "squeue" else "", "", 0))
    begin = time.process_time()
    found = slurm.query(["7_4", "199_30000000", "199_30000001"]).jobs
    assert sorted(found) == ["199_30000000", "7_4"]
    assert time.process_time() - begin < 2


@pytest.mark.parametrize(
    "answers",
    [
        {"squeue": "7_0|RUNNING|None\n7_[1-2%1]|PENDING|JobArrayTaskLimit"},
        {"squeue": "", "sacct": "7_0|RUNNING|None\n7_[1-2%1]|PENDING|JobArrayTaskLimit"},
        {
            "scontrol": "JobId=8 ArrayJobId=7 ArrayTaskId=0 JobState=RUNNING Reason=None\n"
            "JobId=7 ArrayJobId=7 ArrayTaskId=1-2%1 JobState=PENDING Reason=JobArrayTaskLimit Dependency=(null)\n"
        },
    ],
)
def test_waiting_elements_are_found_whoever_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: dict[str, str]
) -> None:
    for name in ("squeue", "sacct", "scontrol"):
        body = f"printf '%s\\n' {shlex.quote(answers[name])}" if name in answers else "exit 1"
        command(tmp_path / "bin", name, body)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    waiting = slurm.JobState("PENDING", "JobArrayTaskLimit")
    assert slurm.query(["7_0", "7_1", "7_2"]).jobs == {"7_0": slurm.JobState("RUNNING"), "7_1": waiting, "7_2": waiting}


def test_a_snapshot_is_shared_by_links_or_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        (tmp_path / name).mkdir()
    first = snapshot.take(tmp_path / "a" / "code")
    second = snapshot.share(tmp_path / "b" / "code", first)
    ours = {path.relative_to(first) for path in first.rglob("*")}
    assert {path.relative_to(second) for path in second.rglob("*")} == ours
    files = [path for path in ours if (first / path).is_file()]
    assert all((second / path).samefile(first / path) for path in files)
    assert all((second / path).stat().st_mode & 0o777 == 0o700 for path in ours if (second / path).is_dir())

    def refused(*_: Any) -> None:
        raise OSError("this file system has no hard links")

    monkeypatch.setattr(os, "link", refused)
    third = snapshot.share(tmp_path / "c" / "code", first)
    assert all((third / path).read_bytes() == (first / path).read_bytes() for path in files)
    assert not any((third / path).samefile(first / path) for path in files)


def test_requests_that_differ_are_arrays_of_their_own_and_none_is_too_large(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hpc_cifar.config.cluster import SLURM
    from hpc_cifar.config.expand import expand
    from hpc_cifar.config.load import load_experiment

    path = Path(site.job())
    small, other = load_experiment(path), load_experiment(path, ["name=other", "seed=50"])
    wide = load_experiment(path, ["resources.nodes=2"])
    planned = submit_many.plan_all(expand([small, wide, other], seeds=2), SLURM, site.folder / "not prepared", prepared=False)
    groups = submit_many.groups_of(planned, SLURM)
    assert [[one.experiment.seed for one in group] for group in groups] == [[1, 2, 50, 51], [1, 2]]
    monkeypatch.setattr(array, "LARGEST_ARRAY", 3)
    assert [len(group) for group in submit_many.groups_of(planned, SLURM)] == [3, 1, 2]
