"""What W&B costs a training: disabled, beside a server that answers, and beside servers that do everything else.

    python benchmarks/tracking.py --rounds 9 --json docs/results/tracking-2-cores.json --set epochs=100

A server hangs, answers without end, in circles of redirects, in HTML with escape sequences, or with 100 MB of headers.
The seconds are those from the first step to the last epoch's end, by the run's own metrics; the processor seconds are those of
the rank alone, from its start to its end. Kinds take turns in every round, and begin it by turns. The start of the client falls
into the seconds, so a training should last half a minute at least.
The training has half the processors, so that what the rest of the machine does disturbs it less; the client and the server have
the others, as a client has on a cluster. The servers are those of the tests, on loopback; the client is the real one.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hpc_cifar import files, processes
from hpc_cifar.data import bench
from hpc_cifar.track import bounds

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import wandb_server  # noqa: E402

KINDS = {
    "disabled": None,
    "online": None,
    "hanging": wandb_server.HANG,
    "endless": wandb_server.ENDLESS,
    "redirects": wandb_server.REDIRECT,
    "html": wandb_server.HTML,
    "headers": wandb_server.HEADERS,
}
ESCAPES = (b"\x1b", b"\x07")
LOOK_S = 0.2


@dataclasses.dataclass
class Taken:
    """What one training took: seconds, processor seconds of its rank, the most bytes of the processes beside it."""

    seconds: float
    processor: float = 0.0
    beside: int = 0


def watched(child: subprocess.Popen[bytes]) -> Taken:
    """Wait for the rank, and look at what it has started meanwhile."""
    taken = Taken(0.0)
    while not os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
        taken.beside = max(taken.beside, sum(map(bounds.resident, processes.descendants(child.pid))))
        time.sleep(LOOK_S)
    fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()  # of the rank alone, which has ended
    taken.processor = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return taken


def train(folder: Path, kind: str, job: str, sets: list[str], threads: int) -> Taken:
    """One training."""
    with wandb_server.serving() as server:
        if (trouble := KINDS[kind]) is not None:
            server.trouble = lambda what, number: trouble
        mode = "disabled" if kind == "disabled" else "online"
        command = [sys.executable, "-m", "hpc_cifar", "train", job, "--name", kind]
        for change in (*sets, f"tracking.wandb={mode}"):
            command += ["--set", change]
        environment = {**os.environ, **server.environment, "HPC_CIFAR_RUNS": str(folder), "HPC_CIFAR_THREADS": str(threads)}
        said = folder / "said"
        with said.open("wb") as stream:
            child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=stream)
            taken = watched(child)
            code = child.wait()
        words = said.read_bytes()
        assert code == 0, words[-2000:].decode(errors="replace")
        assert not any(escape in words for escape in ESCAPES), f"{kind}: the server's text came through: {words[-2000:]!r}"
        rows = files.read_json_lines(folder / kind / "metrics.jsonl")
        [begin] = [row["time"] for row in rows if row.get("event") == "first step"]
        taken.seconds = max(row["time"] for row in rows if row["kind"] == "epoch") - begin
        if kind == "online":
            [kept] = server.runs.values()
            curves = [row for row in rows if row["kind"] != "event"]
            shown = [row for row in kept.history if not any(key.startswith("evaluation/") for key in row)]  # no pictures
            assert len(shown) == len(curves), f"it has {len(shown)} of {len(curves)} rows"
    return taken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", default="quickstart-digits")
    parser.add_argument("--set", action="append", default=[], dest="sets", help="a.b=value for all of them")
    parser.add_argument("--rounds", type=int, default=5)
    cpus = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, default=max(1, cpus // 2), help="of the training")
    parser.add_argument("--kinds", default=",".join(KINDS), help="with commas; the first one is compared with")
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args()
    kinds = tuple(options.kinds.split(","))
    every: dict[str, list[Taken]] = {kind: [] for kind in kinds}
    for number in range(options.rounds + 1):
        for kind in (*kinds[number % len(kinds) :], *kinds[: number % len(kinds)]):
            with tempfile.TemporaryDirectory(prefix="hpc-cifar-bench-") as folder:
                found = train(Path(folder), kind, options.job, options.sets, options.threads)
            if number:  # a first round fills caches
                every[kind].append(found)
    report: dict[str, Any] = {"job": options.job, "set": options.sets, "threads": options.threads, "n": options.rounds}
    for name in ("seconds", "processor"):
        report[name] = {kind: [round(getattr(one, name), 3) for one in taken] for kind, taken in every.items()}
        told = report[name]
        ratios = {kind: [x / y for x, y in zip(told[kind], told[kinds[0]], strict=True)] for kind in kinds[1:]}
        report[f"{name}_ratio"] = {kind: round(statistics.median(values), 4) for kind, values in ratios.items()}
    report["beside_mib"] = {kind: max(one.beside for one in taken) >> 20 for kind, taken in every.items()}
    report |= {"hardware": bench.hardware(), "versions": bench.versions()}
    for kind in kinds:
        values, processor = report["seconds"][kind], statistics.median(report["processor"][kind])
        print(
            f"{kind:9} {statistics.median(values):7.2f} s ({min(values):.2f} to {max(values):.2f}, n = {len(values)}), "
            f"rank {processor:.2f} s of processor, beside it at most {report['beside_mib'][kind]} MiB"
        )
    for name in ("seconds", "processor"):
        said = ", ".join(f"{kind} {value:.3f}" for kind, value in report[f"{name}_ratio"].items())
        print(f"median ratio of {name} to {kinds[0]}: {said}")
    if options.json:
        files.write_json(options.json.absolute(), report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
