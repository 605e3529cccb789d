"""Slurm takes a job and does not say so, or not in time; whoever submits is cut off. Slurm's programs are stand-ins here."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import time
from typing import Any

import pytest
from launch_site import Site, command, eventually

from hpc_cifar import files, runs
from hpc_cifar.launch import handover, submission
from hpc_cifar.runs import Run

pytestmark = pytest.mark.slow  # real processes, seconds each

TIMED_OUT = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
UNREACHABLE = "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)"
FULL = "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit)"


class Queue:
    """A queue in a folder: ``sbatch`` does what ``behaves`` says, a line for each call, the last line for all that follow."""

    def __init__(self, site: Site) -> None:
        self.site, self.folder = site, site.folder / "queue"
        self.folder.mkdir()
        tested = "sbatch: Job 1 to start at 2030-01-01T00:00:00 using 2 processors on nodes n1 in partition x"
        command(
            site.folder / "bin",
            "sbatch",
            f"""cd {self.folder}
if [ "$1" = --test-only ]; then echo {shlex.quote(tested)} >&2; exit 0; fi
echo x >> calls
number=$((76 + $(wc -l < calls)))
what=$(sed -n "$(wc -l < calls)p" behaves); what=${{what:-$(tail -n 1 behaves)}}
take() {{ echo "$1" > "$number"; sed -n "s/#SBATCH --comment='\\(.*\\)'/\\1/p" "$1" > "$number.k"; }}
case $what in
  works) take "$1"; echo "Submitted batch job $number" ;;
  takes) take "$1"; echo "{TIMED_OUT}" >&2; exit 1 ;;
  hidden) take "$1"; mv "$number" "late-$number"; echo "{TIMED_OUT}" >&2; exit 1 ;;
  loses) echo "{TIMED_OUT}" >&2; exit 1 ;;
  away) echo "{UNREACHABLE}" >&2; exit 1 ;;
  refuses) echo "{FULL}" >&2; exit 1 ;;
  hangs) sleep 1000 ;;
  takes-and-hangs) take "$1"; touch hanging; sleep 1000 ;;
  slow) touch hanging; sleep 3; take "$1"; echo "Submitted batch job $number" ;;
esac""",
        )
        command(
            site.folder / "bin",
            "squeue",
            f"""cd {self.folder}
echo x >> looks
[ -e silent ] && {{ echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2; exit 1; }}
for job in [0-9][0-9]; do
  [ -e "$job" ] || continue
  case "$*" in
    *%o*) echo "$job|PENDING|$(cat "$job")|$(cat "$job.k")" ;;
    *) echo "$job|PENDING|Priority|N/A|"; for element in 0 1 2; do echo "${{job}}_$element|PENDING|Priority|N/A|"; done ;;
  esac
done; true""",
        )
        command(
            site.folder / "bin",
            "scancel",
            f"""cd {self.folder}
[ -e silent ] && {{ echo "scancel: error: Unable to contact slurm controller (connect failure)" >&2; exit 1; }}
echo "$@" >> cancelled; for job; do rm -f "${{job%_*}}"; done""",
        )
        command(site.folder / "bin", "scontrol", "exit 1")
        site.environment["PATH"] = f"{site.folder / 'bin'}:/usr/bin:/bin"
        self.set(PAUSES_S="(0.1, 0.1, 0.2)", SECOND_LOOK_S="0.1", SBATCH_LIMIT_S="2.0", LAST_WORD_S="1.0")

    def set(self, **values: str) -> None:
        """Constants of the module under test."""
        module = self.site.package / "launch" / "handover.py"
        text = module.read_text()
        for name, value in values.items():
            text = re.sub(rf"^{name} = [^#\n]+", f"{name} = {value}  ", text, flags=re.MULTILINE)
        module.write_text(text)

    def behaves(self, *how: str) -> None:
        (self.folder / "behaves").write_text("\n".join(how) + "\n")

    @property
    def calls(self) -> int:
        return (self.folder / "calls").read_text().count("x")

    @property
    def looks(self) -> int:
        return (self.folder / "looks").read_text().count("x")

    @property
    def jobs(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("[0-9][0-9]"))

    @property
    def cancelled(self) -> list[str]:
        path = self.folder / "cancelled"
        return path.read_text().split() if path.exists() else []

    def silent(self, now: bool) -> None:
        (self.folder / "silent").touch() if now else (self.folder / "silent").unlink()

    def comes(self, number: str) -> None:
        """What was taken unseen is in the queue."""
        (self.folder / f"late-{number}").rename(self.folder / number)


@pytest.fixture
def queue(site: Site) -> Queue:
    return Queue(site)


def submit(queue: Queue, *options: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    return queue.site.cli("submit", queue.site.job(processes=1), "--cluster", "slurm", "--parsable", *options, code=code)


def only(site: Site) -> Run:
    [run] = runs.all_runs(site.runs)
    return run


def ids(run: Run) -> list[str]:
    return [row["job_id"] for row in run.jobs()]


def is_open(run: Run) -> bool:
    return (run.path / submission.FILE).exists()


def state(run: Run, site: Site) -> tuple[str, str | None, str | None]:
    row = site.status(run)
    return row["state"], row["job_id"], row["reason"]


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
    assert row["replaces"] == [first] and row["submission"] != first
    assert submission.enter(run, first, "77") == "it was submitted again, when nobody knew of this job"
    assert submission.enter(run, row["submission"], "79") == "job 80 of the same submission is known"
    assert submission.enter(run, row["submission"], "80") is None


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


def chained(queue: Queue, links: int = 2) -> str:
    path = queue.site.work / "chain.yaml"
    path.write_text(f"executor: slurm\nrequeue: false\nchain_links: {links}\n")
    return str(path)


def test_a_link_that_was_taken_without_a_word_is_adopted(site: Site, queue: Queue) -> None:
    queue.behaves("works", "takes", "works")
    submit(queue, "--cluster", chained(queue))
    run = only(site)
    assert [(row["job_id"], row.get("follows")) for row in run.jobs()] == [("77", None), ("78", "77"), ("79", "78")]
    assert (queue.calls, queue.jobs) == (3, ["77", "78", "79"])


def test_a_link_of_which_nobody_knows_leaves_the_run_as_it_is(site: Site, queue: Queue) -> None:
    queue.behaves("works", "loses")
    done = submit(queue, "--cluster", chained(queue))
    assert "only 0 of the 2 jobs that continue it: Slurm did not answer" in done.stderr and "refused" not in done.stderr
    run = only(site)
    assert ids(run) == ["77"] and is_open(run)
    assert state(run, site) == ("pending", "77", "Priority")


# ---- interruptions --------------------------------------------------------------------------------------------------------


def interrupted(site: Site, queue: Queue, number: int, *options: str) -> tuple[int, str]:
    child = site.start("submit", site.job(processes=1), "--cluster", "slurm", "--parsable", *options)
    eventually((queue.folder / "hanging").exists, 30)
    child.send_signal(number)
    _, err = child.communicate(timeout=60)
    assert "Traceback" not in err
    return child.returncode, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("options", [(), ("--seeds", "3")])
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
