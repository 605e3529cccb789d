"""pydantic's errors in plain words, each at the line of the YAML file it comes from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from .fields import NUMBER_TEXT, shown
from .layers import LAYER_NAMES
from .messages import Place, Problem, closest, did_you_mean
from .source import Node, join, reported

MOST_PROBLEMS = 50  # per file; more help nobody

Loc = tuple[int | str, ...]

ONE_LOSS = "the loss is cross-entropy, the only one there is; its one option is label_smoothing"
_NAMED_BY = ("type", "name", "family")  # the fields that choose a class of a union


def explain(error: ValidationError, root: Node, model: type[BaseModel], file: str) -> list[Problem]:
    """Every problem of ``error``; the several complaints of a union about one value become one."""
    expected: dict[tuple[Place, str], list[str]] = {}
    endings: dict[tuple[Place, str], str] = {}
    problems: list[Problem] = []
    for detail in error.errors(include_url=False):
        place, path, node = _locate(detail, root, file)
        if node is not None and reported(node):
            continue
        if detail["type"] == "too_short" and node is not None and node.items:
            continue  # pydantic does not count entries with errors, which are reported themselves
        message, path, place = _message(detail, path, place, node, model, root)
        if match := re.fullmatch(r"should be (.*?)(, not .*)", message, re.DOTALL):
            known = expected.setdefault((place, path), [])
            if match[1] not in known:
                known.append(match[1])
            endings[place, path] = match[2]
        else:
            problems.append(Problem(place, path, message))
    problems += [
        Problem(place, path, f"should be {' or '.join(words)}{endings[place, path]}")
        for (place, path), words in expected.items()
    ]
    return problems


def first_problem(error: ValidationError) -> tuple[str, str]:
    """Field and message of the first problem, for values that come from no file."""
    detail = error.errors(include_url=False)[0]
    field = str(detail["loc"][0]) if detail["loc"] else ""
    return field, _wording(detail, None)


def _locate(detail: ErrorDetails, root: Node, file: str) -> tuple[Place, str, Node | None]:
    """Place, field path and node that an error is about; pydantic's union labels in the location are left out."""
    node: Node | None = root
    place, path = Place(file, 1) if root.place.line else Place(file), ""
    about_absent = detail["type"] == "missing"
    last = len(detail["loc"]) - 1
    for position, element in enumerate(detail["loc"]):
        if node is not None and node.kind == "list" and isinstance(element, int) and element < len(node.items):
            node = node.items[element]
            place, path = node.place, f"{path}[{element}]"
        elif node is not None and node.kind == "mapping" and isinstance(element, str) and element in node.entries:
            place, node = node.entries[element]
            path = join(path, element)
        elif about_absent and position == last:
            return place, join(path, str(element)), None
        elif element in LAYER_NAMES and node is not None and node.kind == "scalar" and position != last:
            path = join(path, str(element))  # `- dense`, which stands for `- dense: {}`
    return place, path, node


def _message(
    detail: ErrorDetails, path: str, place: Place, node: Node | None, model: type[BaseModel], root: Node
) -> tuple[str, str, Place]:
    """Message, and the field path and place it is about."""
    loc, kind = detail["loc"], detail["type"]
    if kind == "extra_forbidden":
        return _unknown_key(loc, model), path, place
    if kind == "missing":
        return f"is missing; {_needed(loc, model)}", path, place
    if kind in ("union_tag_invalid", "union_tag_not_found", "model_attributes_type"):
        message, field = _choice(detail, loc, node, model)
        if field and node is not None and field in node.entries:
            place = node.entries[field][0]
        return message, join(path, field) if field else path, place
    message = _wording(detail, node)
    if not loc and (named := re.match(r"([a-z_]+(?:\.[a-z_]+)+): ", message)):
        # a rule over several sections names the field it is about
        for key in named[1].split("."):
            if root.kind == "mapping" and key in root.entries:
                place, root = root.entries[key]
        return message[named.end() :], named[1], place
    return message, path, place


def _unknown_key(loc: Loc, model: type[BaseModel]) -> str:
    key = str(loc[-1])
    valid = sorted({name for cls in _models_at(model, loc[:-1]) for name in cls.model_fields} - {"type"})
    where = next((str(part) for part in reversed(loc[:-1]) if isinstance(part, str)), "")
    misplaced = key in model.model_fields and key not in (*_NAMED_BY, where)
    if where == "loss" and not misplaced and closest(key, valid) is None:
        return f"unknown key; {ONE_LOSS}"
    if len(loc) > 1 and key in (*_NAMED_BY, "kind", where):  # it is to choose one of several
        return _chosen(where, _models_at(model, loc[:-1]), _models_at(model, (loc[0],)), valid)
    if closest(key, valid) is None:
        for section, field in model.model_fields.items():
            if any(key in cls.model_fields for cls in _models_in(field.annotation)) and len(loc) == 1:
                return f"unknown key; it belongs in {section}: {section}.{key}"
            if key == section and len(loc) > 1:
                return f"unknown key here; '{key}' belongs at the top level of the file, check the indentation"
    if not valid:
        return f"unknown key; {loc[-2] if len(loc) > 1 else 'it'} has no options"
    return f"unknown key; {did_you_mean(key, valid)}"


