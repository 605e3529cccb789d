"""A command bounds the memory of its own process; tests that run one in theirs leave nothing of that to the next."""

from __future__ import annotations

import os
import resource

import pytest

from hpc_cifar.track import bounds

LIMIT = resource.getrlimit(resource.RLIMIT_DATA)
THREADS = os.environ.get("OPENBLAS_NUM_THREADS")


@pytest.mark.parametrize("time", ["first", "second"])
def test_the_bound_is_gone_with_the_test(time: str) -> None:
    """The second time fails if the first one has left anything."""
    assert (resource.getrlimit(resource.RLIMIT_DATA), os.environ.get("OPENBLAS_NUM_THREADS")) == (LIMIT, THREADS)
    bounds.bound_command()
    assert 0 < resource.getrlimit(resource.RLIMIT_DATA)[0] != LIMIT[0]
    assert os.environ["OPENBLAS_NUM_THREADS"]
