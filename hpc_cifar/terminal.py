"""What reaches a terminal: text from files, archives, servers and Slurm is shown, never obeyed; and an output that has gone.

All that a command prints goes through :class:`Guarded`, which :func:`guard` puts in the place of standard output and standard
error: nothing that calls ``print`` need think of it. What the package itself draws is written by :func:`draw` or a
:func:`console`.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    from rich.console import Console

# controls (C0 but for tab and line feed, DEL, C1), what reorders or hides text, line separators, halves of surrogates, tags
_OBEYED = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    r"\U000e0000-\U000e0fff]"
)
_COLOURS = re.compile(r"\x1b\[[0-9;:]{0,64}m")


def escaped(text: str) -> str:
    """``text`` with what a terminal would obey as ``\\x1b`` or ``\\u202e``; lines and tabs stay."""
    if text.isprintable():
        return text
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape", "backslashreplace").decode("ascii"), text)


def one_line(text: str) -> str:
    """:func:`escaped`, with blanks for the ends of lines and tabs: for a value within a line or a table."""
    return escaped(re.sub(r"\r\n|[\n\t\r]", " ", text))


def of_log(text: str) -> str:
    """A log for a terminal: without colours, a line that was written over (``\\r``) as lines, all else :func:`escaped`."""
    return escaped(re.sub(r"\r+\n?", "\n", _COLOURS.sub("", text)))


class Guarded:
    """A stream of text that escapes what it is given, and outlives its reader or its disk.

    A write that fails breaks nothing off: ``lost`` is the error then, and the rest goes nowhere.

    Args:
        keeps_going: also when the reader has gone (``| head``); else that raises ``BrokenPipeError``, which ends the command.
    """

    def __init__(self, stream: TextIO, keeps_going: bool) -> None:
        self._stream, self._keeps_going = stream, keeps_going
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        self.drawn(escaped(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def drawn(self, text: str) -> int:
        """Write text of the package's own, with control characters."""
        with self._losing():
            try:
                self._stream.write(text)
            except UnicodeEncodeError:  # a terminal that is not UTF-8
                code = self._stream.encoding or "ascii"
                self._stream.write(text.encode(code, "backslashreplace").decode(code))
        return len(text)

    def flush(self) -> None:
        with self._losing():
            self._stream.flush()

    @contextlib.contextmanager
    def _losing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: it has been closed
            if isinstance(error, UnicodeError):
                raise
            self.lost = error if isinstance(error, OSError) else OSError(str(error))
            with contextlib.suppress(OSError, ValueError):  # what is still in the buffer must not fail again at the end
                sink = os.open(os.devnull, os.O_WRONLY)
                os.dup2(sink, self._stream.fileno())
                os.close(sink)
            if isinstance(error, BrokenPipeError) and not self._keeps_going:
                raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Drawing:
    """The stream of a :func:`console`, which escapes texts itself and whose own sequences stay."""

    def __init__(self, name: str) -> None:
        self._name = name

    def write(self, text: str) -> int:
        stream = getattr(sys, self._name)
        stream = getattr(stream, "rich_proxied_file", stream)  # while a bar is shown
        return cast(int, getattr(stream, "drawn", stream.write)(text))

    def __getattr__(self, name: str) -> Any:
        if name == "rich_proxied_file":  # by which Rich would write past this while a bar is shown
            raise AttributeError(name)
        return getattr(getattr(sys, self._name), name)


def console(*, stderr: bool = False) -> Console:
    """Rich's console for progress bars, on a guarded stream; what it prints is escaped, what it draws is not."""
    from rich.console import Console
    from rich.text import Text

    class Escaping(Console):
        def print(self, *objects: Any, **options: Any) -> None:
            for one in objects:
                if isinstance(one, Text):
                    one.plain = escaped(one.plain)
            super().print(*(escaped(one) if isinstance(one, str) else one for one in objects), **options)

    return Escaping(file=cast(TextIO, _Drawing("stderr" if stderr else "stdout")))


def open_missing() -> None:
    """Give a process whose standard streams are closed (``>&-``) some that lead nowhere.

    Else the next file that is opened gets their number, and what a library prints.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def guard(*, keeps_going: bool) -> tuple[Guarded, Guarded]:
    """Guard standard output and standard error from now on."""
    open_missing()
    made = Guarded(_bare(sys.stdout), keeps_going), Guarded(_bare(sys.stderr), True)
    sys.stdout, sys.stderr = cast(TextIO, made[0]), cast(TextIO, made[1])
    return made


def _bare(stream: TextIO) -> TextIO:
    return stream._stream if isinstance(stream, Guarded) else stream


@contextlib.contextmanager
def guarded(*, keeps_going: bool) -> Iterator[Guarded]:
    """:func:`guard` standard output and standard error for a while; gives the first."""
    open_missing()
    before = sys.stdout, sys.stderr
    out, _ = guard(keeps_going=keeps_going)
    try:
        yield out
    finally:
        sys.stdout, sys.stderr = before


def end_if_nobody_reads() -> None:
    """For what only watches: raise ``BrokenPipeError`` once the reader of standard output has gone."""
    lost = getattr(sys.stdout, "lost", None)
    if isinstance(lost, BrokenPipeError):
        raise lost


def draw(text: str) -> None:
    """Print control characters of the package's own, such as those that move the cursor."""
    _Drawing("stdout").write(text)
    sys.stdout.flush()
