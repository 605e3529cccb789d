"""One rank of a run, as a process: ``rank_main.py RUN_DIR DATA_ROOT [MAX_STEPS] [SEEN_FILE]``.

With SEEN_FILE, every rank appends what it was given: ``epoch batch hash,hash,...``, one hash per image of its shard.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hpc_cifar.data import pipeline as data
from hpc_cifar.errors import HpcCifarError
from hpc_cifar.runs import Run
from hpc_cifar.train.loop import train


def record_batches(path: Path) -> None:
    build = data.build

    def recording(*args: Any, **kwargs: Any) -> Any:
        inner = build(*args, **kwargs)

        class Recorder:
            name = inner.name

            def batches(self, epoch: int, first: int = 0) -> Iterator[data.Batch]:
                for batch in inner.batches(epoch, first):
                    images = batch.images.contiguous().numpy()
                    names = [hashlib.sha1(image.tobytes()).hexdigest()[:16] for image in images]
                    with path.open("a") as stream:
                        stream.write(f"{epoch} {batch.number} {','.join(names)}\n")
                    yield batch

            def close(self) -> None:
                inner.close()

        return Recorder()

    data.build = recording


def main() -> None:
    run, root = Run(Path(sys.argv[1])), Path(sys.argv[2])
    max_steps = int(sys.argv[3]) if len(sys.argv) > 3 and sys.argv[3] else None
    if len(sys.argv) > 4:
        record_batches(Path(f"{sys.argv[4]}.{os.environ.get('RANK', '0')}"))
    try:
        train(run, max_steps=max_steps, data_root=root, console=True)
    except HpcCifarError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


main()
