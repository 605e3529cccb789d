"""Arguments of ``train`` as ``wandb agent`` passes them: ``--optimizer.lr=0.1`` is ``--set optimizer.lr=0.1``.

``${args}`` is ``--key=value``, ``${args_no_equals}`` is ``--key value``, ``${args_no_boolean_flags}`` has ``--key`` for true
and nothing for false; a nested parameter is a dict as Python prints it. Source: ``create_sweep_command_args`` of wandb 0.31.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterator, Sequence, Set
from typing import Any

from typer.core import TyperCommand


class WithFields(TyperCommand):
    """A command whose options may be fields of the experiment, too; its own options go first."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {name for option in self.params for name in (*option.opts, *option.secondary_opts)} | {"--help"}
        return super().parse_args(ctx, as_sets(args, own))


def as_sets(arguments: Sequence[str], own: Set[str]) -> list[str]:
    """The arguments, with ``--set FIELD=VALUE`` for each that names a field.

    Args:
        own: the names of the command's options.
    """
    found: list[str] = []
    left = list(arguments)
    while left:
        word = left.pop(0)
        if word == "--":
            return [*found, word, *left]
        name, equals, value = word.partition("=")
        is_option = name in own and not _mapping(value)  # no folder of `--data` is written like that
        if is_option or not name.startswith("--") or not _is_meant_as_field(name[2:], own):
            found.append(word)
            continue
        if not equals:
            value = left.pop(0) if left and not left[0].startswith("--") else "true"
        for field, text in _values(name[2:], value):
            found += ["--set", f"{field}={text}"]
    return found


def _is_meant_as_field(name: str, own: Set[str]) -> bool:
    """Whether a name that is no option is that of a field, or nearer to one than to any option, so that ``--set`` names it."""
    from ..config.experiment import Experiment

    fields = Experiment.model_fields.keys()
    if "." in name or name in fields:
        return True
    return bool(difflib.get_close_matches(name, fields, 1)) and not difflib.get_close_matches(f"--{name}", own, 1, 0.7)


def _values(name: str, value: str) -> Iterator[tuple[str, str]]:
    """Fields and values, as YAML has them: several of a dict; Python's None is no word of YAML."""
    if inner := _mapping(value):
        for key, one in inner.items():
            yield from _values(f"{name}.{key}", str(one))
        return
    yield name, "null" if value == "None" else value


def _mapping(value: str) -> dict[Any, Any]:
    """A dict as Python prints it; {} for anything else, such as a mapping of YAML."""
    if not value.startswith("{"):
        return {}
    try:
        found = ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
