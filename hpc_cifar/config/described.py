"""What the fields of the configuration models mean: the text under each field in the source, as Python's own tools read it.

pydantic can collect these as it makes a class, which would cost every command the time to parse the source; so they are read
where a schema or a page is made.
"""

from __future__ import annotations

import ast
import inspect
import sys
from functools import cache

from pydantic import BaseModel


@cache
def _of_module(name: str) -> dict[str, dict[str, str]]:
    """The texts of every class of a module, by class and field, each on one line."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(sys.modules[name])).body:
        if isinstance(node, ast.ClassDef):
            texts = found.setdefault(node.name, {})
            for field, text in zip(node.body, node.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                    texts[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return found


def descriptions(model: type[BaseModel]) -> dict[str, str]:
    """What each field of a model means, those that it inherits included; fields whose values speak for themselves have none."""
    found: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        if issubclass(cls, BaseModel) and cls is not BaseModel:
            found |= _of_module(cls.__module__).get(cls.__name__, {})
    return found


def models_of(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """Every model inside a model, itself included, by the name that its JSON Schema has for it."""
    found: dict[str, type[BaseModel]] = {}
    waiting: list[object] = [model]
    while waiting:
        kind = waiting.pop()
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            if kind.__name__ not in found:
                found[kind.__name__] = kind
                waiting += [field.annotation for field in kind.model_fields.values()]
        else:
            waiting += getattr(kind, "__args__", ())
    return found
