"""All that is measured on two CPU cores, in under a quarter of an hour if nothing else runs.

    python benchmarks/cpu_suite.py --out OUT
    python benchmarks/cpu_suite.py --out OUT --parts step,restart
    python benchmarks/cpu_suite.py --out OUT --miniature             shows that every part runs

Copy OUT/*.json and OUT/curves to docs/results and type ``make figures``. What takes longer: the published systems (``make
systems``), the transfer (benchmarks/transfer.py), the recipes with three seeds (benchmarks/systems.py quickstart speed-cpu
--seeds 3).
"""

from __future__ import annotations

import sys
from pathlib import Path

import suite
from suite import main, package, script


def parts(out: Path, small: bool) -> dict[str, list[str]]:
    step = suite.STEP if small else ("--steps=4", "--rounds=5")
    restart = suite.RESTART if small else ("--rounds=3",)
    checkpoint = suite.CHECKPOINT if small else ()
    data = suite.DATA if small else ("--rounds=5",)
    scaling = suite.SCALING if small else ("--world-size=1,2", "--steps=20", "--set=data.batch_size=256")
    recipe = ("--seeds=2", *suite.TRAINING) if small else ()
    return {
        "step": script("step", *step, json=out / "step-2-cores.json"),
        "data": script("data", *data, json=out / "data-2-cores.json"),
        "restart": script("restart", *restart, json=out / "restart-2-cores.json"),
        "checkpoint": package("bench", "checkpoint", "deep300", *checkpoint, json=out / "checkpoint-2-cores.json"),
        "scaling": package("bench", "step", "deep300", *scaling, json=out / "scaling-2-cores.json"),
        "recipe": script("systems", "quickstart", *recipe, json=out / "recipes-2-cores.json"),
    }


if __name__ == "__main__":
    sys.exit(main(__doc__, parts, minutes=15))
