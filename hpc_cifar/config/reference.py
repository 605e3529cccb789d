"""The page on the files that people write, made of the models that check them: ``docs/experiments.md``.

``hpc-cifar schema --markdown`` prints it.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from .claim import AccuracyRange, Claim, LossRange
from .cluster import Cluster
from .container import Container
from .described import descriptions
from .experiment import Augment, Data, Experiment, Resources, Tracking
from .fields import DURATION_PATTERN
from .layers import AnyLayer
from .model import PretrainedModel, SequentialModel
from .optimization import AnyOptimizer, EarlyStopping, Lookahead, Optimizer, Schedule, ScheduleConfig, Stage
from .sweep import Prune, Range, Sweep
from .training import Checkpoint, Loss, Selection, Training

UNBOUNDED = 2**32  # no reader is helped by a bound above it

HEAD = """\
# Experiment files, sweep files, cluster profiles

This page is made of the models that check these files: `hpc-cifar schema --markdown -o docs/experiments.md`. What differs from
the defaults is all that a file has to say.

| file | holds | is checked by |
|---|---|---|
| [experiment](#the-experiment-file) | one network, its data and its training | `hpc-cifar validate FILE` |
| [sweep](#sweep-files) | fields of an experiment file and the values to try | `hpc-cifar submit JOB --sweep FILE --dry-run` |
| [cluster profile](#cluster-profiles) | where and how jobs run at one site | `hpc-cifar validate FILE` |

- A mistake is one line, `file:line: field: what is wrong, what would be right`, and all mistakes of a file come at once. An
  unknown key says which one was probably meant.
- `--set a.b=value` changes a field for one command, in `validate`, `submit`, `train`, `drill` and `bench step`. The value is
  YAML; an entry of a list has its number: `--set model.layers.0.conv.filters=64`.
- `5e-4` is a number here, though YAML 1.1 reads it as text. Times need no quotes here: `10:00:00` is text,
  though YAML 1.1 reads it as 36000, which is refused.
- `hpc-cifar schema -o experiment.schema.json` writes a JSON Schema. An editor that knows YAML completes and checks a file whose
  first line is `# yaml-language-server: $schema=experiment.schema.json`; the packaged job files have it.
- `hpc-cifar jobs` lists the packaged job files; each is an example.

## The experiment file

```yaml
name: mine
seed: 42
epochs: 30
model:
  family: sequential
  layers:
    - conv: {filters: 64}
    - batch_norm
    - relu
    - max_pool
    - conv: {filters: 128}
    - batch_norm
    - relu
    - global_avg_pool
    - dense: {units: 10}
data: {dataset: cifar10, batch_size: 512, augment: {crop_padding: 4, flip: random}}
optimizer: {name: sgd, lr: 0.1, momentum: 0.9, nesterov: true, weight_decay: 5e-4}
schedule: {name: cosine, warmup_epochs: 2}
resources: {nodes: 2, gpus_per_node: 4, time: "02:00:00"}
```
"""
SWEEP = """\
```yaml sweep
method: bayes
runs: 20
parameters:
  optimizer.lr: {min: 0.001, max: 1, scale: log}
  data.augment.flip: [none, random]
prune: {warmup_epochs: 5}
```

A value of a list may be anything that the field takes, also a mapping. What all runs of a sweep share is no parameter: `name`,
`seed`, `claim`, `data.dataset`, and what is below `resources` and `tracking`. A sweep has 1,000 runs at most. How runs are
submitted and compared is in [tracking.md](tracking.md#sweeps).
"""
PROFILE = """\
```yaml profile
description: nodes with eight GPUs
partition: gpu
gpus_per_node_available: 8
cpus_per_process: 12
modules: [cuda/12.8]
environment: {NCCL_DEBUG: WARN}
max_time: "24:00:00"
```

`hpc-cifar init` writes one by asking Slurm; how each is used is in [clusters.md](clusters.md).
"""


def markdown() -> str:
    """The whole page."""
    return "\n".join(_page()) + "\n"


def _page() -> Iterator[str]:
    yield HEAD
    yield from _table(Experiment)
    yield "\n### `model`"
    yield from _variant(SequentialModel, "family: sequential")
    yield from _layers()
    yield from _variant(PretrainedModel, "family: torchvision, family: timm")
    yield "\nConvolutions, dense layers, normalisations and pools count as layers of a backbone, in the order in which the"
    yield "library defines them, so that `last4` of VGG16 is Keras' `layers[-4:]`. More is in [transfer.md](transfer.md)."
    yield from _section("data", Data)
    yield "\n`folds` and `fold` go together, and replace `validation`. With `validation: test` nothing may be chosen by it,"
    yield "so `checkpoint.select: best`, early stopping and the schedule `plateau` are refused."
    yield from _section("data.augment", Augment)
    yield from _section("optimizer", AnyOptimizer, "Fields of every optimizer:")
    yield from _section("optimizer.lookahead", Lookahead)
    for kind in _kinds(Optimizer):
        yield from _variant(kind, f"optimizer: {{name: {_name(kind)}}}", AnyOptimizer)
    free = [_code(_name(kind)) for kind in _kinds(ScheduleConfig) if not issubclass(kind, Schedule)]
    yield from _section("schedule", Schedule, f"A field of every schedule but {' and '.join(free)}:")
    for kind in _kinds(ScheduleConfig):
        yield from _variant(kind, f"schedule: {{name: {_name(kind)}}}", Schedule)
        if _name(kind) == "staged":
            yield "\nA stage:\n"
            yield from _table(Stage)
    yield from _section("loss", Loss)
    yield from _section("training", Training)
    yield from _section("training.selection", Selection)
    yield from _section("training.early_stopping", EarlyStopping)
    yield from _section("checkpoint", Checkpoint)
    yield from _section("tracking", Tracking)
    yield from _section("resources", Resources)
    yield from _section("claim", Claim)
    yield from _variant(AccuracyRange, "test_accuracy: {at_most: 0.3}")
    yield from _variant(LossRange, "test_loss: {at_least: 1, at_most: 1.5}")
    yield from ("", "## Sweep files", "", SWEEP)
    yield from _table(Sweep)
    yield "\nA range:\n"
    yield from _table(Range)
    yield from _section("prune", Prune)
    yield from ("", "## Cluster profiles", "", PROFILE)
    yield from _table(Cluster)
    yield from _section("container", Container)


def _section(name: str, model: type[BaseModel], words: str = "") -> Iterator[str]:
    yield from ("", f"### `{name}`", "", words or _paragraph(model), "")
    yield from _table(model)


def _variant(model: type[BaseModel], title: str, base: type[BaseModel] | None = None) -> Iterator[str]:
    """One model of a union, without the fields of ``base``, which have been shown."""
    yield from ("", f"#### `{title}`", "", _paragraph(model))
    rows = list(_table(model, skip=base))
    if len(rows) > 2:
        yield from ("", *rows)


def _layers() -> Iterator[str]:
    """Each layer; those without options in one table."""
    plain = [kind for kind in get_args(AnyLayer) if set(kind.model_fields) == {"type"}]
    yield "\n##### Layers without options\n"
    yield "| layer | makes |"
    yield "|---|---|"
    yield from (f"| `{_name(kind)}` | {_about(kind)} |" for kind in plain)
    for kind in get_args(AnyLayer):
        if kind not in plain:
            yield from ("", f"##### `{_name(kind)}`", "", _paragraph(kind), "")
            yield from _table(kind)


def _table(model: type[BaseModel], skip: type[BaseModel] | None = None) -> Iterator[str]:
    schema, texts = model.model_json_schema(), descriptions(model)
    yield "| field | value | default | meaning |"
    yield "|---|---|---|---|"
    for name, field in model.model_fields.items():
        if name not in texts or (skip is not None and name in skip.model_fields):  # a name that chooses the model has no text
            continue
        default = _default(field.get_default(call_default_factory=True))
        if model is Cluster and name == "name":  # what reads the file fills it in
            default = "the file's"
        cells = [_code(name), _values(schema["properties"][name], schema), default, texts[name]]
        yield "| " + " | ".join(cell.replace("``", "`").replace("|", r"\|") for cell in cells) + " |"


def _kinds(union: Any) -> Sequence[type[BaseModel]]:
    return get_args(get_args(union)[0])


def _name(kind: type[BaseModel]) -> str:
    field = "type" if "type" in kind.model_fields else "name"
    return str(get_args(kind.model_fields[field].annotation)[0])


def _about(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").replace("``", "`").split())


def _paragraph(model: type[BaseModel]) -> str:
    return textwrap.fill(_about(model), 132, break_long_words=False, break_on_hyphens=False)


def _code(value: Any) -> str:
    return f"`{value}`"


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        return ""
    if isinstance(value, tuple):
        value = list(value)
    return _code(value if isinstance(value, str) and value.isidentifier() else json.dumps(value))


def _values(schema: dict[str, Any], root: dict[str, Any]) -> str:
    """What a field may hold, in words."""
    kinds = schema.get("anyOf") or ("discriminator" not in schema and schema.get("oneOf"))
    if kinds:
        words = list(dict.fromkeys(_values({**inner, **_bounds(schema)}, root) for inner in kinds))
        if {"whole number", "number"} <= {word.partition(" above")[0] for word in words}:  # a number that stays whole if it is
            words = [word for word in words if not word.startswith("whole number")]
        return " or ".join(words)
    if "enum" in schema:
        return ", ".join(_code(name) for name in schema["enum"])
    if "const" in schema:
        return _code(schema["const"])
    if "oneOf" in schema:
        return "layer" if schema["discriminator"]["propertyName"] == "type" else "mapping"
    if "$ref" in schema:
        return "mapping"
    match schema.get("type"):
        case "null":
            return "`null`"
        case "boolean":
            return "`true`, `false`"
        case "integer" | "number" as kind:
            return _number("whole number" if kind == "integer" else "number", schema)
        case "array":
            inner = _values(schema.get("items", {}), root)
            noun, _, bounds = inner.partition(" from ")
            return f"list of {noun}s" + f" from {bounds}" * bool(bounds) if inner else "list"
        case "object":
            return "mapping"
        case "string":
            return '`"HH:MM:SS"`, `"D-HH:MM:SS"`' if schema.get("pattern") == DURATION_PATTERN else "text"
    return ""


def _bounds(schema: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in schema.items() if key in ("ge", "gt", "le", "lt")}


def _number(noun: str, schema: dict[str, Any]) -> str:
    low = next((schema[key] for key in ("ge", "minimum") if key in schema), None)
    above = next((schema[key] for key in ("gt", "exclusiveMinimum") if key in schema), None)
    high = next((schema[key] for key in ("le", "maximum") if key in schema), None)
    below = next((schema[key] for key in ("lt", "exclusiveMaximum") if key in schema), None)
    words = [noun]
    if low is not None:
        words.append(f"from {low:g}")
    if above is not None:
        words.append(f"above {above:g}")
    if high is not None and high < UNBOUNDED:
        words.append(f"to {high:,}")
    if below is not None and below < UNBOUNDED:
        words.append(f"and below {below:g}")
    return " ".join(words)
