"""Checkpoints on disk: whole, verified, pruned, and a fall-back over damage."""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpc_cifar.errors import CheckpointError
from hpc_cifar.models import tensors
from hpc_cifar.train import checkpoint


def state(value: float) -> dict[str, Any]:
    return {
        "model": {"w": torch.full((50,), value)},
        "position": {"step": int(value)},
        "history": [{"loss": value}],
        "none": None,
    }


def save(folder: Path, step: int, **options: Any) -> Path:
    return checkpoint.save(folder, state(float(step)), step=step, epoch=0, **options)


def test_round_trip(tmp_path: Path) -> None:
    save(tmp_path, 3, metrics={"val_loss": 1.5})
    saved, damaged = checkpoint.newest_good(tmp_path)
    assert saved is not None and saved.step == 3 and damaged == []
    loaded = checkpoint.read(saved)
    assert torch.equal(loaded["model"]["w"], torch.full((50,), 3.0))
    assert loaded["history"] == [{"loss": 3.0}] and loaded["none"] is None
    assert saved.manifest["metrics"] == {"val_loss": 1.5}


def test_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    for step in range(1, 8):
        save(tmp_path, step, best_step=min(step, 2), keep_last=3)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [f"step-{n:08d}" for n in (2, 5, 6, 7)]
    assert (tmp_path / "latest").readlink() == Path("step-00000007")
    assert (tmp_path / "best").readlink() == Path("step-00000002")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError(f"[enforce fail] {tensors.ALLOCATION}: you tried 9 bytes")])
