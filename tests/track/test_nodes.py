"""Rows of nodes and norms in W&B: the real client, to a server on loopback."""

from __future__ import annotations

from pathlib import Path

import pytest
from mirrored import a_run, sync
from wandb_server import Server

from hpc_cifar import files
from hpc_cifar.track.metrics import MetricsLog

pytestmark = [pytest.mark.component("wandb"), pytest.mark.slow]


def test_figures_of_nodes_and_norms_are_panels_beside_the_curves(server: Server, tmp_path: Path) -> None:
    """Each once, also after a segment that was killed between the row of the nodes and that of the epoch."""
    run = a_run(tmp_path)
    for begin, end in ((0, 20), (10, 30)):
        log = MetricsLog(run.metrics_file, begin)
        log.write("event", epoch=begin // 10, step=begin, event="started")
        for step in range(begin + 1, end + 1):
            log.write("step", epoch=step // 10, step=step, train_loss=1 / step, grad_norm=None if step == 3 else step / 2)
            if step % 10 == 0:
                log.write("system", epoch=step // 10, step=step, node0_cpu_percent=50.0, node1_gpu0_percent=float(step))
                if (begin, step) != (0, 20):
                    log.write("epoch", epoch=step // 10, step=step, val_loss=2 / step, val_accuracy=step / 100)
        log.close()
        run.update_state(state="finished" if end == 30 else "running", data="digits", restarts=0, gpu_hours=0.5)
        if end == 30:
            files.write_json(run.result_file, {"state": "finished", "test_accuracy": 0.75})
        sync(run, server)
    [kept] = server.runs.values()
    nodes = {row["global_step"]: row for row in kept.history if "nodes/node1_gpu0_percent" in row}
    assert [row["nodes/node1_gpu0_percent"] for row in nodes.values()] == list(nodes) == [10, 20, 30]
    assert all(row["nodes/node0_cpu_percent"] == 50.0 and "val_loss" not in row for row in nodes.values())
    norms = [row["step/grad_norm"] for row in kept.history if "step/grad_norm" in row]
    assert norms == [step / 2 for step in range(1, 31) if step != 3], "one that was not finite is not there"
    assert [row["epoch"] for row in kept.history if "val_loss" in row] == [1, 2, 3]
    assert not any(name.startswith("system/") for row in kept.history for name in row), "these names are the client's own"
