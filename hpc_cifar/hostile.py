"""Pickles that somebody else may have written: looked through before they are opened, so that none asks for time or memory.

What classes a pickle may name is for its reader to say; this module is about the rest. A few bytes can ask for gigabytes (a
length, a place in the memo), a megabyte of one-byte instructions for a hundred times that, and a tuple of tuples of itself as a
key of a dictionary for years.
"""

from __future__ import annotations

import pickle
import pickletools
from typing import IO, Any, ClassVar

MOST_INSTRUCTIONS = 2_000_000  # of one pickle; the training batch of CIFAR-100 has about 400,000
_NEEDLESS = (
    "INST", "OBJ", "DUP", "EMPTY_SET", "ADDITEMS", "FROZENSET", "EXT1", "EXT2", "EXT4", "NEWOBJ_EX", "NEXT_BUFFER",
    "READONLY_BUFFER", "PERSID",
)  # fmt: skip


def look_through(stream: IO[bytes]) -> None:
    """Read one pickle from ``stream`` without doing what it says.

    Raises:
        pickle.UnpicklingError: it is truncated, or has more or other instructions than plain values need.
    """
    count = 0
    try:
        for count, (instruction, argument, _) in enumerate(pickletools.genops(stream), 1):
            if instruction.name in _NEEDLESS:
                raise pickle.UnpicklingError(f"it has the instruction {instruction.name}")
            if count > MOST_INSTRUCTIONS:
                raise pickle.UnpicklingError(f"it has more than {MOST_INSTRUCTIONS:,} instructions")
            if instruction.name in ("PUT", "LONG_BINPUT") and int(argument or 0) > MOST_INSTRUCTIONS:
                raise pickle.UnpicklingError(f"it asks for place {argument} of its memo")
    except (ValueError, UnicodeDecodeError, EOFError) as error:  # of pickletools
        raise pickle.UnpicklingError(f"it is damaged at instruction {count + 1} ({type(error).__name__})") from None


class Unpickler(pickle._Unpickler):
    """Python's own unpickler, whose dictionaries have plain keys: the hash of a nested tuple may take for ever.

    It believes no length either: it is the one written in Python, which the C one replaces.
    """

    dispatch: ClassVar[Any] = dict(pickle._Unpickler.dispatch)

    def _check_keys(self, keys: Any) -> None:
        for key in keys:
            if not isinstance(key, str | bytes | int):
                raise pickle.UnpicklingError(f"a dictionary has {type(key).__name__} as a key")

    def _setitem(self) -> None:
        self._check_keys(self.stack[-2:-1])  # type: ignore[attr-defined]
        pickle._Unpickler.load_setitem(self)  # type: ignore[attr-defined]

    def _setitems(self) -> None:
        self._check_keys(self.stack[::2])  # type: ignore[attr-defined]
        pickle._Unpickler.load_setitems(self)  # type: ignore[attr-defined]

    def _dict(self) -> None:
        self._check_keys(self.stack[::2])  # type: ignore[attr-defined]
        pickle._Unpickler.load_dict(self)  # type: ignore[attr-defined]

    dispatch[pickle.SETITEM[0]] = _setitem
    dispatch[pickle.SETITEMS[0]] = _setitems
    dispatch[pickle.DICT[0]] = _dict
