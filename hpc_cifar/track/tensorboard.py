"""A run directory's mirror in TensorBoard: event files in its folder ``tensorboard``, by TensorBoard's own writer and reader.

A row is one record with all its figures, so it is there or it is not; what is there is what the reader finds whole. Whoever
goes on, after whatever end, begins a new file, behind all others by its name, and leaves a torn record of a killed writer where
it is: TensorBoard passes over it as well. Source: tensorboard 2.21, whose readers stop at a record that is not whole and go on
with the next file, by name.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import json
import os
import re
import socket
import stat
import struct
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .. import owner
from ..config.difference import flat
from ..config.experiment import Tracking
from ..errors import HpcCifarError, TrackingError, first_line
from ..reading import is_regular, read_bytes
from ..records import RunState
from ..runs import Run
from . import summary
from .tracker import Rows, figures

TITLE, FOLDER = "TensorBoard", "tensorboard"
GET = "pip install 'hpc-cifar[tensorboard]'"
NAME = re.compile(r"events\.out\.tfevents\.(\d{10})\..*")
VERSION = "brain.Event:2"
LARGEST = 16 << 20  # bytes of a picture
PNG = b"\x89PNG\r\n\x1a\n"
ENDED = ("finished", "stopped", "failed")


def problem(run: Run | None) -> str:
    """See :class:`tracker.Tracker`."""
    found = importlib.util.find_spec("tensorboard")
    there = found is not None and found.origin is not None  # else a folder of that name, such as a run's
    return "" if there else f"TensorBoard: its package is not installed ({GET})"


def begins(run: Run, tracking: Tracking, say: Callable[[str], None]) -> bool:
    """See :class:`tracker.Tracker`."""
    if words := problem(run):
        say(f"{words}; hpc-cifar sync {run.id} --to {FOLDER} writes later")
    return not words


@contextlib.contextmanager
def opened(run: Run, say: Callable[[str], None], beside: bool) -> Iterator[EventFiles]:
    """See :class:`tracker.Tracker`."""
    mirror = None
    try:
        library()
        mirror = EventFiles(run)
        yield mirror
    except HpcCifarError:
        raise
    except Exception as error:  # of a disk, or of whatever version of the package is installed
        raise TrackingError(f"TensorBoard: {run.path / FOLDER}: {first_line(error)}") from None
    finally:
        if mirror is not None:
            mirror.close()


def library() -> None:
    """Import what is used, without tensorflow, which is slow where it is installed: the package looks for such a module.

    Raises:
        Exception: whatever is wrong with the package, or with what it imports.
    """
    sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf"))
    for name in ("backend.event_processing.event_file_loader", "summary.writer.record_writer", "plugins.hparams.summary_v2"):
        importlib.import_module(f"tensorboard.{name}")


class EventFiles:
    """A run that is open: a file is begun with the first record that is not there yet.

    What a record is, says the ``node_name`` of its first value, which TensorBoard does not show: the number of a row, or words.
    """

    def __init__(self, run: Run) -> None:
        self._run, self._folder = run, run.path / FOLDER
        self._there: set[str] = set()  # records that are no rows
        self._stream: Any = None
        self._writer: Any = None
        self.taken = self._step = 0
        self._stamp = int(time.time())
        owned = (owner.uid(), owner.of(run.path))
        with contextlib.suppress(FileExistsError):
            self._folder.mkdir(0o700)
            self._give(self._folder)
        facts = self._folder.lstat()
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid not in owned:
            raise TrackingError(f"TensorBoard: {self._folder} is no folder of this run; remove it")
        for path in sorted(self._folder.iterdir()):
            if found := NAME.fullmatch(path.name):
                self._stamp = max(self._stamp, int(found[1]) + 1)
                if is_regular(path):
                    self._read(path)

    def _read(self, path: Path) -> None:
        """Note what is whole in a file."""
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

        try:
            for event in LegacyEventFileLoader(str(path)).Load():
                key = event.summary.value[0].node_name if event.summary.value else ""
                self._step = max(self._step, event.step)
                if key.isdecimal():
                    self.taken = max(self.taken, int(key) + 1)
                elif key:
                    self._there.add(key)
        except Exception:  # no file of ours, or damaged: what is whole before that counts
            pass

    def push(self, rows: Rows) -> None:
        """Write rows, and what else is not there yet; to the kernel, so that it outlives this process."""
        try:
            if "experiment" not in self._there:
                self._write_experiment()
            for number, row in rows.new:
                values = figures(row) | ({"epoch": row["epoch"]} if row["kind"] == "epoch" else {})
                self._step = max(self._step, row["step"])
                self._write(str(number), row["step"], _scalars(values), row.get("time"))
                self.taken = number + 1
            self._write_pictures()
            if self._stream is not None:
                self._stream.flush()
        except OSError as error:
            raise TrackingError(f"TensorBoard: {self._folder}: cannot be written: {error.strerror or error}") from None

    def finish(self, rows: Rows, state: RunState, left: bool) -> None:
        """Write the rest; of a run that has ended its hyper-parameters and final figures, too, for the tab HPARAMS."""
        self.push(rows)
        if state.state in ENDED:
            self._write_outcome(rows, state)
        try:
            if self._stream is not None:
                self._stream.flush()
                os.fsync(self._stream.fileno())
        except OSError as error:
            raise TrackingError(f"TensorBoard: {self._folder}: cannot be written: {error.strerror or error}") from None

    def close(self) -> None:
        """Let go of the file, on a full disk too."""
        stream, self._stream = self._stream, None
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()

    def _write(self, key: str, step: int, values: list[Any], at: float | None = None) -> None:
        """One record; without values there is none."""
        from tensorboard.compat.proto import event_pb2, summary_pb2

        if not values:
            return
        values[0].node_name = key
        event = event_pb2.Event(wall_time=at or time.time(), step=step, summary=summary_pb2.Summary(value=values))
        self._begun().write(event.SerializeToString())
        if not key.isdecimal():
            self._there.add(key)

    def _begun(self) -> Any:
        """The writer of a file of its own; no link is followed."""
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        if self._writer is None:
            name = f"events.out.tfevents.{self._stamp:010d}.{socket.gethostname()}.{os.getpid()}.0"
            folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                self._stream = os.fdopen(os.open(name, flags, 0o600, dir_fd=folder), "wb")
            finally:
                os.close(folder)
            self._give(self._stream.fileno())
            self._writer = RecordWriter(self._stream)
            self._writer.write(event_pb2.Event(wall_time=time.time(), file_version=VERSION).SerializeToString())
        return self._writer

    def _give(self, made: Path | int) -> None:
        """What root makes in somebody's run is theirs."""
        if (whose := owner.of(self._run.path)) != owner.uid():
            with contextlib.suppress(OSError):
                os.chown(made, whose, -1)

    def _write_experiment(self) -> None:
        from tensorboard.plugins.text.summary_v2 import text_pb

        text = f"```yaml\n{read_bytes(self._run.experiment_file).decode()}\n```"
        self._write("experiment", 0, list(text_pb("experiment", text).value))

    def _write_pictures(self) -> None:
        """Those of ``evaluate``, each once."""
        from tensorboard.compat.proto import summary_pb2

        for path in sorted((self._run.path / "evaluation").glob("*/*.png")):
            if not is_regular(path) or not len(PNG) < path.stat().st_size <= LARGEST:
                continue
            data = path.read_bytes()
            key = f"picture {path.parent.name}/{path.name} {hashlib.sha256(data).hexdigest()}"
            if key in self._there or not data.startswith(PNG) or len(data) < 24:
                continue
            width, height = struct.unpack(">II", data[16:24])
            image = summary_pb2.Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=data)
            tag = f"evaluation/{path.parent.name}-{path.stem}"
            self._write(key, self._step, [summary_pb2.Summary.Value(tag=tag, image=image)])

    def _write_outcome(self, rows: Rows, state: RunState) -> None:
        """Hyper-parameters and final figures, again when they have changed."""
        from tensorboard.compat.proto import summary_pb2
        from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb

        chosen = self._run.experiment().model_dump(mode="json", exclude=set(summary.NO_HYPER_PARAMETERS))
        parameters = {name: _plain(value) for name, value in flat(chosen).items() if name and value is not None}
        final = {f"result/{name}": value for name, value in flat(summary.outcome(self._run, rows.epochs)).items()}
        told = json.dumps([parameters, final, state.state], sort_keys=True)
        key = f"outcome {hashlib.sha256(told.encode()).hexdigest()}"
        if key in self._there:
            return
        values = [*hparams_pb(parameters, trial_id=self._run.id).value, *_scalars(final)]
        if state.state == "finished":
            info = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time())
            about = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(session_end_info=info))
            end = {"tag": metadata.SESSION_END_INFO_TAG, "metadata": about, "tensor": metadata.NULL_TENSOR}
            values.append(summary_pb2.Summary.Value(**end))
        self._write(key, self._step, values)


def _scalars(values: dict[str, Any]) -> list[Any]:
    from tensorboard.compat.proto import summary_pb2

    numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
    return [summary_pb2.Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]


def _plain(value: Any) -> bool | float | str:
    """A hyper-parameter as TensorBoard takes it; a list, such as that of layers, as text."""
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)
