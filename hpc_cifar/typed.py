"""JSON objects as frozen dataclasses: each field of the type that its class names.

A field that is missing or null has its default, one that the class does not know is left out, and one of another type means
that the object is damaged. Plain functions and no model of pydantic: a list of thousands of runs reads several files of each.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar, cast

from . import reading
from .reading import Damaged

Record = TypeVar("Record")
LARGEST = 2**53  # of whole numbers: any float, and any arithmetic with floats, holds them
MOST = 1e15  # of seconds, hours and rates

# what fields hold; the readers below go by these names
Loss = float
Share = float
Amount = float
JobId = str  # an older version may have written a number
Json = Any


def _text(value: Any) -> str:
    if type(value) is not str:
        raise Damaged("text")
    return value


def _job_id(value: Any) -> str:
    return str(value) if type(value) is int else _text(value)


def _whole(value: Any) -> int:
    if type(value) is not int or not -LARGEST <= value <= LARGEST:
        raise Damaged("a whole number")
    return value


def _number(value: Any) -> float:
    if type(value) is int:
        return _whole(value)
    if type(value) is not float or not math.isfinite(value):
        raise Damaged("a number")
    return value


def _amount(value: Any) -> float:
    number = _number(value)
    if not -MOST <= number <= MOST:
        raise Damaged("a number of at most 15 digits")
    return number


def _share(value: Any) -> float:
    number = _number(value)
    if not 0 <= number <= 1:
        raise Damaged("a number from 0 to 1")
    return number


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise Damaged("true or false")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    if type(value) is not list or any(type(item) is not str for item in value):
        raise Damaged("a list of texts")
    return tuple(value)


def _wholes(value: Any) -> tuple[int, ...]:
    if type(value) is not list:
        raise Damaged("a list of whole numbers")
    return tuple(map(_whole, value))


def _object(value: Any) -> dict[str, Any]:
    if type(value) is not dict:
        raise Damaged("an object")
    return value


KINDS: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "str": (_text, ""),
    "int": (_whole, 0),
    "float": (_number, 0.0),
    "Loss": (_number, 0.0),
    "Amount": (_amount, 0.0),
    "Share": (_share, 0.0),
    "bool": (_flag, False),
    "tuple[str, ...]": (_texts, ()),
    "tuple[int, ...]": (_wholes, ()),
    "dict[str, Json]": (_object, None),
    "JobId": (_job_id, ""),
}
"""How a field is read, by its type in the source, and what a field without a default has where it is missing."""


@cache
def _fields(kind: Any) -> tuple[dict[str, Callable[[Any], Any]], dict[str, Any]]:
    """The reader of every field by its name, and the values of missing fields that have no default."""
    readers: dict[str, Callable[[Any], Any]] = {}
    missing: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        name = str(field.type).removesuffix(" | None")
        if field.name == "problem":
            continue
        if name in KINDS:
            reader, nothing = KINDS[name]
        else:  # another record, in a module of its own
            inner = kind.INNER[field.name]
            reader, nothing = partial(of, inner), of(inner, {})
        readers[field.name] = reader
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            missing[field.name] = nothing
    return readers, missing


def of(kind: type[Record], found: Any) -> Record:
    """The record in a JSON value.

    Raises:
        Damaged: the value is no object, or a field has another type; the text names it.
    """
    if type(found) is not dict:
        raise Damaged("is not a JSON object")
    readers, missing = _fields(cast(Any, kind))
    values = _values(readers, found)
    return kind(**({**missing, **values} if missing else values))


def _values(readers: dict[str, Callable[[Any], Any]], found: dict[str, Any]) -> dict[str, Any]:
    values = {}
    name = ""
    try:
        for name, value in found.items():
            if value is not None and (reader := readers.get(name)) is not None:
                values[name] = reader(value)
    except Damaged as error:
        raise Damaged(f"{name} should be {error}, not {_shown(found[name])}") from None
    return values


def is_sound(kind: type, found: Mapping[str, Any]) -> bool:
    """Whether every field of a JSON object that the record has is of its type."""
    try:
        _values(_fields(kind)[0], dict(found))
    except Damaged:
        return False
    return True


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return repr(value) if len(repr(value)) <= 40 else repr(value)[:37] + "..."


def sound(kind: type, found: Mapping[str, Any]) -> dict[str, Any]:
    """What of a JSON object can be kept: without fields that have another type than theirs; those that are not known stay."""
    kept = dict(found)
    for name, reader in _fields(kind)[0].items():
        try:
            if kept.get(name) is not None:
                reader(kept[name])
        except Damaged:
            del kept[name]
    return kept


def load(kind: type[Record], path: Path) -> Record:
    """The record in a file.

    Raises:
        FileNotFoundError: there is none.
        Damaged: it is not such a record.
    """
    return of(kind, reading.load_json(path))


def _damaged(kind: type[Record], words: str) -> Record:
    return cast(Record, cast(Any, kind)(problem=words))


def read(kind: type[Record], path: Path) -> Record | None:
    """The record in a file, None where there is no file; a damaged one says so in ``problem``."""
    try:
        return load(kind, path)
    except FileNotFoundError:
        return None
    except Damaged as error:
        return _damaged(kind, f"{path.name}: {error}")


def rows(kind: type[Record], path: Path) -> list[Record]:
    """The records of a file of JSON lines: a torn line is left out, one with a field of another type says so in ``problem``."""
    try:
        found = reading.json_lines(path)[0]
    except Damaged as error:
        return [_damaged(kind, f"{path.name}: {error}")]
    return [row_of(kind, row, path.name) for row in found]


def row_of(kind: type[Record], row: Mapping[str, Any], name: str) -> Record:
    """The record in a row of the file ``name``; a damaged one says so in ``problem``."""
    try:
        return of(kind, row)
    except Damaged as error:
        return _damaged(kind, f"{name}: {error}")
