"""Datasets and trained runs of a colleague, as real commands of two users."""

from __future__ import annotations

import json
from pathlib import Path

from two_users import Site
from two_users import shared as shared
from two_users import two_users as two_users


def test_a_store_of_a_colleague(shared: Site) -> None:
    """Made under a narrow umask, it can be read; where its owner hides it, the message names them."""
    data = shared.folder / "data"
    data.mkdir()
    shared.bob.owns(data)
    places = {"HPC_CIFAR_DATA": str(data)}
    assert shared.bob.types("prepare", "digits", umask=0o077, **places).returncode == 0
    done = shared.alice.types("prepare", "digits", **places)  # she cannot write there
    assert done.returncode == 0 and "digits: is prepared already" in done.stdout, done.stdout + done.stderr
    (data / "digits" / "train-labels.npy").chmod(0o600)
    for words in (["submit", "quickstart-digits", "--cluster", "local"], ["prepare", "digits"]):
        done = shared.alice.types(*words, **places, HPC_CIFAR_RUNS=str(shared.alice.home / "runs"))
        assert done.returncode == 2 and "damaged" not in done.stderr, done.stderr
    done = shared.alice.types("submit", "quickstart-digits", "--cluster", "local", **places)
    assert f"cannot be read by you; ask its owner {shared.bob.name}: chmod -R a+rX {data}/digits" in done.stderr, done.stderr
    (data / "digits").chmod(0o700)
    done = shared.alice.types("submit", "quickstart-digits", "--cluster", "local", **places)
    assert f"cannot be read by you; ask its owner {shared.bob.name}" in done.stderr, done.stderr


def test_a_colleagues_run_is_evaluated_into_a_folder_of_ones_own(shared: Site) -> None:
    root, data = shared.folder / "runs", shared.folder / "data"
    for folder in (root, data):
        folder.mkdir()
        shared.bob.owns(folder)
    places = {"HPC_CIFAR_DATA": str(data), "HPC_CIFAR_RUNS": str(root)}
    assert shared.bob.types("prepare", "digits", **places).returncode == 0
    words = ["train", "quickstart-digits", "--name", "net", "--set", "epochs=1", "--set", "tracking.wandb=disabled"]
    done = shared.bob.types(*words, **places)
    assert done.returncode == 0, done.stderr
    shared.bob.runs("chmod", "-R", "a+rX", str(root / "net"))
    before = sorted(root.rglob("*"))
    run = str(root / "net")
    refused = shared.alice.types("evaluate", run, **places)
    assert (
        refused.returncode == 2 and f"is a run of {shared.bob.name}, where you do not write; add --out FOLDER" in refused.stderr
    )
    done = shared.alice.types("evaluate", run, "--no-pictures", "--json", "--out", "mine", **places)
    assert done.returncode == 0, done.stderr
    assert 0 < json.loads(done.stdout)["accuracy"] <= 1
    assert (Path(shared.alice.home) / "mine" / "evaluation.json").is_file()
    assert sorted(root.rglob("*")) == before, "nothing of his was touched"
