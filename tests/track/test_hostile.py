"""A W&B server that answers without end, in huge headers, in circles or in HTML: the memory of the upload stays bounded."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from mirrored import a_run, assert_whole, is_oldest_client, sync, train
from wandb_server import ENDLESS, HANG, HEADERS, HTML, REDIRECT, Server, until

from hpc_cifar import processes
from hpc_cifar.track import companion, identity

pytestmark = [pytest.mark.component("wandb"), pytest.mark.slow]

MIB = 2**20
BOUND = 1024 * MIB  # of process and service together, as docs/tracking.md says
TOO_MUCH = 3 * BOUND  # at which a test that fails ends the processes, before they hurt its machine
EVERYWHERE = ""
PLACES = {"endless": ("UpsertBucket", "file_stream", "RunResumeStatus", EVERYWHERE), "headers": ("file_stream",)}
PLACES |= {"redirects": ("file_stream",), "html": ("UpsertBucket", "file_stream")}
KINDS = {"endless": ENDLESS, "headers": HEADERS, "redirects": REDIRECT, "html": HTML}


@dataclass
class Seen:
    """The process beside a training, watched from outside; bytes, seconds."""

    code: int = 0
    said: str = ""
    seconds: float = 0.0
    most: int = 0
    scores: set[int] = field(default_factory=set)  # oom_score_adj of process and service


def resident(pid: int) -> int:
    """Bytes in memory, those of files included."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


UNWATCHED = """
import runpy
from hpc_cifar.track import bounds
bounds.LOOK_S = 3600
runpy.run_module("hpc_cifar", run_name="__main__")
"""


def beside(run: Path, server: Server, ends_after_s: float, watched: bool = True) -> Seen:
    """Play rank 0, which ends after some seconds."""
    begin = ["-m", "hpc_cifar"] if watched else ["-c", UNWATCHED]
    command = [sys.executable, *begin, "sync", str(run), "--beside"]
    child = subprocess.Popen(
        command, env={**os.environ, **server.environment}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )  # fmt: skip
    assert child.stdin is not None and child.stderr is not None
    began, seen = time.monotonic(), Seen()
    known: set[int] = set()
    while child.poll() is None:
        family = processes.descendants(child.pid)
        seen.most = max(seen.most, sum(map(resident, [child.pid, *family])))
        seen.seconds = time.monotonic() - began
        for pid in family:
            score = Path(f"/proc/{pid}/oom_score_adj")
            if pid not in known and score.exists() and "wandb-core" in Path(f"/proc/{pid}/comm").read_text():
                known.add(pid)
                seen.scores |= {int(path.read_text()) for path in (score, Path(f"/proc/{child.pid}/oom_score_adj"))}
        if seen.seconds > ends_after_s and not child.stdin.closed:
            child.stdin.close()
        if seen.most > TOO_MUCH or seen.seconds > 100:
            processes.end_family(child.pid)
        time.sleep(0.02)
    seen.code, seen.said = child.wait(), child.stderr.read().decode()
    return seen


@pytest.mark.parametrize(("kind", "where"), [(kind, where) for kind, places in PLACES.items() for where in places])
def test_no_answer_takes_the_memory_of_a_job(server: Server, tmp_path: Path, kind: str, where: str) -> None:
    run = a_run(tmp_path)
    train(run, 0, 30, ended="finished")
    server.trouble = lambda what, number: KINDS[kind] if what.endswith(where) else None
    seen = beside(run.path, server, 8)
    print(f"{kind} in {where}: at most {seen.most / MIB:.0f} MiB, {seen.seconds:.1f} s\n{seen.said}")
    assert seen.most < BOUND, f"{seen.most / MIB:.0f} MiB"
    assert seen.code == 1 and seen.scores == {1000}
    ended = [line for line in seen.said.splitlines() if line.startswith("W&B: the upload took more than ")]
    assert len(ended) == (kind == "endless") and (not ended or f"hpc-cifar sync {run.id} uploads later" in ended[0])
    assert "\x1b" not in seen.said and "\x07" not in seen.said and "Traceback" not in seen.said
    server.trouble = lambda what, number: None
    sync(run, server)
    assert_whole(server, run, 30)


@pytest.mark.parametrize("wanted", ["false", "true"])
def test_what_the_client_reports_to_its_makers_costs_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    """It is switched off; where a user wants it, an answer to it is bounded, too: it is read as the process ends."""
    run = a_run(tmp_path)
    train(run, 0, 30, ended="finished")
    asked: list[str] = []

    def trouble(what: str, number: int) -> int | None:
        asked.append(what)
        return ENDLESS if "/otel/" in what else None

    server.trouble = trouble
    monkeypatch.setenv("WANDB_ERROR_REPORTING", wanted)
    seen = beside(run.path, server, 1)
    assert any("/otel/" in what for what in asked) == (wanted == "true" and not is_oldest_client())
    assert seen.most < BOUND and seen.code == 0, seen
    assert_whole(server, run, 30)


@pytest.mark.parametrize("where", PLACES["endless"])
def test_on_a_machine_too_busy_to_look_the_kernel_bounds_it(server: Server, tmp_path: Path, where: str) -> None:
    run = a_run(tmp_path)
    train(run, 0, 30, ended="finished")
    server.trouble = lambda what, number: ENDLESS if what.endswith(where) else None
    seen = beside(run.path, server, 8, watched=False)
    print(f"endless in {where}: at most {seen.most / MIB:.0f} MiB, {seen.seconds:.1f} s\n{seen.said}")
    assert seen.most < BOUND, f"{seen.most / MIB:.0f} MiB"
    assert seen.code == 1 and "goroutine" not in seen.said and len(seen.said.splitlines()) < 10
    assert "W&B: the upload took more than " in seen.said
    server.trouble = lambda what, number: None
    sync(run, server)
    assert_whole(server, run, 30)


def test_a_service_does_not_outlive_the_patience_of_rank_0(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has a session of its own, and nobody would watch it any more."""
    run = a_run(tmp_path)
    train(run, 0, 10)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(companion, "FINISH_S", 1.0)
    said: list[str] = []
    upload = companion.Companions(run, run.experiment().tracking, said.append)
    until(lambda: identity.url_of(run))
    [beside_it] = upload._all
    assert beside_it.process is not None
    family = [processes.identity(pid) for pid in processes.descendants(beside_it.process.pid)]
    assert len(family) >= 1 and all(map(processes.is_alive, family))
    server.trouble = lambda what, number: HANG
    train(run, 10, 20, ended="finished")
    upload.finish()
    assert said == [f"W&B has not got everything: hpc-cifar sync {run.id} uploads the rest"]
    assert not any(map(processes.is_alive, family))