def _chosen(where: str, models: Sequence[type[BaseModel]], section: Sequence[type[BaseModel]], valid: Sequence[str]) -> str:
    """What to say where a key was to choose a class: how that is done there, or that there is nothing to choose."""
    several = models if len(models) > 1 else section if {*models} < {*section} else ()
    if names := _names_of(several):
        field = next(key for key in _NAMED_BY if key in several[0].model_fields)
        return f"unknown key; {field} chooses it, one of {', '.join(names)}"
    return (
        f"unknown key; there is one kind of {where}; valid keys are {', '.join(valid)}"
        if valid
        else "unknown key; it has no options"
    )


def _needed(loc: Loc, model: type[BaseModel]) -> str:
    """What a missing field should hold, from an example that every reader understands."""
    examples = {
        "name": "add a name for the run, such as name: my-run",
        "epochs": "add a whole number of at least 1, such as epochs: 10",
        "model": "add the network, such as model: {family: sequential, layers: [flatten, dense: {units: 10}]}",
        "data": "add a section such as data: {batch_size: 128}",
        "optimizer": "add a section such as optimizer: {name: sgd, lr: 0.1}",
        "batch_size": "add the images of one step over all processes, such as batch_size: 128",
        "lr": "add the learning rate, such as lr: 0.1",
        "family": "add family: sequential",
        "layers": "add a list of layers",
        "filters": "add the number of output channels, such as conv: {filters: 32}",
        "units": "add the number of outputs, such as dense: {units: 10}",
        "rate": "add the share of values to drop, such as dropout: {rate: 0.5}",
        "source": "add where the figures come from",
    }
    return examples.get(str(loc[-1]), "add it")


def _choice(detail: ErrorDetails, loc: Loc, node: Node | None, model: type[BaseModel]) -> tuple[str, str]:
    """Wrong or missing name of a layer, optimizer or schedule: the message and the field that holds the name."""
    context = detail.get("ctx", {})
    names = re.findall(r"'([^']*)'", str(context.get("expected_tags", ""))) or _names_of(_models_at(model, loc))
    is_layer = bool(loc) and isinstance(loc[-1], int)
    noun = "layer" if is_layer else str(loc[-1]) if loc else "value"
    key = str(context.get("discriminator", "name")).strip("'")  # the field that holds the name
    if detail["type"] == "union_tag_invalid":
        tag = detail["input"].get("name") if isinstance(detail["input"], dict) and not is_layer else None
        word = str(context.get("tag", tag))
        field = "" if is_layer else key
        return f"unknown {noun} {shown(word)}; {did_you_mean(word, names, f'{noun}s')}", field
    if not is_layer:
        if node is not None and node.kind == "mapping":
            return f"is missing; name one of {', '.join(names)}", key
        example = node.raw if node is not None and node.raw in names else names[0] if names else "..."
        return f"should be a mapping such as {{{key}: {example}}}, not {_written(detail, node)}", ""
    if node is not None and node.kind == "mapping":
        known = [name for name in node.entries if name in names]
        if len(node.entries) == 1 and known:
            return (
                f"the options of {known[0]} should be a mapping such as {known[0]}: {{...}}, not {_inner(node, known[0])}",
                "",
            )
        if known:
            return f"a layer has one key; put the options inside it, such as {known[0]}: {{...}}", ""
        if len(node.entries) == 1:
            word = next(iter(node.entries))
            return f"unknown layer {shown(word)}; {did_you_mean(word, names, 'layers')}", ""
    example = "such as relu or conv: {filters: 32}"
    return f"should be one layer, {example}, not {_written(detail, node)}; layers are {', '.join(names)}", ""


def _inner(node: Node, key: str) -> str:
    inner = node.entries[key][1]
    return "a mapping with type in it" if inner.kind == "mapping" else shown(inner.value())


