"""Slurm takes a job and does not say so, or not in time. Slurm's programs are stand-ins here."""

from __future__ import annotations

import json
import subprocess

import pytest
from launch_site import Site
from queue_site import Queue, chained, ids, is_open, only, state, submit

from hpc_cifar import files, runs
from hpc_cifar.launch import handover, submission

pytestmark = pytest.mark.slow  # real processes, seconds each


# ---- sbatch does not say what it did --------------------------------------------------------------------------------------


def test_a_job_that_was_taken_without_a_word_is_adopted(site: Site, queue: Queue) -> None:
    queue.behaves("takes")
    done = submit(queue)
    run = only(site)
    assert done.stdout == f"{run.id}\t77\n"
    assert "Slurm did not answer (Batch job submission failed: Socket timed out on send/recv operation)" in done.stderr
    assert (queue.calls, queue.jobs, ids(run)) == (1, ["77"], ["77"])
    assert state(run, site) == ("pending", "77", "Priority")
    assert (run.submitit / "77_submitted.pkl").is_file() and (run.submitit / "77_submission.sh").is_file()
    assert not is_open(run)
    assert "cancelled while it was waiting" in site.cli("cancel", run.id).stdout
    assert (queue.cancelled, queue.jobs) == (["77"], [])


@pytest.mark.parametrize("first", ["loses", "away", "hangs"])
def test_what_was_not_taken_is_tried_again(site: Site, queue: Queue, first: str) -> None:
    queue.behaves(first, "works")
    done = submit(queue)
    assert done.stdout.endswith("\t78\n") and queue.jobs == ["78"]
    assert "did not answer" in done.stderr and "refused" not in done.stderr


def test_an_array_that_was_taken_without_a_word_is_adopted(site: Site, queue: Queue) -> None:
    queue.behaves("takes")
    assert submit(queue, "--seeds", "3").stdout.split()[1::2] == ["77_0", "77_1", "77_2"]
    made = runs.all_runs(site.runs)
    assert sorted(ids(run)[0] for run in made) == ["77_0", "77_1", "77_2"]
    assert all((run.submitit / f"{ids(run)[0]}_submitted.pkl").is_file() and not is_open(run) for run in made)


def test_one_that_came_through_late_is_withdrawn_when_the_next_try_worked(site: Site, queue: Queue) -> None:
    queue.behaves("hidden", "works")
    text = (site.folder / "bin" / "sbatch").read_text()
    (site.folder / "bin" / "sbatch").write_text(text.replace("works) ", "works) mv late-77 77; "))
    assert submit(queue).stdout.endswith("\t78\n")
    assert (queue.cancelled, queue.jobs) == (["77"], ["78"])


def test_a_refusal_is_not_tried_again(site: Site, queue: Queue) -> None:
    queue.behaves("refuses")
    refused = submit(queue, code=1)
    assert refused.stderr.startswith("hpc-cifar: error: sbatch refused the job: ")
    assert queue.calls == 1 and not is_open(only(site))


# ---- nobody answers at all ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "number"), [((), 1), (("--seeds", "3"), 3)])
def test_when_nobody_answers_resume_looks_first(site: Site, queue: Queue, options: tuple[str, ...], number: int) -> None:
    queue.behaves("hidden")
    queue.silent(True)
    failed = submit(queue, *options, code=1)
    assert failed.stderr.splitlines()[-1] == (
        "hpc-cifar: error: Slurm did not answer (Batch job submission failed: Socket timed out on send/recv operation): "
        f"{handover.UNKNOWN}"
    )
    assert queue.calls == 1, "while nobody can say what is queued, another one might be one too many"
    made = runs.all_runs(site.runs)
    assert len(made) == number
    rows = json.loads(site.cli("status", "--json").stdout)
    assert {row["state"] for row in rows} == {"failed"} and {row["reason"].split(" (")[0] for row in rows} == {
        "Slurm did not answer"
    }
    refused = site.cli("resume", made[0].id, code=1)
    assert "so nobody can say whether it has a job of this run already" in refused.stderr
    assert queue.calls == 1

    queue.silent(False)
    queue.comes("77")
    for run in made:
        assert "Slurm had job 77" in site.cli("resume", run.id).stdout
    assert queue.calls == 1 and queue.jobs == ["77"]
    assert {tuple(ids(run)) for run in made} == ({("77",)} if number == 1 else {("77_0",), ("77_1",), ("77_2",)})
    for run in made:
        assert state(run, site) == ("pending", ids(run)[0], "Priority")
        assert f"is pending as job {ids(run)[0]}" in site.cli("resume", run.id, code=1).stderr


