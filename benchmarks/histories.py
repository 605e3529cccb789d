"""Random histories of runs under the policy of today and under the behaviour before it, and what broke in each.

    python benchmarks/histories.py --histories 100000 --on-disk 2000 --before 20000 --json docs/results/histories.json

Nothing is trained and nothing sleeps: ``tests/life`` plays Slurm and the ranks in virtual time, with the real policy and
executor. The behaviour before is that of commit 8631392, written from its code.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from life import old, stories  # noqa: E402
from life.stores import Folder  # noqa: E402
from life.world import Story, World  # noqa: E402

CHUNK = 500
HARD = 20  # stories of each rule that are shortened, of which the shortest is told


def before(story: Story) -> World:
    world = old.old_world(story)
    world.play()
    stories.judge(world)
    return world


def part(work: tuple[str, int, int]) -> tuple[int, float, Counter[str], Counter[str], dict[str, list[int]]]:
    """Seeds from a first to before a last one: histories, seconds of processor, what they met, rules broken, by which seeds."""
    kind, first, last = work
    met: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    seeds: dict[str, list[int]] = {}
    began = time.process_time()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        for seed in range(first, last):
            story = stories.drawn(random.Random(seed))
            if kind == "disk":
                world = World(story, make=lambda number, seed=seed: Folder(Path(folder, f"{seed}-{number}")))  # type: ignore[misc]
                world.play()
                stories.judge(world)
            else:
                world = stories.play(story) if kind == "now" else before(story)
            met.update(world.met)
            wrong.update(set(world.wrong))
            for rule in world.wrong:
                seeds.setdefault(rule, []).append(seed)
    return last - first, time.process_time() - began, met, wrong, seeds


def played(kind: str, histories: int, pool: Any) -> dict[str, Any]:
    began = time.perf_counter()
    met: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    seeds: dict[str, list[int]] = {}
    used = 0.0
    for _, seconds, some, bad, where in pool.imap_unordered(
        part, [(kind, first, min(first + CHUNK, histories)) for first in range(0, histories, CHUNK)]
    ):
        used += seconds
        met.update(some)
        wrong.update(bad)
        for rule, found in where.items():
            seeds.setdefault(rule, []).extend(found)
    told = {}
    play, make = (before, old.old_world) if kind == "before" else (stories.play, World)
    for rule, found in sorted(seeds.items()):
        short = min(
            (stories.shortest(stories.drawn(random.Random(seed)), rule, play) for seed in sorted(found)[:HARD]),
            key=lambda story: len(str(story)),
        )
        told[rule] = stories.told(short, rule, make).splitlines()
    return {
        "histories": histories,
        "seconds": round(time.perf_counter() - began, 1),
        "processor_seconds": round(used, 1),
        "met": dict(sorted(met.items())),
        "broken": dict(sorted(wrong.items())),
        "shortest": told,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--histories", type=int, default=100_000, help="over records in memory")
    parser.add_argument("--on-disk", type=int, default=2_000, help="over real run directories")
    parser.add_argument("--before", type=int, default=20_000, help="under the behaviour before")
    parser.add_argument("--json", type=Path, help="write the result here too")
    options = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(len(os.sched_getaffinity(0))) as pool:
        result = {
            "cores": len(os.sched_getaffinity(0)),
            "now": played("now", options.histories, pool),
            "on_disk": played("disk", options.on_disk, pool),
            "before": played("before", options.before, pool),
        }
    text = json.dumps(result, indent=1) + "\n"
    print(text, end="")
    if options.json:
        options.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
