"""What a user's commands do with the runs, folders, profiles and datasets of another user; as real commands of both."""

from __future__ import annotations

from two_users import Site
from two_users import shared as shared
from two_users import two_users as two_users


def test_smoke(shared: Site) -> None:
    done = shared.alice.types("status", HPC_CIFAR_RUNS=str(shared.folder / "runs"))
    assert (done.returncode, done.stdout) == (0, f"no runs in {shared.folder}/runs\n"), done.stderr
