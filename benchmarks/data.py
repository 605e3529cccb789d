"""Images per second of the data pipelines, beside what a user would write, in interleaved rounds of one process.

    python benchmarks/data.py --rounds 5 --json data.json

Every round runs each candidate once on the same images, so that a busy machine slows all of them; the medians are compared.
With ``--check`` the exit code is 1 where a ratio that the project promises for two cores is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import stock_loaders
import torch

from hpc_cifar import files
from hpc_cifar.data import bench
from hpc_cifar.data.choice import problem
from hpc_cifar.data.store import Arrays, Store, moments_of
from hpc_cifar.errors import DataError

BASE = "torchvision, 2 workers"
# ratio of two medians, the least it should be
PROMISES = {("ffcv", "stock FFCV"): 5.0, ("resident", BASE): 20.0, ("dali", "stock FFCV"): 2.0}


def arrays_of(dataset: str, count: int) -> tuple[Arrays, str]:
    try:
        store = Store.open(files.data_root(), dataset)
        return store.train, store.label
    except DataError:
        images = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        return Arrays(images, np.arange(count, dtype=np.int64) % 10, moments_of(images)), "random pixels"


def candidates(arrays: Arrays, count: int, batch_size: int) -> dict[str, bench.Candidate]:
    """Slow ones get fewer images."""
    few = min(count, max(batch_size, count // 10))
    images, labels = np.array(arrays.images[:count]), np.array(arrays.labels[:count])
    made: dict[str, bench.Candidate] = {}
    for workers in (0, 2):
        made[f"torchvision, {workers} workers"] = (
            few, stock_loaders.torchvision(images[:few], labels[:few], batch_size, workers),
        )  # fmt: skip
    threads = stock_loaders.threads()
    for name, stock in (("ffcv", stock_loaders.ffcv), ("dali", stock_loaders.dali)):
        if not problem(name):
            with contextlib.redirect_stderr(io.StringIO()):  # FFCV's writer shows a progress bar
                made[f"stock {name.upper()}"] = (count, stock(images, labels, batch_size, threads))
    for name in bench.installed(arrays)[0]:
        images_of_a_round = few if name == "reference" else count
        made[name] = (images_of_a_round, bench.build(name, arrays, images_of_a_round, batch_size).batches)
    for kind, options in (("bf16", {"dtype": torch.bfloat16}), ("channels_last", {"channels_last": True})):
        made[f"resident, {kind}"] = (count, bench.build("resident", arrays, count, batch_size, **options).batches)  # type: ignore[arg-type]
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="cifar10", help="a prepared dataset; random pixels where there is none")
    parser.add_argument("--images", type=int, default=50_000, help="of an epoch; a tenth of it for the slow ones")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where the figures are written")
    parser.add_argument("--check", action="store_true", help="fail where a promised ratio is missed")
    options = parser.parse_args()
    torch.set_num_threads(stock_loaders.threads())
    arrays, label = arrays_of(options.dataset, options.images)
    count = min(options.images, len(arrays.labels))
    rates = bench.interleaved(candidates(arrays, count, options.batch_size), options.rounds)
    facts = bench.hardware()
    print(f"{label}, batch {options.batch_size}, {facts['cpu']}, {facts['cores']} cores, median of {options.rounds} rounds")
    print("\n".join(bench.table(rates, BASE)))
    missed = False
    for (name, beside), least in PROMISES.items():
        if name in rates and beside in rates:
            # round by round: what slows the machine slows both
            ratio = statistics.median(a / b for a, b in zip(rates[name], rates[beside], strict=True))
            missed |= ratio < least
            print(f"{name} / {beside}: {ratio:.1f} (at least {least:g}: {'yes' if ratio >= least else 'NO'})")
    if options.json:
        result: dict[str, Any] = {
            "data": label,
            "n": options.rounds,
            "batch_size": options.batch_size,
            "device": "cpu",
            "hardware": facts,
        }
        result |= {"versions": bench.versions(), "images_per_second": rates}
        files.write_json(options.json.absolute(), result)
    return int(missed and options.check)


if __name__ == "__main__":
    sys.exit(main())
