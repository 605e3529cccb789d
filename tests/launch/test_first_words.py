"""Why a job ended, from its logs. The texts are what the programs print; tests/slurm/test_reasons.py has real jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from launch_site import run_with

from hpc_cifar.launch import first_words, status
from hpc_cifar.launch.policy import REMEDIES, Event

TRACEBACK = 'Traceback (most recent call last):\n  File "job.py", line 3, in <module>\n    import torch\n'
ENDED = (
    "srun: error: n1: task 0: Exited with exit code 1\n"
    "srun: Job step aborted: Waiting up to 32 seconds for job step to finish.\n"
    "slurmstepd: error: *** STEP 7.0 ON n1 CANCELLED AT 2026-01-01T00:00:00 ***\n"
)
LMOD = 'Lmod has detected the following error: The following module(s) are unknown:\n"cuda/99"\n\nPlease check the spelling.\n'
SETUP = "hpc-cifar: setup line 2 of profile mine ended the job with exit code 3: `exit 3`"
GOES_ON = "hpc-cifar: module load cuda/99 failed with exit code 1; the job goes on, since setup_may_fail is set\n"
PYTHONHOME = """\
Could not find platform independent libraries <prefix>
Python path configuration:
  PYTHONHOME = '/bad'
  PYTHONPATH = (not set)
Fatal Python error: init_fs_encoding: failed to get the Python codec of the filesystem encoding
Python runtime state: core initialized
ModuleNotFoundError: No module named 'encodings'

Current thread 0x00007f2 (most recent call first):
  <no Python frame>
