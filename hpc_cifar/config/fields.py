"""Field types shared by the configuration models: numbers as YAML writes them, durations, plain text."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

NUMBER_TEXT = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][+-]?[0-9]+$"
"""Text that is read as a number: what YAML 1.1 leaves as text, such as ``5e-4``."""

_LONGEST_NUMBER = 64  # no number anyone means is longer, and the pattern above is quadratic in the length


def _number(value: Any) -> Any:
    """Accept ``5e-4``, which YAML 1.1 reads as text; refuse ``true``, which pydantic reads as 1."""
    if isinstance(value, bool):
        raise ValueError("should be a number, not true or false")
    if isinstance(value, str):
        text = value.strip()
        if len(text) <= _LONGEST_NUMBER and re.match(NUMBER_TEXT, text):
            return float(text)
        raise ValueError(f"should be a number, not the text {shown(value)}")
    return value


def _whole(value: Any) -> Any:
    """A whole number; ``1e3`` is accepted, ``2.5``, ``true`` and text are not."""
    value = _number(value)
    if isinstance(value, float):
        if not value.is_integer():  # also NaN and infinity
            raise ValueError(f"should be a whole number, not {value}")
        return int(value)
    return value


def _duration(value: Any) -> Any:
    """``"HH:MM:SS"`` or ``"D-HH:MM:SS"``; a number is refused: YAML 1.1 makes 36000 of an unquoted 10:00:00, and what
    was written is not known any more. Here it stays text (see ``source.py``), so quotes are not needed.
    """
    if not isinstance(value, str):
        raise ValueError(f'should be quoted text such as "01:00:00" (hours:minutes:seconds), not {shown(value)}')
    match = re.fullmatch(r"(?:([0-9]{1,3})-)?([0-9]{1,3}):([0-5][0-9]):([0-5][0-9])", value.strip())
    if not match or not any(int(part or 0) for part in match.groups()):
        raise ValueError(f'should be "HH:MM:SS" or "D-HH:MM:SS" and longer than zero, not {shown(value)}')
    return value.strip()


def shown(value: Any, limit: int = 60) -> str:
    """``value`` as a message may print it: YAML's words for null and booleans, control characters escaped, shortened."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict | list | tuple):
        return "a mapping" if isinstance(value, dict) else "a list"
    try:
        text = repr(value[: limit + 1] if isinstance(value, str) else value)
    except ValueError:  # Python refuses to print integers of more than 4300 digits
        return "a number with thousands of digits"
    return text if len(text) <= limit + 2 else text[:limit] + "..."


def matching(pattern: str, words: str) -> Callable[[str], str]:
    """A validator: the whole text matches ``pattern``, else the message says ``words``."""
    compiled = re.compile(pattern)

    def check(value: str) -> str:
        if not compiled.fullmatch(value):
            raise ValueError(f"should be {words}, not {shown(value)}")
        return value

    return check


Real = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Whole = Annotated[int, BeforeValidator(_whole)]
Flag = Annotated[bool, Field(strict=True)]
DURATION_PATTERN = r"^([0-9]{1,3}-)?[0-9]{1,3}:[0-5][0-9]:[0-5][0-9]$"
Duration = Annotated[str, BeforeValidator(_duration), WithJsonSchema({"type": "string", "pattern": DURATION_PATTERN})]
Positive = Annotated[Real, Field(gt=0)]
Count = Annotated[Whole, Field(ge=1)]
Share = Annotated[Real, Field(ge=0, lt=1)]


class Model(BaseModel):
    """Base of every configuration model: frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
