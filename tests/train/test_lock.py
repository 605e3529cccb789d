"""Who has the lock of a run, who waits for it, and who is sent away."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch

from hpc_cifar import files, records
from hpc_cifar.errors import LockHeld, RunBusy
from hpc_cifar.records import Holder
from hpc_cifar.runs import Run
from hpc_cifar.train import lock
from hpc_cifar.train.distributed import World
from hpc_cifar.train.lock import RunLock, is_earlier, is_held_by_another
from hpc_cifar.train.stop import StopFlag

ALONE = World(0, 1, 0, 1, torch.device("cpu"), None)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Its times are short: a heartbeat every 0.1 s."""
    for name, seconds in (("BEAT_S", 0.1), ("WATCH_S", 2.0), ("POLL_S", 0.02)):
        monkeypatch.setattr(lock, name, seconds)
    return Run(tmp_path)


def locked(run: Run, job: str, flag: StopFlag | None = None) -> RunLock:
    return RunLock(run, ALONE, flag or StopFlag(), job, job, console=True)


@contextlib.contextmanager
def taken(run: Run, job: str = "7.0") -> Iterator[None]:
    """The lock of a node that has crashed: the file server keeps it, and nobody renews the heartbeat."""
    (run.path / ".lock").write_text("process 26378 on n1\n")
    files.write_json(run.path / ".holder.json", {"job": job, "segment": job, "host": "n1", "pid": 26378})
    with (run.path / ".lock").open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def beating(run: Run) -> Iterator[None]:
    """Somebody renews it, by a clock that is a day behind."""
    end = threading.Event()

    def beat() -> None:
        at = time.time() - 86_400
        while not end.wait(0.1):
            at += 0.1
            os.utime(run.path / ".holder.json", (at, at))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def test_the_holder_says_who_it_is_and_beats(run: Run) -> None:
    with locked(run, "7.2"):
        who = files.read_json(run.path / ".holder.json")
        assert isinstance(who, dict) and (who["job"], who["segment"], who["pid"]) == ("7.2", "7.2", os.getpid())
        assert (who["host"], who["pid_started"] > 0) == (os.uname().nodename, True)
        assert (run.path / ".lock").read_text() == f"process {os.getpid()} on {os.uname().nodename}\n"
        before, deadline = lock.Beat.read(run.path), time.monotonic() + 10
        while lock.Beat.read(run.path) == before:
            assert time.monotonic() < deadline, "no heartbeat"
        assert is_held_by_another(run, "8.0")
    assert not (run.path / ".holder.json").exists() and not is_held_by_another(run, "8.0")


def test_another_job_that_trains_is_told_as_soon_as_it_is_seen_to_live(run: Run) -> None:
    with locked(run, "7.0"):
        began = time.monotonic()
        with pytest.raises(RunBusy, match=r"trained already, by process \d+ on .*; wait for it or cancel it$"):
            locked(run, "8.0").__enter__()
        assert time.monotonic() - began < lock.WATCH_S


def test_another_job_whose_heartbeat_stays_the_same_is_not_passed_either(run: Run) -> None:
    with taken(run), pytest.raises(RunBusy, match=r"by process 26378 on n1; .* \(its heartbeat does not move"):
        locked(run, "8.0").__enter__()
    (run.path / ".holder.json").unlink()  # of an older version
    with (run.path / ".lock").open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(RunBusy, match="by process 26378 on n1; "):
            locked(run, "7.1").__enter__()


def test_a_restart_waits_for_its_earlier_segment(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Any] = []
    with contextlib.ExitStack() as held:
        held.enter_context(taken(run))
        assert not is_held_by_another(run, "7.1")

        def free() -> None:
            while (said := files.read_json(run.path / "waits.json")) is None:
                time.sleep(0.01)
            seen.append(said)
            time.sleep(1.5 * lock.WATCH_S)
            held.close()

        thread = threading.Thread(target=free)
        thread.start()
        with locked(run, "7.1") as mine:
            assert mine.asked == "" and is_held_by_another(run, "8.0")
        thread.join()
    words = "waits for the lock of its earlier segment on n1 (process 26378)"
    assert seen == [{"job": "7", "reason": words}] and not (run.path / "waits.json").exists()
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith(words) and last.startswith("waited ") and last.endswith(" s for the lock")


