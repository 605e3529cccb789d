"""What the checks of other people's files cost at the start of a training and in ``status``, beside another checkout.

    python benchmarks/checks.py --package ../before --repeat 9 --json docs/results/checks-2-cores.json

The first start on a host looks through the caches of compiled code and reads the store whole; later ones know both. Each round
starts a training of one step with a new home, starts it there once more, and asks for the ``status`` of many runs, with both
checkouts in turn. Differences of each round count. Run nothing else beside it.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from report_runs import make

from hpc_cifar import files

JOB = "quickstart"
WHAT = ("first start", "later start", "status")


def timed(words: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Seconds, and processor seconds with those of children, of a command."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "hpc_cifar", *words], env=environment, capture_output=True, text=True, check=False
    )
    seconds, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stderr[-2000:]}")
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def one_round(package: Path | None, data: Path, many: Path, folder: Path) -> list[tuple[float, float]]:
    """A first start, a later one, and ``status`` of many runs."""
    home = folder / "home"
    home.mkdir(parents=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "NUMBA_", "TRITON_"))}
    environment |= {"HOME": str(home), "HPC_CIFAR_DATA": str(data), "HPC_CIFAR_RUNS": str(folder / "runs")}
    if package is not None:
        environment |= {"PYTHONPATH": str(package), "PYTHONSAFEPATH": "1"}
    train = ["train", JOB, "--max-steps", "1", "--set", "tracking.wandb=disabled"]
    starts = [timed([*train, "--name", name], environment) for name in ("first", "later")]
    return [*starts, timed(["status", "--json"], {**environment, "HPC_CIFAR_RUNS": str(many)})]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, required=True, help="the other checkout")
    parser.add_argument("--data", type=Path, help="folder of prepared CIFAR-10; HPC_CIFAR_DATA, or data, unless given")
    parser.add_argument("--runs", type=int, default=3000, help="of `status`")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    data = (options.data or Path(os.environ.get("HPC_CIFAR_DATA", "data"))).absolute()
    package = options.package.resolve()
    found: dict[str, dict[str, list[tuple[float, float]]]] = {what: {"here": [], "there": []} for what in WHAT}
    with tempfile.TemporaryDirectory(prefix="hpc-cifar-checks-") as temporary:
        folder = Path(temporary)
        (folder / "many").mkdir()
        make(folder / "many", options.runs, epochs=3, each=10)
        for number in range(-1, options.repeat):  # the first round is for the page cache
            for place, other in (("here", None), ("there", package)):
                taken = one_round(other, data, folder / "many", folder / f"{place}-{number}")
                for what, seconds in zip(WHAT, taken, strict=True):
                    if number >= 0:
                        found[what][place].append(seconds)
    rows = {}
    for what in WHAT:
        pairs = list(zip(found[what]["here"], found[what]["there"], strict=True))
        wall, cpu = (statistics.median(one[kind] - other[kind] for one, other in pairs) for kind in (0, 1))
        middle = {place: statistics.median(seconds for seconds, _ in found[what][place]) for place in ("here", "there")}
        rows[what] = {"more_s": round(wall, 3), "more_cpu_s": round(cpu, 3), "seconds": found[what]}
        both = f"{middle['here']:.2f} s, {middle['there']:.2f} s there"
        print(f"{what}: {both}; {wall:+.3f} s, processor {cpu:+.3f} s (n = {len(pairs)})")
    if options.json:
        about = {"runs": options.runs, "processors": os.cpu_count(), "machine": platform.machine(), "rows": rows}
        files.write_json(options.json.absolute(), about)


if __name__ == "__main__":
    main()