"""
PYXIS = """\
slurmstepd: error: pyxis: child 12 failed with error code: 1
slurmstepd: error: pyxis: printing enroot log file:
slurmstepd: error: pyxis:     [INFO] Querying registry for permission grant
slurmstepd: error: pyxis:     [ERROR] URL https://registry returned error code: 401 Unauthorized
"""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ""),
        ("\n \n", ""),
        ("sh: 1: exec: /no/python: not found\n", "sh: 1: exec: /no/python: not found"),
        (
            "slurmstepd: error: execve(): /no/python: No such file or directory\n",
            "slurmstepd: error: execve(): /no/python: No such file or directory",
        ),
        (
            "/usr/bin/python3: Error while finding module specification for 'a.b' (ModuleNotFoundError: No module named 'a')\n",
            "/usr/bin/python3: Error while finding module specification for 'a.b' (ModuleNotFoundError: No module named 'a')",
        ),
        (TRACEBACK + "ModuleNotFoundError: No module named 'torch'\n", "ModuleNotFoundError: No module named 'torch'"),
        (
            TRACEBACK + "KeyError: 'a'\n\nDuring handling of the above exception, another exception occurred:\n\n"
            + TRACEBACK + "OSError: [Errno 122] Disk quota exceeded: '/home/x'\n",
            "OSError: [Errno 122] Disk quota exceeded: '/home/x'",
        ),
        (PYTHONHOME, "Fatal Python error: init_fs_encoding: failed to get the Python codec of the filesystem encoding "
         "(PYTHONHOME = '/bad')"),
        (LMOD, 'Lmod has detected the following error: The following module(s) are unknown: "cuda/99"'),
        (
            "Lmod has detected the following error: These module(s) or extension(s) exist\nbut cannot be loaded as requested: "
            '"quits/1.0"\n   Try: "module spider quits/1.0"\n\nmore\n',
            "Lmod has detected the following error: These module(s) or extension(s) exist but cannot be loaded as requested: "
            '"quits/1.0" Try: "module spider quits/1.0"',
        ),
        (
            "Lmod has detected the following error: /m/bad/1.0:\n(bad/1.0): no licence \nWhile processing the:",
            "Lmod has detected the following error: /m/bad/1.0: (bad/1.0): no licence",
        ),
        ("ERROR: Unable to locate a modulefile for 'cuda/99'\n", "ERROR: Unable to locate a modulefile for 'cuda/99'"),
        (
            "\nEnvironmentNameNotFound: Could not find conda environment: nope\nYou can list them.\n",
            "EnvironmentNameNotFound: Could not find conda environment: nope",
        ),
        (
            "\nCondaError: Run 'conda init' before 'conda activate'\n\n",
            "CondaError: Run 'conda init' before 'conda activate'",
        ),
        (
            "INFO:    a log of errors\nWARNING: no such thing\nFATAL:   could not open image /x.sif: no such file\n",
            "FATAL: could not open image /x.sif: no such file",
        ),
        (PYXIS, "slurmstepd: error: pyxis: [ERROR] URL https://registry returned error code: 401 Unauthorized"),
        ("/var/spool/slurmd/job00007/slurm_script: line 31: nvcc: command not found\n", "nvcc: command not found"),
        ("cp: error writing '/tmp/x': No space left on device\n", "cp: error writing '/tmp/x': No space left on device"),
        ("python: symbol lookup error: libfoo.so: undefined symbol: bar\n", "python: symbol lookup error: libfoo.so: "
         "undefined symbol: bar"),
        ("\x1b[31mFATAL:\x1b[0m no image\n", "FATAL: no image"),
        ("Loading the site's software\nDone, 0 errors.\nsee you\n", "see you"),
        ("slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-01-01T00:00:00 DUE TO TIME LIMIT ***\n",
         "Slurm ended the job due to time limit"),
        ("slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-01-01T00:00:00 DUE TO NODE FAILURE, SEE SLURMCTLD LOG ***\n",
         "Slurm ended the job due to node failure"),
        (ENDED, "srun: error: n1: task 0: Exited with exit code 1"),
        (f"{SETUP}\n", SETUP.removeprefix("hpc-cifar: ")),
        (
            "ls: cannot access '/x': No such file\nhpc-cifar: setup line 1 of profile mine failed with exit code 2: `ls /x`\n",
            "setup line 1 of profile mine failed with exit code 2: `ls /x`: ls: cannot access '/x': No such file",
        ),
        (GOES_ON, "module load cuda/99 failed with exit code 1"),
        (
            LMOD + GOES_ON + TRACEBACK + "ModuleNotFoundError: No module named 'torch'\n",
            "ModuleNotFoundError: No module named 'torch' (before that, module load cuda/99 failed with exit code 1)",
        ),
        (LMOD + GOES_ON + "all is well\n", "all is well (before that, module load cuda/99 failed with exit code 1)"),
        ("error: old\nhpc-cifar: start 1 of job 7 on n1\nerror: new\n", "error: new"),
        ("hpc-cifar: start 0 of job 7 on n1\nerror: new\n", "error: new"),
    ],
)  # fmt: skip
def test_what_programs_print(text: str, words: str) -> None:
    assert first_words.of_text(text) == words
    assert first_words.of_text(text + ENDED) == (words or first_words.of_text(ENDED)), "srun has the last line of every job"


def test_one_line_for_terminals_tables_and_reports() -> None:
    told = first_words.of_text("error: a\tb\x07 \u202egnp \x1b]0;title\x07wandb token=0123456789abcdef " + "x" * 5000)
    assert told.startswith("error: a b\\x07 \\u202egnp wandb token=*** xxx")
    assert len(told) == first_words.LONGEST and told.endswith("...") and told.isprintable()


def test_logs_of_many_gigabytes_are_read_at_both_ends(tmp_path: Path) -> None:
    log = tmp_path / "7_0_log.err"
    with log.open("wb") as stream:
        stream.write(b"hpc-cifar: start 0 of job 7 on n1\nerror: the first words\n")
        stream.seek(30 << 30)  # a hole
        stream.write(b"\nthe last\xff words\n")
    text = first_words.read(log)
    assert len(text) <= 2 * first_words.MOST_READ
    assert "the first words" in text and text.endswith("the last\ufffd words\n")
    assert first_words.read(log, (30 << 30) + 1) == "the last\ufffd words\n"
    assert first_words.read(tmp_path / "none") == ""
    log.write_text("0123456789\n" * 8000)
    assert first_words.read(log) == log.read_text()


def test_the_words_of_another_rank(tmp_path: Path) -> None:
    """The script's log tells that it ended; its own tells why."""
    (tmp_path / "7_0_log.err").write_text(ENDED.replace("task 0", "tasks 3-4"))
    (tmp_path / "7_0_log.out").write_text("submitit INFO (2026-01-01) - Starting with JobEnvironment(job_id=7)\n")
    (tmp_path / "7_3_log.err").write_text(TRACEBACK + "ImportError: libcudart.so.13\n")
    (tmp_path / "7_1_log.err").write_text("error: nobody asks for this one\n")
    found = first_words.of_job(tmp_path, "7")
    assert found == first_words.Words("ImportError: libcudart.so.13", tmp_path / "7_3_log.err")
    assert first_words.of_job(tmp_path, "8") is None