def test_after_the_limit_it_goes_back_to_the_queue_and_passes_nobody(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(lock.VARIABLE, "3")
    with taken(run):
        with pytest.raises(LockHeld, match="earlier segment, process 26378 on n1, after 3 s"):
            locked(run, "7.1").__enter__()
        assert not (run.path / "waits.json").exists()
        with beating(run), pytest.raises(RunBusy, match=r"process 26378 on n1; wait for it or cancel it$"):
            locked(run, "7.1").__enter__()


def test_a_signal_ends_the_wait(run: Run) -> None:
    flag = StopFlag()
    with taken(run), flag:
        timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR2))
        timer.start()
        with locked(run, "7.1", flag) as mine:
            assert mine.asked == "preempted"
        timer.join()
        assert not (run.path / "waits.json").exists()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_the_heartbeat_tells(run: Run, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    with locked(run, "1.0"):
        pass
    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setenv(lock.VARIABLE, "3")
    began = time.monotonic()
    with locked(run, "7.0"):
        assert time.monotonic() - began < lock.WATCH_S, "nobody was there"
        for job, error in (("8.0", RunBusy), ("7.1", RunBusy)):
            with pytest.raises(error, match="trained already"):
                locked(run, job).__enter__()
        assert (run.path / ".lock").read_text() == f"process {os.getpid()} on {os.uname().nodename}\n"
    for job in ("7.1", "8.0"):
        files.write_json(run.path / ".holder.json", {"job": "7.0", "host": "n1", "pid": 1})
        os.utime(run.path / ".holder.json", (2e9, 2e9))  # by its node's clock in the future
        with locked(run, job) as mine:
            assert mine.asked == ""


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("left", [True, False])
def test_without_locks_one_of_two_hosts_that_begin_at_once_trains(
    run: Run, monkeypatch: pytest.MonkeyPatch, left: bool, links: bool
) -> None:
    """Each has seen that nobody beats before the other says that it trains; ``left`` is what a killed one has left."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    hosts = 4
    here, results = threading.Barrier(hosts), list[str]()
    if left:
        files.write_json(run.path / ".holder.json", {"job": "3.0", "segment": "3.0", "host": "n9", "pid": 1})
    looked = lock.RunLock._lock

    def together(self: RunLock, *, free_without_locks: bool) -> bool:
        if free_without_locks and not here.broken:
            with contextlib.suppress(threading.BrokenBarrierError):
                here.wait(10)
                here.abort()
        return looked(self, free_without_locks=free_without_locks)

    monkeypatch.setattr(RunLock, "_lock", together)
    done = threading.Event()

    def host(job: str) -> None:
        try:
            with locked(run, job):
                results.append("trains")
                done.wait(30)
        except RunBusy:
            results.append("busy")

    threads = [threading.Thread(target=host, args=(f"{7 + number}.0",)) for number in range(hosts)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    while len(results) < hosts and time.monotonic() < deadline:
        time.sleep(0.05)
    assert is_held_by_another(run, "99.0")
    done.set()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["busy"] * (hosts - 1) + ["trains"], results
    assert not is_held_by_another(run, "99.0")
    assert [path.name for path in run.path.glob(".holder*")] == []


def test_which_holders_are_earlier_segments(run: Run) -> None:
    for name in ("train-ab", "5_1", "6"):
        run.add_job(job_id=name)
    earlier = [
        ("7.1", {"job": "7.0"}), ("7_2.10", {"job": "7_2.9"}), ("6.0", {"job": "5_1.3"}), ("6.0", {"segment": "train-ab"}),
    ]  # fmt: skip
    assert all(is_earlier(run, job, records.row_of(Holder, holder, "")) for job, holder in earlier)
    others = [
        ("7.1", {"job": "7.1"}), ("7.1", {"job": "7.2"}), ("7_1.1", {"job": "7_2.0"}), ("8.0", {"job": "7.0"}),
        ("5_1.0", {"job": "6.0"}), (".1", {"job": ".0"}), ("ab", {"job": "ab"}), ("6.1", {}), ("6.1", {"job": 3}),
    ]  # fmt: skip
    assert not any(is_earlier(run, job, records.row_of(Holder, holder, "")) for job, holder in others)


@pytest.mark.slow
def test_ranks_wait_together_and_hear_signals(tmp_path: Path, digits_data: Path) -> None:
    """A killed job, whose lock another process has at once, as a file server would."""
    made = ranks.new_run(tmp_path, ranks.experiment(epochs=2))
    first = ranks.start(made, digits_data, 2, environment={"SEGMENT": "7.0"})
    ranks.wait_for_step(made, 1, first)
    with (made.path / ".lock").open("a") as stream:
        ranks.kill_all(first)
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert (made.path / ".holder.json").exists()
        second = ranks.start(made, digits_data, 2, environment={"SEGMENT": "7.1"})
        ranks.eventually(lambda: (made.path / "waits.json").exists(), second, made)
        second[1].send_signal(signal.SIGTERM)
        assert ranks.finish(second) == [0, 0], ranks.logs(made)
        assert (made.state().state, made.state().reason) == ("stopped", "terminated")
        third = ranks.start(made, digits_data, 2, environment={"SEGMENT": "7.2"})
        ranks.eventually(lambda: (made.path / "waits.json").exists(), third, made)
    assert ranks.finish(third) == [0, 0], ranks.logs(made)
    assert files.read_object(made.result_file)["state"] == "finished"
    said = (made.path / "rank-0.log").read_text()
    assert said.count("waits for the lock of its earlier segment") == 2 and "s for the lock" in said
