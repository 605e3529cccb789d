"""JSON Schema of the experiment file, for editors (``# yaml-language-server: $schema=...``).

pydantic writes the schema of the models; this adds what each field means, and what their validators accept beyond it: layers in
short form and numbers as text.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Sequence
from typing import Any

from .described import descriptions, models_of
from .experiment import NAME_PATTERN, Experiment
from .fields import NUMBER_TEXT
from .layers import LAYER_NAMES

DIALECT = "https://json-schema.org/draft/2020-12/schema"

DATASET_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,31}$"

# pydantic keeps its own names for bounds that stand behind a validator
_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


def experiment_schema() -> dict[str, Any]:
    """The schema of one experiment file, draft 2020-12."""
    generated: dict[str, Any] = Experiment.model_json_schema()
    definitions: dict[str, Any] = generated["$defs"]
    for name, model in models_of(Experiment).items():
        properties = (generated if model is Experiment else definitions[name])["properties"]
        for field, text in descriptions(model).items():
            properties[field]["description"] = text.replace("``", "`")
    definitions["Layer"] = _layer(definitions, "Layer", LAYER_NAMES)
    definitions["InnerLayer"] = _layer(definitions, "InnerLayer", [name for name in LAYER_NAMES if name != "residual"])
    definitions["SequentialModel"]["properties"]["layers"]["items"] = {"$ref": "#/$defs/Layer"}
    for kind, field in itertools.product(("Residual", "ResidualOptions"), ("layers", "shortcut")):
        definitions[kind]["properties"][field]["items"] = {"$ref": "#/$defs/InnerLayer"}
    definitions["Data"]["properties"]["dataset"]["pattern"] = DATASET_PATTERN
    generated["properties"]["name"]["pattern"] = f"^{NAME_PATTERN.pattern}$"
    schema: dict[str, Any] = _tidy(generated)
    return {"$schema": DIALECT, **schema, "title": "hpc-cifar experiment"}


def schema_text() -> str:
    """The schema as the file that ``hpc-cifar schema`` writes."""
    return json.dumps(experiment_schema(), indent=1) + "\n"


def _layer(definitions: dict[str, Any], title: str, names: Sequence[str]) -> dict[str, Any]:
    """``relu``, ``conv: {...}`` or ``{type: conv, ...}``; adds a definition of each layer's options."""
    by_name = {
        definition["properties"]["type"]["const"]: key
        for key, definition in definitions.items()
        if definition.get("properties", {}).get("type", {}).get("const") in LAYER_NAMES
    }
    bare: list[str] = []
    short: dict[str, Any] = {}
    for name in names:
        definition = definitions[by_name[name]]
        options = copy.deepcopy(definition)
        del options["properties"]["type"]
        options["required"] = [field for field in options.get("required", ()) if field != "type"]
        definitions[f"{by_name[name]}Options"] = options
        short[name] = {"$ref": f"#/$defs/{by_name[name]}Options"}
        if not options["required"]:
            bare.append(name)
            short[name] = {"anyOf": [short[name], {"type": "null"}]}
        if "description" in definition:
            short[name]["description"] = definition["description"]
    one_key = {"type": "object", "properties": short, "additionalProperties": False, "minProperties": 1, "maxProperties": 1}
    return {
        "title": title,
        "description": "A layer without options is its name; one with options is a one-key mapping.",
        "anyOf": [{"enum": bare}, one_key, *({"$ref": f"#/$defs/{by_name[name]}"} for name in names)],
    }


def _tidy(node: Any) -> Any:
    """Numbers also as text; without OpenAPI's ``discriminator``, which JSON Schema does not know."""
    if isinstance(node, list):
        return [_tidy(item) for item in node]
    if not isinstance(node, dict):
        return node
    tidy = {key: _tidy(value) for key, value in node.items() if not (key == "discriminator" and "propertyName" in str(value))}
    if tidy.get("type") not in ("number", "integer"):
        return tidy
    tidy = {_BOUNDS.get(key, key): value for key, value in tidy.items()}
    outside = {key: tidy.pop(key) for key in ("title", "description", "default") if key in tidy}
    return {"anyOf": [tidy, {"type": "string", "pattern": NUMBER_TEXT}], **outside}