MEMORY = REMEDIES[Event.OUT_OF_MEMORY]


@pytest.mark.parametrize(
    ("text", "for_memory", "words"),
    [
        ("srun: error: n1: task 1: Out Of Memory\n", False, f"rank 1 on n1 was killed for memory: {MEMORY}"),
        (
            "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0.\nsrun: error: n1: task 1: Killed\n",
            False,
            f"rank 1 on n1 was killed for memory: {MEMORY}",
        ),
        (
            "srun: error: n1: task 1: Killed\n",
            False,
            f"rank 1 on n1 was killed by signal 9 (SIGKILL), usually for memory: {REMEDIES[Event.KILLED]}",
        ),
        ("", True, f"the job was killed for memory: {MEMORY}"),
    ],
)
def test_a_rank_that_was_killed(text: str, for_memory: bool, words: str, tmp_path: Path) -> None:
    (tmp_path / "7_0_log.err").write_text(text)
    found = first_words.of_job(tmp_path, "7", for_memory=for_memory)
    assert found is not None and (found.text, found.death) == (words, True)
    assert "resources.memory_gib_per_node" in found.text


def test_a_rank_that_srun_killed_because_another_one_failed(tmp_path: Path) -> None:
    (tmp_path / "7_0_log.err").write_text("ImportError: x\n" + ENDED + "srun: error: n1: task 1: Killed\n")
    found = first_words.of_job(tmp_path, "7")
    assert found is not None and (found.text, found.death) == ("ImportError: x", False)


START = "hpc-cifar: start 0 of job 7 on n1\n"
LOG = " (log: submitit/7_0_log.err)"


@pytest.mark.parametrize(
    ("squeue", "state", "log", "reason"),
    [
        ("7|FAILED|NonZeroExitCode", {}, "sh: 1: exec: /no/python: not found\n",
         f"the job ended before training began: sh: 1: exec: /no/python: not found{LOG}"),
        ("7|FAILED|NonZeroExitCode", {"step": 3}, "error: of the day\n", "Slurm: FAILED (NonZeroExitCode)"),
        ("7|FAILED|NonZeroExitCode", {"step": 3}, "Fatal Python error: Segmentation fault\n",
         f"the job ended: Fatal Python error: Segmentation fault{LOG}"),
        ("7|FAILED|NonZeroExitCode", {}, "", "Slurm: FAILED (NonZeroExitCode)"),
        ("7|FAILED|NonZeroExitCode", {"state": "failed", "reason": "why"}, "error: x\n", "why"),
        ("7|OUT_OF_MEMORY|OutOfMemory", {"step": 3}, "srun: error: n1: task 1: Out Of Memory\n",
         f"rank 1 on n1 was killed for memory: {REMEDIES[Event.OUT_OF_MEMORY]}{LOG}"),
        ("7|FAILED|NonZeroExitCode", {"step": 3}, "srun: error: n1: task 1: Killed\n",
         f"rank 1 on n1 was killed by signal 9 (SIGKILL), usually for memory: {REMEDIES[Event.KILLED]}{LOG}"),
        ("7|NODE_FAIL|NodeDown", {}, "Loading the site's software: error 3\n", "Slurm: NODE_FAIL (NodeDown)"),
        ("7|COMPLETED|None", {}, "hpc-cifar: setup line 1 of profile x ended the job with exit code 0: `exit 0`\n",
         "the job ended before training began: setup line 1 of profile x ended the job with exit code 0: `exit 0`" + LOG),
        ("", {}, "No module named submitit\n", f"the job ended before training began: No module named submitit{LOG}"),
        ("", {}, "", status.VANISHED),
        ("", {}, None, status.NEVER_STARTED),
    ],
)  # fmt: skip
def test_the_first_words_of_a_job_are_the_reason(
    tmp_path: Path, slurm_says: Any, squeue: str, state: dict[str, Any], log: str | None, reason: str
) -> None:
    """Slurm has often forgotten a job by the time somebody asks."""
    slurm_says(squeue, None)
    run = run_with(tmp_path / "runs", state={"state": "pending", **state})
    if log is not None:
        run.submitit.mkdir()
        (run.submitit / "7_0_log.err").write_text("error: of an earlier start\n" + START + log)
    seen = status.status(run)
    assert (seen.state, seen.reason) == ("failed", reason)
