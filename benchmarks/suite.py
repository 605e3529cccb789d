"""Runs the parts of a suite one after another, each a process of its own, and says what it has.

What a part measured is JSON in OUT, its words a log there. A part that fails or takes too long does not stop the others, and is
begun again next time, where its trainings go on from their checkpoints; one that is done is not. Trainings of ``make systems``
wait meanwhile.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import quiet

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"

ADDED = ("recipes-", "systems-", "published-")

# the miniature of each script
STEP = ("--job=quickstart-digits", "--steps=2", "--rounds=1", "--rungs=channels_last,eager fused")
DATA = ("--dataset=digits", "--images=600", "--rounds=1")
RESTART = ("--dataset=digits", "--processes=2", "--rounds=1")
CHECKPOINT = ("--set=data.dataset=digits", "--batch-size=64", "--steps=2", "--rounds=1")
SCALING = ("--world-size=1,4", "--steps=15", "--set=data.dataset=digits", "--set=data.batch_size=64")
TRAINING = (
    "--set=epochs=1", "--set=data.dataset=digits", "--set=data.batch_size=64", "--set=schedule={name: constant}",
    "--set=checkpoint.every_epochs=1", "--set=resources={}",
)  # fmt: skip

Parts = Mapping[str, Sequence[str]]


def script(name: str, *options: str, json: Path | None = None) -> list[str]:
    """The command of one of the scripts beside this file."""
    return [sys.executable, str(BENCHMARKS / f"{name}.py"), *options, *(["--json", str(json)] if json else [])]


def package(*options: str, json: Path | None = None) -> list[str]:
    return [sys.executable, "-m", "hpc_cifar", *options, *(["--json", str(json)] if json else [])]


def run(part: str, command: Sequence[str], out: Path, runs: str, minutes: float) -> bool:
    """Whether it ended well; the end of its log has been printed."""
    began = time.perf_counter()
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "HPC_CIFAR_RUNS": runs, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
    log = out / f"{part}.log"
    with log.open("w") as stream:
        child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, process_group=0)
        try:
            word = f"exit code {child.wait(60 * minutes)}"
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # what it has started, too; a training goes on from its last checkpoint
            word = f"stopped after {minutes:g} minutes, exit code {child.wait()}"
        except BaseException:  # nothing of it may disturb what is measured next
            os.killpg(child.pid, signal.SIGKILL)
            raise
    print(f"== {part}: {word}, {time.perf_counter() - began:.0f} s", flush=True)
    print("\n".join(log.read_text(errors="replace").splitlines()[-12:]), flush=True)
    return child.returncode == 0


def main(description: str, parts_of: Callable[[Path, bool], Parts], minutes: float) -> int:
    """The command line of a suite; the number of parts that failed.

    Args:
        description: for ``--help``.
        parts_of: commands by name for a folder, the most valuable first; if its second argument is true, in miniature.
        minutes: what a part may take, unless the user says otherwise.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="for logs and figures; runs lie in HPC_CIFAR_RUNS, else OUT/runs"
    )
    parser.add_argument("--parts", help="only these, with commas between")
    parser.add_argument("--minutes", type=float, default=minutes, help="for each part")
    parser.add_argument("--budget", type=float, help="minutes in all: what does not begin before is left for next time")
    parser.add_argument("--again", action="store_true", help="also parts that are done")
    parser.add_argument("--miniature", action="store_true", help="on digits, a few steps of each: shows that it runs")
    parser.add_argument("--list", action="store_true", help="print the parts and their commands")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part that runs is ended, too
    out, runs = options.out.absolute(), os.environ.get("HPC_CIFAR_RUNS")
    if options.miniature:  # apart from what is measured
        out, runs = out / "miniature", None
    known = parts_of(out, options.miniature)
    wanted = [part.strip() for part in options.parts.split(",")] if options.parts else list(known)
    if unknown := set(wanted) - set(known):
        parser.error(f"--parts: unknown {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if options.list:
        print("\n".join(f"{part:12} {' '.join(known[part])}" for part in wanted))
        return 0
    out.mkdir(parents=True, exist_ok=True)
    if not options.miniature:  # figures of single trainings are added to those that there are
        for path in (ROOT / "docs" / "results").glob("*.json"):
            if path.name.startswith(ADDED) and not (out / path.name).exists():
                shutil.copy(path, out)
    with quiet.quiet():
        return _in_order(wanted, known, out, runs or str(out / "runs"), options)


def _in_order(wanted: Sequence[str], known: Parts, out: Path, runs: str, options: argparse.Namespace) -> int:
    began, failed, left = time.monotonic(), [], []
    for part in wanted:
        done = out / f"{part}.done"
        if done.exists() and not options.again:
            print(f"== {part}: done before")
            continue
        seconds = float("inf") if options.budget is None else 60 * options.budget - (time.monotonic() - began)
        if seconds <= 0:
            left.append(part)
        elif run(part, known[part], out, runs, min(options.minutes, seconds / 60)):
            done.touch()
        else:
            failed.append(part)
    for word, names in (("failed", failed), ("left for the next time", left)):
        if names:
            print(f"== {word}: {', '.join(names)}", file=sys.stderr)
    return len(failed)