def test_a_full_memory_does_not_make_a_checkpoint_a_damaged_one(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run would fall back to an older one, and set the good one aside."""
    save(tmp_path, 1)
    save(tmp_path, 2)

    def full(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patched, pytest.raises(type(error)):
        patched.setattr(torch, "load", full)
        checkpoint.newest_good(tmp_path)
    chosen, damaged = checkpoint.newest_good(tmp_path)
    assert chosen is not None and chosen.step == 2 and not damaged


def test_falling_back_puts_the_folder_in_the_order_of_that_time(tmp_path: Path) -> None:
    """The newer, damaged one was also the best; the best before it is still there, and is the best again."""
    for step, best in ((1, 1), (2, 1), (3, 3)):
        save(tmp_path, step, best_step=best)
    (tmp_path / "step-00000003" / "state.pt").write_bytes(b"")
    chosen, damaged = checkpoint.newest_good(tmp_path)
    assert chosen is not None and chosen.step == 2 and len(damaged) == 1
    assert checkpoint.settle(tmp_path, chosen)
    assert (tmp_path / "latest").readlink() == Path("step-00000002")
    assert (tmp_path / "best").readlink() == Path("step-00000001")
    (aside,) = tmp_path.glob("damaged-step-00000003-*")  # evidence is kept, until the next one
    assert (aside / "manifest.json").is_file()


def test_a_best_that_is_gone_is_said_and_no_link_dangles(tmp_path: Path) -> None:
    for step, best in ((1, 1), (2, 1), (3, 3)):
        save(tmp_path, step, best_step=best, keep_last=2)  # with 3 the best, 1 goes
    (tmp_path / "step-00000003" / "state.pt").unlink()
    chosen, _ = checkpoint.newest_good(tmp_path)
    assert chosen is not None and chosen.step == 2
    assert not checkpoint.settle(tmp_path, chosen)
    assert not (tmp_path / "best").is_symlink()


def test_killed_between_the_links_the_best_follows_the_state(tmp_path: Path) -> None:
    save(tmp_path, 1, best_step=1)
    save(tmp_path, 2, best_step=2)
    (tmp_path / "best").unlink()
    (tmp_path / "best").symlink_to("step-00000001")
    chosen, _ = checkpoint.newest_good(tmp_path)
    assert chosen is not None and checkpoint.settle(tmp_path, chosen)
    assert (tmp_path / "best").readlink() == Path("step-00000002")


def test_what_cannot_be_read_now_is_not_taken_for_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)

    def stale(path: Path) -> bytes:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "read_bytes", stale)
    with pytest.raises(CheckpointError, match="Stale file handle; nothing was changed, try again"):
        checkpoint.newest_good(tmp_path)
    assert len(list(tmp_path.glob("step-*"))) == 2


@pytest.mark.timeout(60)
def test_a_fifo_is_not_waited_for_and_a_file_without_end_not_read(tmp_path: Path) -> None:
    save(tmp_path, 1)
    fifo, endless = (save(tmp_path, step) / "state.pt" for step in (2, 3))
    fifo.unlink()
    os.mkfifo(fifo)
    os.truncate(endless, 2**43)
    saved, damaged = checkpoint.newest_good(tmp_path)
    assert saved is not None and saved.step == 1
    assert [line.partition(": ")[2] for line in damaged] == [
        f"{2**43} bytes, should be {checkpoint.stored(tmp_path)[0].manifest['bytes']}",
        "is not a regular file",
    ]


def test_another_format_is_refused_and_kept(tmp_path: Path) -> None:
    save(tmp_path, 1)
    manifest = save(tmp_path, 2) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(CheckpointError, match="format 2, this version reads 1"):
        checkpoint.newest_good(tmp_path)


def test_nothing_saved_is_a_fresh_start(tmp_path: Path) -> None:
    assert checkpoint.newest_good(tmp_path) == (None, [])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_altered_byte_or_length_is_noticed(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "checkpoints"
    save(folder, 1)
    save(folder, 2)
    path = folder / "step-00000002" / "state.pt"
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] ^= data.draw(st.integers(1, 255))
    else:
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    path.write_bytes(content)
    saved, damaged = checkpoint.newest_good(folder)
    assert saved is not None and saved.step == 1
    assert len(damaged) == 1 and "step-00000002" in damaged[0]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300))
def test_a_damaged_manifest_is_an_error_of_ours(tmp_path: Path, content: bytes) -> None:
    folder = tmp_path / "checkpoints"
    save(folder, 1)
    (folder / "step-00000001" / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json|step-00000001"):
        checkpoint.newest_good(folder)


@pytest.mark.parametrize(
    "manifest", [[], {"step": 1}, {"step": 1, "format": 1, "bytes": "x"}, {"step": True}, {"step": 1, "format": 99}]
)
def test_a_manifest_of_another_shape_is_an_error_of_ours(tmp_path: Path, manifest: Any) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-00000001" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError):
        checkpoint.newest_good(tmp_path)


def test_all_damaged_is_refused_and_each_is_named(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
        (tmp_path / f"step-{step:08d}" / "state.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint of this run can be used") as caught:
        checkpoint.newest_good(tmp_path)
    assert "step-00000001" in str(caught.value) and "step-00000002" in str(caught.value)


class Evil:
    def __reduce__(self) -> Any:
        return (os.system, ("touch pwned",))


def test_a_pickle_with_code_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint.save(tmp_path, {"model": Evil()}, step=1, epoch=0)
    saved = checkpoint.named(tmp_path, "latest")
    assert saved is not None
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        checkpoint.read(saved)
    (saved.folder / "state.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError):
        checkpoint.read(saved)
    assert not (tmp_path / "pwned").exists()


def test_full_disk_is_one_line_and_leaves_the_old_one(tmp_path: Path) -> None:
    """A child whose files may not grow past 200 kB (RLIMIT_FSIZE; the real full disk is a tmpfs in the slow tests)."""
    save(tmp_path, 1)
    program = f"""
import resource, signal, torch
from pathlib import Path
from hpc_cifar.errors import CheckpointError
from hpc_cifar.train import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    checkpoint.save(Path({str(tmp_path)!r}), {{"w": torch.zeros(100_000)}}, step=2, epoch=0)
except CheckpointError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "step-00000002: cannot save the checkpoint: File too large" in done.stdout
    assert [path.name for path in tmp_path.iterdir() if "step" in path.name] == ["step-00000001"]
    assert (tmp_path / "latest").readlink() == Path("step-00000001")


@pytest.mark.slow
def test_killed_while_saving_leaves_whole_checkpoints_only(tmp_path: Path) -> None:
    program = f"""
import itertools, torch
from pathlib import Path
from hpc_cifar.train import checkpoint
for step in itertools.count(1):
    checkpoint.save(Path({str(tmp_path)!r}), {{"w": torch.full((200_000,), float(step))}}, step=step, epoch=0)
    print(step, flush=True)
"""
    for delay in (0.01, 0.02, 0.035):
        child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        finished = [int(line) for line in child.stdout.read().split()] or [1]
        child.wait()
        saved, damaged = checkpoint.newest_good(tmp_path)
        assert saved is not None and damaged == []
        assert saved.step >= finished[-1]
        assert float(checkpoint.read(saved)["w"][0]) == saved.step
