"""A preempted job that streams to W&B, by the real client to a server on loopback; a sweep."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
import wandb_server
import yaml
from optuna.storages.journal import JournalFileBackend
from slurm_site import EPOCH_STEPS, EPOCHS, Site, SlurmCluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400), pytest.mark.component("slurm"), pytest.mark.component("wandb")]


def test_a_run_that_is_preempted_three_times_is_one_wandb_run(
    slurm_cluster: SlurmCluster, tmp_path: Path, digits_data: Path
) -> None:
    cluster = slurm_cluster
    site, epochs = Site(cluster, tmp_path, digits_data), 3 * EPOCHS  # enough for three slow starts of W&B
    with wandb_server.serving() as server:
        site.environment |= server.environment
        site.step_takes(0.8)  # there is time for W&B to answer
        options = (
            "--nodes",
            "1",
            "--set",
            "tracking.wandb=online",
            "--set",
            "training.log_every_steps=1",
            "--set",
            f"epochs={epochs}",
        )
        run, job = site.submit("--partition", "low6", *options)
        arrived = 0
        for restart in range(3):
            site.until_epoch(restart + 1, run)
            # nothing waits for a W&B that has not answered yet, so it is asked before
            cluster.until(lambda known=arrived: rows_at(server) > known, 60, "rows of this segment at the server")
            high = cluster.batch("--partition=high", "--nodes=3", "--exclusive", script="sleep 1")
            cluster.wait(high)
            cluster.wait(job, {"RUNNING"})
            cluster.until(lambda wanted=restart + 1: site.state(run).get("restarts") == wanted, 60, "the next segment")
            arrived = rows_at(server)
        site.hasten()
        [result] = site.finished(run)
        cluster.wait(job)
        [kept] = server.runs.values()
        assert result["restarts"] == 3 and kept.ended[-1] == 0
        steps = [row["global_step"] for row in kept.history if "step/train_loss" in row]
        assert steps == list(range(1, epochs * EPOCH_STEPS + 1)), "every step, and once"
        logged = {row["step"]: row["train_loss"] for row in site.rows(run, "step")}
        assert {row["global_step"]: row["step/train_loss"] for row in kept.history if "step/train_loss" in row} == logged
        assert [row["epoch"] for row in kept.history if "val_accuracy" in row] == list(range(1, epochs + 1))
        assert kept.preempting == kept.summary["preemptions"] == kept.summary["restarts"] == 3
        assert kept.summary["test_accuracy"] == result["test_accuracy"]
        told = cluster.call("scontrol", "--details", "show", "job", job) + cluster.call(
            "scontrol", "write", "batch_script", job, "-"
        )
        key, written = wandb_server.KEY, [path for path in site.folder.rglob("*") if path.is_file()]
        assert "sbatch" in told.lower() and key not in told
        assert not [path for path in written if key.encode() in path.read_bytes()]


def rows_at(server: wandb_server.Server) -> int:
    return sum(len(run.history) for run in server.runs.values())


def test_a_bayesian_sweep_is_one_array_whose_elements_keep_their_values(
    slurm_cluster: SlurmCluster, tmp_path: Path, digits_data: Path
) -> None:
    site = Site(slurm_cluster, tmp_path, digits_data)
    (site.folder / "rates.yaml").write_text(
        "method: bayes\nruns: 3\nparameters: {optimizer.lr: {min: 0.001, max: 0.5, scale: log}}\nprune: {warmup_epochs: 3}\n"
    )
    options = ("--sweep", "rates.yaml", "--array-limit", "2", "--nodes", "1", "--set", "epochs=4", "--campaign", "rates")
    pairs = site.submit_many(*options)
    runs = [run for run, _ in pairs]
    assert len({job.partition("_")[0] for _, job in pairs}) == 1

    def rate(run: str) -> float:
        found: float = yaml.safe_load((site.runs / run / "experiment.yaml").read_text())["optimizer"]["lr"]
        return found

    site.until_epoch(1, runs[0])
    first = rate(runs[0])
    running = slurm_cluster.call("squeue", "--noheader", "--array", "--states=RUNNING").splitlines()
    assert len(running) <= 2
    slurm_cluster.call("scontrol", "requeue", pairs[0][1])
    slurm_cluster.until(lambda: site.state(runs[0]).get("restarts") == 1, 90, "the next segment")
    site.hasten()
    site.finished(*runs)
    for _, job in pairs:  # a run tells the study after its result is written, within its job
        slurm_cluster.wait(job)
    assert rate(runs[0]) == first
    [journal] = site.runs.glob(".sweeps/rates-*/small.log")
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
    trials = optuna.load_study(study_name="small", storage=storage).trials
    assert sorted(one.params["optimizer.lr"] for one in trials) == sorted(rate(run) for run in runs)
    told = {one.params["optimizer.lr"]: one.value for one in trials}
    assert told == {rate(run): site.rows(run, "epoch")[-1]["val_accuracy"] for run in runs}
