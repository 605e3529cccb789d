"""Every field says what it means, in the schema and on the page."""

from __future__ import annotations

from typing import Literal, get_origin

import pytest
from pydantic import BaseModel

from hpc_cifar.config.cluster import Cluster
from hpc_cifar.config.described import descriptions, models_of
from hpc_cifar.config.experiment import Experiment
from hpc_cifar.config.reference import markdown
from hpc_cifar.config.schema import experiment_schema
from hpc_cifar.config.sweep import Sweep

MODELS = {name: model for top in (Experiment, Sweep, Cluster) for name, model in models_of(top).items()}
PAGE = markdown()


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_every_field_has_a_meaning(model: type[BaseModel]) -> None:
    told = descriptions(model)
    for name, field in model.model_fields.items():
        if name in ("type", "name", "family") and get_origin(field.annotation) is Literal:
            assert name not in told, "it chooses the model"
            continue
        assert told[name].endswith("."), told[name]
        assert f"| {told[name].replace('``', '`').replace('|', chr(92) + '|')} |" in PAGE
    assert (model.__doc__ or "").strip()


def test_an_editor_shows_them() -> None:
    schema = experiment_schema()
    assert schema["properties"]["seed"]["description"] == descriptions(Experiment)["seed"]
    assert schema["$defs"]["Data"]["properties"]["batch_size"]["description"].startswith("Images of one step")
    assert "`whiten`" in schema["$defs"]["ConvOptions"]["properties"]["init"]["description"]


def test_bounds_and_defaults_are_those_of_the_models() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| `")]
    assert "| `nodes` | whole number from 1 to 10,000 | `1` | Nodes. |" in rows
    assert any(row.startswith('| `time` | `"HH:MM:SS"`, `"D-HH:MM:SS"` | `"01:00:00"` |') for row in rows)
    assert any(row.startswith("| `validation` | `test` or number above 0 and below 1 | `0.1` |") for row in rows)
    assert any(row.startswith("| `layers` | list of layers | required |") for row in rows)
