"""Freed memory that stays: counted in page faults, of which no machine has more or fewer."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

STEPS = """
import resource, sys, torch
from hpc_cifar.train.heap import keep_freed_memory

said = [keep_freed_memory() for _ in sys.argv[1:]]

def step():
    one = torch.ones(25_000_000)
    return float((one + one)[0])

for _ in range(20):  # until its places are found among the small blocks
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(said, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*words: str, **environment: str) -> tuple[str, int]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | environment
    done = subprocess.run([sys.executable, "-c", STEPS, *words], capture_output=True, text=True, env=kept, check=False)
    assert done.returncode == 0, done.stderr
    said, _, count = done.stdout.strip().rpartition(" ")
    return said, int(count)


@pytest.mark.slow
def test_a_step_gets_the_pages_of_the_step_before_it() -> None:
    said, least = faults("keep")
    assert said == "[True]" and least < 2_000, "48,828 pages a step are written"
    assert faults()[1] > 10 * max(least, 1), "what a program has that does not ask for it"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "131072", "[False]"),
        ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=131072", "[False]"),
        ("MALLOC_ARENA_MAX", "2", "[True]"),  # of something else
    ],
)
def test_what_a_user_has_chosen_is_left_alone(name: str, value: str, said: str) -> None:
    assert faults("keep", **{name: value})[0] == said