def test_status_finds_the_job_and_asks_a_few_times_only(site: Site, queue: Queue) -> None:
    queue.behaves("hidden")
    queue.silent(True)
    submit(queue, code=1)
    run = only(site)
    queue.silent(False)
    assert state(run, site)[0] == "failed"
    before = queue.looks
    saved = files.read_json(run.path / submission.FILE) or {}
    files.write_json(run.path / submission.FILE, {**saved, "began": saved["began"] - submission.LATE_S - 1})
    assert state(run, site)[0] == "failed" and queue.looks == before, "it is long over"
    assert "cancelled; Slurm has no job of it" in site.cli("cancel", run.id).stdout and queue.looks > before, "cancel asks anew"
    site.cli("status", run.id)

    again = submit(queue, code=1)
    assert "did not answer" in again.stderr
    other = next(one for one in runs.all_runs(site.runs) if one != run)
    number = next(queue.folder.glob("late-*[0-9]")).name
    for late in sorted(queue.folder.glob("late-[0-9][0-9]"))[-1:]:
        number = late.name.removeprefix("late-")
        queue.comes(number)
    assert state(other, site) == ("pending", number, "Priority"), "status itself adopts"


def test_nothing_was_taken_and_resume_submits_again(site: Site, queue: Queue) -> None:
    queue.behaves("loses", "loses", "loses", "works")
    submit(queue, code=1)
    run = only(site)
    first = (files.read_json(run.path / submission.FILE) or {})["mark"]
    assert "resumed as job 80" in site.cli("resume", run.id).stdout
    assert queue.jobs == ["80"] and ids(run) == ["80"]
    [row] = run.jobs()
    assert row.replaces == (first,) and row.submission != first
    assert submission.enter(run, first, "77") == "it was submitted again, when nobody knew of this job"
    assert submission.enter(run, row.submission, "79") == "job 80 of the same submission is known"
    assert submission.enter(run, row.submission, "80") is None


def test_cancel_ends_a_job_that_nobody_knew_of(site: Site, queue: Queue) -> None:
    queue.behaves("hidden")
    queue.silent(True)
    submit(queue, code=1)
    run = only(site)
    assert "it is not known whether it has a job" in site.cli("cancel", run.id, code=1).stderr
    assert run.cancel_marker.exists() and state(run, site)[0] == "cancelled"
    queue.silent(False)
    queue.comes("77")
    assert "cancelled while it was waiting (job 77)" in site.cli("cancel", run.id).stdout
    assert (queue.cancelled, queue.jobs, state(run, site)[0]) == (["77"], [], "cancelled")


def test_many_are_cancelled_together_with_what_nobody_knew_of(site: Site, queue: Queue) -> None:
    queue.behaves("hidden")
    queue.silent(True)
    submit(queue, "--seeds", "2", code=1)
    made = runs.all_runs(site.runs)
    queue.silent(False)
    queue.comes("77")
    assert site.cli("cancel", *(run.id for run in made)).stdout.count("cancelled while it was waiting") == 2
    assert sorted(queue.cancelled) == ["77_0", "77_1"]


def test_a_late_job_enters_itself(site: Site, queue: Queue) -> None:
    queue.behaves("loses")
    submit(queue, code=1)
    run = only(site)
    mark = (files.read_json(run.path / submission.FILE) or {})["mark"]
    assert submission.enter(run, mark, "99") is None
    assert ids(run) == ["99"] and not is_open(run)
    assert submission.enter(run, mark, "99") is None and submission.enter(run, mark, "98") is not None


def test_the_script_of_a_late_job_finds_the_pickle(site: Site, queue: Queue) -> None:
    queue.behaves("hidden")
    queue.silent(True)
    submit(queue, "--seeds", "2", code=1)
    [links] = (site.runs / ".arrays").iterdir()
    script = (links / f".submission_file_{links.name}.sh").read_text()
    for element in ("0", "1"):
        environment = {
            "PATH": "/usr/bin:/bin",
            "SLURM_JOB_ID": "79",
            "SLURM_ARRAY_JOB_ID": "77",
            "SLURM_ARRAY_TASK_ID": element,
        }
        subprocess.run(["bash", "-c", script.replace("srun ", "exit; srun ")], env=environment, check=False)
        assert (links / element / "submitit" / f"77_{element}_submitted.pkl").is_file()


# ---- chains ---------------------------------------------------------------------------------------------------------------


def test_a_link_that_was_taken_without_a_word_is_adopted(site: Site, queue: Queue) -> None:
    queue.behaves("works", "takes", "works")
    submit(queue, "--cluster", chained(queue))
    run = only(site)
    assert [(row.job_id, row.follows) for row in run.jobs()] == [("77", None), ("78", "77"), ("79", "78")]
    assert (queue.calls, queue.jobs) == (3, ["77", "78", "79"])


def test_a_link_of_which_nobody_knows_leaves_the_run_as_it_is(site: Site, queue: Queue) -> None:
    queue.behaves("works", "loses")
    done = submit(queue, "--cluster", chained(queue))
    assert "only 0 of the 2 jobs that continue it: Slurm did not answer" in done.stderr and "refused" not in done.stderr
    run = only(site)
    assert ids(run) == ["77"] and is_open(run)
    assert state(run, site) == ("pending", "77", "Priority")