def _wording(detail: ErrorDetails, node: Node | None) -> str:
    """``should be X, not Y`` for one pydantic error."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in ("value_error", "assertion_error"):
        return str(context.get("error", detail["msg"])) + _hint(node)
    if kind == "literal_error":
        names = re.findall(r"'([^']*)'", str(context.get("expected", "")))
        written = _written(detail, node)
        guess = closest(str(detail["input"]), names) if isinstance(detail["input"], str) else None
        words = "one of " + ", ".join(names) if len(names) > 1 else "".join(names)
        return f"should be {words}, not {written}" + (f"; did you mean '{guess}'?" if guess else "")
    match kind:
        case "greater_than_equal":
            wanted = f"at least {context['ge']}"
        case "greater_than":
            wanted = f"more than {context['gt']}"
        case "less_than_equal":
            wanted = f"at most {context['le']}"
        case "less_than":
            wanted = f"less than {context['lt']}"
        case "finite_number":
            wanted = "a finite number"
        case "int_type" | "int_parsing" | "int_from_float" | "int_parsing_size":
            wanted = "a whole number"
        case "float_type" | "float_parsing":
            wanted = "a number"
        case "bool_type" | "bool_parsing":
            return f"should be true or false, not {_written(detail, node)}"
        case "string_type":
            quoted = f'; in quotes it is text: "{node.raw}"' if node is not None and node.raw and node.raw.isprintable() else ""
            return f"should be text, not {_written(detail, node)}{quoted}"
        case "tuple_type" | "list_type":
            wanted = "a list"
        case "model_type" | "dict_type" | "mapping_type":
            wanted = "a mapping (key: value)"
            if detail["loc"] and detail["loc"][-1] == "loss":
                return f"should be {wanted}, not {_written(detail, node)}: {ONE_LOSS}"
        case "too_short":
            return f"should have at least {_counted(context['min_length'], 'entry', 'entries')}, not {context['actual_length']}"
        case "too_long":
            return f"should have at most {_counted(context['max_length'], 'entry', 'entries')}, not {context['actual_length']}"
        case "string_too_short":
            wanted = f"text of at least {_counted(context['min_length'], 'character', 'characters')}"
        case "string_too_long":
            wanted = f"text of at most {_counted(context['max_length'], 'character', 'characters')}"
        case _:
            message = detail["msg"]
            return f"{message[:1].lower()}{message[1:]}, not {_written(detail, node)}"
    return f"should be {wanted}, not {_written(detail, node)}"


def _counted(number: int, one: str, more: str) -> str:
    return f"{number:,} {one if number == 1 else more}"


def _hint(node: Node | None) -> str:
    """What to write instead, where YAML versions disagree."""
    if node is None or node.kind != "scalar":
        return ""
    if re.fullmatch(r"[-+]?0[0-9]{1,20}", node.raw):
        return f"; write {int(node.raw)} without the leading zero"
    if re.fullmatch(r"[0-9]{1,3}([,_ ][0-9]{3}){1,5}", node.raw):
        return f"; write {re.sub('[,_ ]', '', node.raw)}"
    if re.fullmatch(r"[0-9.]{1,10} ?%", node.raw):
        return "; write a fraction of 1"
    return ""


def _written(detail: ErrorDetails, node: Node | None) -> str:
    """The value as the file has it."""
    if node is not None and node.kind == "scalar" and not isinstance(node.scalar, str) and node.raw:
        return node.raw if len(node.raw) <= 60 else node.raw[:60] + "..."
    if isinstance(detail["input"], str) and len(detail["input"]) <= 60 and re.match(NUMBER_TEXT, detail["input"].strip()):
        return detail["input"].strip()  # text by YAML's rules, a number by ours
    return shown(node.value() if node is not None and node.kind == "scalar" else detail["input"])


# ---- walking the models ----------------------------------------------------------------------------------------------


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Every model class inside an annotation: unions, tuples and Annotated are looked through."""
    if isinstance(annotation, type) and not get_args(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def _names_of(models: Sequence[type[BaseModel]]) -> list[str]:
    """What chooses each class of a union, such as its ``name: Literal["sgd"]``."""
    names: list[str] = []
    for cls in models:
        for key in _NAMED_BY:
            if key in cls.model_fields and get_origin(cls.model_fields[key].annotation) is Literal:
                names += get_args(cls.model_fields[key].annotation)
                break
    return names


def _models_at(model: type[BaseModel], loc: Loc) -> list[type[BaseModel]]:
    """The classes that a value at ``loc`` may have."""
    current = [model]
    for element in loc:
        if isinstance(element, int):
            continue
        if len(current) > 1:
            named = [cls for cls in current if _names_of([cls]) == [element]]
            current = named or current
            continue
        fields = [cls.model_fields[element] for cls in current if element in cls.model_fields]
        if current and not fields:  # not a field: what pydantic calls a member of a union
            continue
        current = [inner for field in fields for inner in _models_in(field.annotation)]
    return current
