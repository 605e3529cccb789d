"""Job files and cluster profiles: read, changed by ``--set``, checked, with all errors of a file at once.

Nothing here imports torch, and no input ends in anything but a :class:`ConfigError`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from ..errors import ConfigError
from .cluster import Cluster
from .experiment import KNOWN, Data, Experiment
from .explain import MOST_PROBLEMS, explain
from .fields import shown
from .messages import Place, Problem, shown_key, shown_path
from .model import ModelConfig, PretrainedModel, SequentialModel
from .shapes import CIFAR_INPUT, ShapeError, check_layers
from .source import MAX_DEPTH, Node, parse, read_text
from .sweep import Sweep

SET = "--set"

AnyModel = TypeVar("AnyModel", bound=BaseModel)


def load_experiment(path: Path, sets: Sequence[str] = ()) -> Experiment:
    """The experiment in ``path``, with ``--set`` changes applied in order.

    Raises:
        ConfigError: every problem of the file and of the changes.
    """
    return _load(path, sets, Experiment)


def load_cluster(path: Path, sets: Sequence[str] = ()) -> Cluster:
    """The cluster profile in ``path``; a profile without a name is called like its file.

    Raises:
        ConfigError: every problem of the file and of the changes.
    """
    return _load(path, sets, Cluster)


def load_sweep(path: Path) -> Sweep:
    """The sweep in ``path``.

    Raises:
        ConfigError: every problem of the file.
    """
    return _load(path, (), Sweep)


def _load(path: Path, sets: Sequence[str], model: type[AnyModel]) -> AnyModel:
    found, problems = _read(Path(path), sets, model)
    if found is None:
        raise ConfigError(problems)
    return found


def check(paths: Sequence[Path], sets: Sequence[str] = ()) -> tuple[list[tuple[Path, Experiment]], list[str]]:
    """Every experiment that is right, and every problem of the others."""
    good: list[tuple[Path, Experiment]] = []
    problems: list[str] = []
    for path in paths:
        try:
            good.append((Path(path), load_experiment(Path(path), sets)))
        except ConfigError as error:
            problems += error.problems
    return good, problems


def is_profile(path: Path) -> bool:
    """Whether the file is a cluster profile by its keys, for a command that is given either kind."""
    text = read_text(path)
    root = parse(text, "")[0] if isinstance(text, str) else None
    return root is not None and _kind(root) is Cluster


def _kind(root: Node) -> type[BaseModel] | None:
    """What a file is by the keys that only one kind has; None if it has some of both, or none."""
    keys, jobs, profiles = root.entries.keys(), Experiment.model_fields.keys(), Cluster.model_fields.keys()
    in_job, in_profile = bool(keys & (jobs - profiles)), bool(keys & (profiles - jobs))
    if in_job == in_profile:
        return None
    return Experiment if in_job else Cluster


def place_of(path: Path, field: str) -> str:
    """``file:line`` of a field, for a rule that only a plan can check; the file alone where the field is not in it."""
    text = read_text(path)
    root = parse(text, shown_path(path))[0] if isinstance(text, str) else None
    place = Place(shown_path(path))
    for key in field.split("."):
        if root is None or key not in root.entries:
            break
        place, root = root.entries[key]
    return str(place)


def _read(path: Path, sets: Sequence[str], model: type[AnyModel]) -> tuple[AnyModel | None, list[str]]:
    file = shown_path(path)
    text = read_text(path)
    if isinstance(text, Problem):
        return None, [str(text)]
    root, problems = parse(text, file)
    if root is None:
        if not problems:
            problems = [Problem(Place(file), "", f"is empty; it should hold {_what(model)}")]
        return None, _lines(problems)
    if root.kind != "mapping":
        found = "a list" if root.kind == "list" else "nothing but comments" if root.scalar is None else shown(root.scalar)
        problems.append(Problem(root.place, "", f"should hold {_what(model)} as lines of key: value, not {found}"))
        return None, _lines(problems)
    other = _kind(root)
    if other is not None and other is not model and model is not Sweep:
        use = "name it with --cluster" if other is Cluster else "profiles have keys such as executor and partition"
        return None, _lines([*problems, Problem(Place(file), "", f"holds {_what(other)}, not {_what(model)}; {use}")])
    for change in sets:
        problems += apply_set(root, change)
    if model is Cluster and "name" not in root.entries:
        root.entries["name"] = (Place(file), Node("scalar", Place(file), scalar=path.stem, raw=path.stem))
    result, found_problems = _validate(root, model, file)
    problems += found_problems
    return (None if problems else result), _lines(problems)


def _validate(root: Node, model: type[AnyModel], file: str) -> tuple[AnyModel | None, list[Problem]]:
    result: AnyModel | None = None
    problems: list[Problem] = []
    try:
        result = model.model_validate(root.value())
    except ValidationError as error:
        problems += explain(error, root, model, file)
    if model is Experiment and "model" in root.entries:
        problems += _shape_problems(root)
    return result, problems


def _shape_problems(root: Node) -> list[Problem]:
    """The first layer that does not fit, even where other sections of the file are wrong."""
    network = root.entries["model"][1]
    try:
        model: SequentialModel | PretrainedModel = TypeAdapter(ModelConfig).validate_python(network.value())
    except ValidationError:
        return []  # reported with the rest
    dataset = Data.model_fields["dataset"].default
    data = root.entries["data"][1] if "data" in root.entries else None
    if data is not None and "dataset" in data.entries:
        dataset = data.entries["dataset"][1].scalar
    try:
        check_layers(model, CIFAR_INPUT, KNOWN.get(dataset) if isinstance(dataset, str) else None)
    except ShapeError as error:
        place, layers = network.entries[error.field]
        item = layers.items[error.index] if error.index < len(layers.items) else None
        return [Problem(item.place if item else place, f"model.{error.field}[{error.index}]", error.message)]
    return []


def apply_set(root: Node, change: str) -> list[Problem]:
    """Apply one ``a.b=value``; the value is YAML, a list index is ``layers.0`` or ``layers[0]``."""
    place = Place(SET)
    key, equals, text = change.partition("=")
    steps = _steps(key)
    if not equals or not steps:
        return [Problem(place, shown(change), "should be key=value, such as --set optimizer.lr=0.1")]
    if len(steps) > MAX_DEPTH:
        return [Problem(place, shown(key), "names a field deeper than any file has")]
    shown_steps = ".".join(shown_key(step) for step in steps)
    value, problems = parse(text, SET, lines=False, path=shown_steps)
    if problems:
        return problems
    node = value or Node("scalar", place)
    target = root
    for position, step in enumerate(steps):
        last = position == len(steps) - 1
        so_far = ".".join(shown_key(name) for name in steps[: position + 1])
        if target.kind == "list":
            if not re.fullmatch(r"[0-9]{1,6}", step) or int(step) >= len(target.items):
                wanted = f"0 to {len(target.items) - 1}" if target.items else "nothing: the list is empty"
                return [Problem(place, so_far, f"should be the number of a list entry, {wanted}, not {shown(step)}")]
            if not last:
                target.items[int(step)] = _own(target.items[int(step)])
            else:
                target.items[int(step)] = node
            target = target.items[int(step)]
        elif target.kind == "mapping":
            if last:
                target.entries[step] = (place, node)
            elif step not in target.entries or target.entries[step][1].value() is None:
                target.entries[step] = (place, Node("mapping", place))
            else:
                above, inner = target.entries[step]
                target.entries[step] = (above, _own(inner))
            target = target.entries[step][1]
        else:
            whole = ".".join(shown_key(name) for name in steps[:position])
            return [Problem(place, so_far, f"{whole} is {shown(target.scalar)} and has no fields; set {whole} as a whole")]
    return []


def _own(node: Node) -> Node:
    """A copy that can be changed where the file has the same node in several places, by aliases."""
    return Node(node.kind, node.place, node.scalar, node.raw, dict(node.entries), list(node.items))


def _steps(key: str) -> list[str]:
    """``model.layers[0].conv`` and ``model.layers.0.conv`` -> the same four steps; none if the key is malformed."""
    steps = re.sub(r"\[([0-9]+)\]", r".\1", key.strip()).split(".")
    return steps if all(steps) else []


def _what(model: type[BaseModel]) -> str:
    return {Experiment: "one experiment", Sweep: "one sweep"}.get(model, "one cluster profile")


def _lines(problems: list[Problem]) -> list[str]:
    """Problems in the order of the file, each once; a flood is cut short."""
    ordered = sorted(dict.fromkeys(problems), key=lambda problem: problem.place)
    lines = [str(problem) for problem in ordered[:MOST_PROBLEMS]]
    if len(ordered) > MOST_PROBLEMS:
        lines.append(f"{ordered[0].place.file}: {len(ordered) - MOST_PROBLEMS} more problems are not shown; fix these first")
    return lines
