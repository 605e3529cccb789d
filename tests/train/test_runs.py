"""Whole runs in real processes: plain equality, resume, world sizes, signals, bad losses."""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

import plain
import pytest
import ranks
import torch

from hpc_cifar import files
from hpc_cifar.config.experiment import Experiment
from hpc_cifar.config.optimization import AdamW
from hpc_cifar.data.split import split
from hpc_cifar.data.store import Store
from hpc_cifar.runs import Run
from hpc_cifar.train import checkpoint, loop, rehearsal

pytestmark = pytest.mark.slow

PLAIN: dict[str, Any] = {
    "model": {
        "layers": [
            {"conv": {"filters": 8, "kernel": 3, "stride": 2, "padding": 1}},
            "batch_norm",
            "relu",
            {"avg_pool": {"size": 2}},  # no ties, whose winner float noise decides
            "flatten",
            {"dense": {"units": 10}},
        ]
    },
    "data": {"augment": {"padding_mode": "zero", "cutout": 0}},
    "training": {"ema_decay": None, "precision": "float32"},
}


def final_state(run: Run) -> dict[str, Any]:
    saved = checkpoint.named(run.checkpoints, "latest")
    assert saved is not None
    return checkpoint.read(saved)


def assert_same_tensors(one: Any, other: Any, path: str = "") -> None:
    """Bit for bit, through nested dicts and lists."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), f"{path} differs by up to {(one.float() - other.float()).abs().max()}"
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same_tensors(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same_tensors(a, b, f"{path}[{index}]")
    else:
        assert one == other, path


WEIGHTS = ("model", "optimizer", "ema", "position", "per_rank", "best")


@pytest.mark.parametrize("world", [1, 2])
def test_loss_curve_equals_plain_pytorch(tmp_path: Path, digits_data: Path, world: int) -> None:
    config = ranks.experiment(**ranks.merge(PLAIN, {"training": {"batch_norm": "global"}, "optimizer": {"lr": 0.02}}))
    run = ranks.new_run(tmp_path, config)
    ranks.complete(run, digits_data, world)
    store = Store.open(digits_data, "digits")
    indices, _ = split(store.train.labels, 0.1, 0)
    expected = plain.train(store.train.images, store.train.labels, indices, seed=7, epochs=2, batch=100, lr=0.02)
    measured = ranks.losses(run)
    assert sorted(measured) == list(range(1, len(expected) + 1))
    for step, loss in enumerate(expected, 1):
        assert measured[step] == pytest.approx(loss, rel=2e-4), f"step {step}"


@pytest.mark.parametrize(
    ("world", "sync", "optimizer"), [(1, "flat", "sgd"), (2, "flat", "adamw"), (2, "ddp", "sgd"), (3, "flat", "sgd")]
)
def test_killed_and_resumed_is_bit_identical(tmp_path: Path, digits_data: Path, world: int, sync: str, optimizer: str) -> None:
    changes: dict[str, Any] = {"checkpoint": {"every_steps": 3}, "training": {"gradient_sync": sync}}
    config = ranks.experiment(**changes)
    if optimizer == "adamw":
        config = config.model_copy(update={"optimizer": AdamW(name="adamw", lr=0.01)})
    undisturbed, killed = ranks.new_run(tmp_path, config), ranks.new_run(tmp_path, config)
    result = ranks.complete(undisturbed, digits_data, world)
    total = result["steps"]
    seed = random.randrange(1 << 30)
    generator = random.Random(seed)
    for step in sorted(generator.sample(range(1, total - 1), 2)):
        processes = ranks.start(killed, digits_data, world, environment={rehearsal.VARIABLE: "0.02"})  # not too quick to be hit
        ranks.wait_for_step(killed, step, processes)
        ranks.kill_all(processes)
    resumed = ranks.complete(killed, digits_data, world)
    one, other = final_state(undisturbed), final_state(killed)
    for key in WEIGHTS:
        assert_same_tensors(one[key], other[key], f"kill seed {seed}: {key}")
    assert ranks.losses(killed) == ranks.losses(undisturbed), f"kill seed {seed}"
    assert resumed["test_accuracy"] == result["test_accuracy"]
    assert resumed["restarts"] == 2


VALIDATED: dict[str, dict[str, Any]] = {
    "plateau": {"schedule": {"name": "plateau", "patience": 1, "factor": 0.5, "min_delta": 1e6, "warmup_epochs": 0.5}},
    "staged": {"schedule": {"name": "staged", "stages": [{"epoch": 2, "lr": 0.07}, {"epoch": 4, "lr": 0.02}]}},
}


@pytest.mark.parametrize("name", VALIDATED)
def test_rates_early_stopping_and_the_best_weights_survive_bit_for_bit(tmp_path: Path, digits_data: Path, name: str) -> None:
    """With an average of the weights. No epoch is so much better than the first, so the fourth is the last one."""
    changes = {
        "epochs": 9,
        "training": {"early_stopping": {"patience": 3, "min_delta": 1e6}},
        "checkpoint": {"select": "best", "monitor": "val_loss", "every_steps": 5},
        "optimizer": {"lr": 0.2},
    }
    values = ranks.experiment(**changes).model_dump() | VALIDATED[name]
    config = Experiment.model_validate(values)
    undisturbed, killed = ranks.new_run(tmp_path, config), ranks.new_run(tmp_path, config)
    result = ranks.complete(undisturbed, digits_data, 1)
    assert (result["state"], result["epochs"], result["selected"]) == ("finished", 4, "best")
    assert result["reason"] == "early stopping after epoch 4 of 9"
    rates = [row["lr"] for row in final_state(undisturbed)["history"]]
    expected = {"plateau": [0.2, 0.2, 0.1, 0.05], "staged": [0.2, 0.07, 0.07, 0.02]}
    assert rates == pytest.approx(expected[name])
    for step in (17, 39):  # in the second epoch; after the third, when nothing but the history says how to go on
        processes = ranks.start(killed, digits_data, 1)
        ranks.wait_for_step(killed, step, processes)
        ranks.kill_all(processes)
    resumed = ranks.complete(killed, digits_data, 1)
    one, other = final_state(undisturbed), final_state(killed)
    for key in WEIGHTS:
        assert_same_tensors(one[key], other[key], key)
    timeless = [[{k: v for k, v in row.items() if k != "images_per_second"} for row in s["history"]] for s in (one, other)]
    assert timeless[0] == timeless[1]
    for key in ("state", "epochs", "test_loss", "test_accuracy", "reason"):
        assert resumed[key] == result[key]
    assert ranks.losses(killed) == ranks.losses(undisturbed)


def images_seen(path: Path, world: int) -> dict[tuple[int, int], list[str]]:
    """(epoch, batch) to the sorted hashes of its images, over all ranks; later segments overwrite earlier ones."""
    found: dict[tuple[int, int], dict[int, list[str]]] = {}
    for rank in range(world):
        for line in Path(f"{path}.{rank}").read_text().splitlines():
            epoch, batch, names = line.split(" ")
            found.setdefault((int(epoch), int(batch)), {})[rank] = [name for name in names.split(",") if name]
    return {key: sorted(name for names in by_rank.values() for name in names) for key, by_rank in found.items()}


def test_stopped_at_two_ranks_and_continued_at_one_sees_the_same_batches(tmp_path: Path, digits_data: Path) -> None:
    config = ranks.experiment()
    alone, changed = ranks.new_run(tmp_path, config), ranks.new_run(tmp_path, config)
    ranks.complete(alone, digits_data, 1, seen=tmp_path / "alone")
    ranks.complete(changed, digits_data, 2, seen=tmp_path / "two", max_steps=7)
    ranks.complete(changed, digits_data, 1, seen=tmp_path / "one")
    expected = images_seen(tmp_path / "alone", 1)
    two = {key: names for key, names in images_seen(tmp_path / "two", 2).items() if key < (0, 7)}
    one = images_seen(tmp_path / "one", 1)
    assert not two.keys() & one.keys()
    assert two | one == expected


def relative_error(measured: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Of all weights and statistics as one vector; single biases begin at zero and have no scale of their own."""
    one, other = (torch.cat([state[name].double().flatten() for name in expected]) for state in (measured, expected))
    return float(torch.linalg.vector_norm(one - other) / torch.linalg.vector_norm(other))


@pytest.mark.parametrize(
    ("world", "sync", "precision", "tolerance"),
    [
        # in float64 every wrong weight of an image or of a rank shows: the runs agree to 3e-14 where it is right
        (2, "flat", "float64", 1e-11),
        (3, "flat", "float64", 1e-11),
        (2, "ddp", "float64", 1e-11),
        (3, "ddp", "float64", 1e-11),
        # the type that people train in; a sum of 170,000 products has a relative error of this size in any order
        (3, "flat", "float32", 1e-4),
    ],
)
def test_world_sizes_train_alike(
    tmp_path: Path, digits_data: Path, world: int, sync: str, precision: str, tolerance: float
) -> None:
    """An epoch over two or three ranks (uneven shards, a tail batch) equals one rank to float tolerance."""
    changes: dict[str, Any] = {
        "epochs": 1,
        "data": {"batch_size": 664},
        "training": {"batch_norm": "global", "gradient_sync": sync, "ema_decay": None, "precision": precision},
    }
    config = ranks.experiment(**ranks.merge(PLAIN, changes))
    one, many = ranks.new_run(tmp_path, config), ranks.new_run(tmp_path, config)
    ranks.complete(one, digits_data, 1)
    ranks.complete(many, digits_data, world)
    expected, measured = final_state(one)["model"], final_state(many)["model"]
    assert relative_error(measured, expected) < tolerance
    assert ranks.losses(many) == pytest.approx(ranks.losses(one), rel=tolerance)


def test_more_ranks_than_images_in_the_tail_batch(tmp_path: Path, digits_data: Path) -> None:
    """1,294 training images in batches of 431: the tail has one image, so two of three ranks get none."""
    for sync in ("flat", "ddp"):
        config = ranks.experiment(epochs=1, data={"batch_size": 431}, training={"gradient_sync": sync})
        run = ranks.new_run(tmp_path, config)
        result = ranks.complete(run, digits_data, 3)
        assert result["state"] == "finished"


@pytest.mark.parametrize("sync", ["flat", "ddp"])
def test_compressed_gradients_are_those_of_bf16(tmp_path: Path, digits_data: Path, sync: str) -> None:
    """Relative errors of 2^-9 in each gradient, so of that size in the weights after an epoch."""
    states = []
    for compression in ("none", "bf16"):
        training = {"batch_norm": "global", "gradient_sync": sync, "gradient_compression": compression, "ema_decay": None}
        run = ranks.new_run(tmp_path, ranks.experiment(**ranks.merge(PLAIN, {"epochs": 1, "training": training})))
        ranks.complete(run, digits_data, 2)
        states.append(final_state(run)["model"])
    assert 1e-5 < relative_error(states[1], states[0]) < 0.02


@pytest.mark.parametrize("sync", ["flat", "ddp"])
def test_gradient_accumulation_equals_one_pass(tmp_path: Path, digits_data: Path, sync: str) -> None:
    layers = [{"conv": {"filters": 8, "kernel": 3, "stride": 2}}, "relu", "flatten", {"dense": {"units": 10}}]
    states = []
    for micro in (None, 17):
        config = ranks.experiment(
            epochs=1,
            model={"layers": layers},
            data={"micro_batch_size": micro},
            training={"clip_grad_norm": 0.5, "gradient_sync": sync, "precision": "float64"},
        )
        run = ranks.new_run(tmp_path, config)
        ranks.complete(run, digits_data, 2)
        states.append(final_state(run)["model"])
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_rank_stops_all_at_a_step_boundary(tmp_path: Path, digits_data: Path, number: signal.Signals) -> None:
    config = ranks.experiment(epochs=200, checkpoint={"every_epochs": 200}, training={"evaluate_every_epochs": 200})
    run = ranks.new_run(tmp_path, config)
    processes = ranks.start(run, digits_data, 2)
    ranks.wait_for_step(run, 5, processes)
    processes[1].send_signal(number)
    assert ranks.finish(processes) == [0, 0], ranks.logs(run)
    result = files.read_object(run.result_file)
    assert result["state"] == "stopped"
    saved = checkpoint.named(run.checkpoints, "latest")
    assert saved is not None and saved.step == result["steps"]
    assert max(ranks.losses(run)) == saved.step  # nothing was trained after the checkpoint
    before = saved.step
    ranks.complete(run, digits_data, 2, max_steps=before + 3)
    assert sorted(ranks.losses(run)) == list(range(1, before + 4))


def test_a_run_that_is_given_up_stops_on_all_ranks_and_can_go_on(tmp_path: Path, digits_data: Path) -> None:
    run = ranks.new_run(tmp_path, ranks.experiment(epochs=4))
    result = ranks.complete(run, digits_data, 2, environment={"GIVES_UP_AFTER_EPOCH": "2"})
    assert (result["state"], result["reason"]) == ("stopped", "pruned")
    epochs = [row["epoch"] for row in files.read_json_lines(run.metrics_file) if row["kind"] == "epoch"]
    saved = checkpoint.named(run.checkpoints, "latest")
    assert epochs == [1, 2] and saved is not None and saved.step == result["steps"]
    assert ranks.complete(run, digits_data, 2)["state"] == "finished"


def test_a_stop_says_how_soon_it_was_heard_and_saved(tmp_path: Path, digits_data: Path) -> None:
    """The shortest time that a scheduler gives is seconds, so this must be far below."""
    config = ranks.experiment(epochs=200, checkpoint={"every_epochs": 200}, training={"evaluate_every_epochs": 200})
    taken = []
    for _ in range(3):  # the quickest counts: other work on the machine must not fail this test
        run = ranks.new_run(tmp_path, config)
        processes = ranks.start(run, digits_data, 2)
        ranks.wait_for_step(run, 5, processes)
        for process in processes:
            process.send_signal(signal.SIGUSR2)
        assert ranks.finish(processes) == [0, 0], ranks.logs(run)
        result = files.read_object(run.result_file)
        assert 0 <= result["heard_after_ms"] <= result["saved_after_ms"]
        taken.append(result["saved_after_ms"])
    assert min(taken) < 2000
    [event] = [row for row in files.read_json_lines(run.metrics_file) if row.get("event") == "stopped"]
    for name in ("heard_after_ms", "saved_after_ms"):
        assert event[name] == result[name]
    assert 100 < result["host_memory_mib"] < 4000


def pages(process: ranks.Rank, name: str) -> dict[str, int]:
    """KiB of the process's mapping of the file ``name``, as in proc_pid_smaps(5)."""
    found: dict[str, int] = {}
    inside = False
    for line in Path(f"/proc/{process.pid}/smaps").read_text().splitlines():
        key, *rest = line.split()
        if "-" in key:  # the head of a mapping
            inside = line.endswith(name)
        elif inside and rest and rest[0].isdigit():
            found[key.rstrip(":")] = found.get(key.rstrip(":"), 0) + int(rest[0])
    return found


def test_ranks_of_a_node_share_one_mapped_store(tmp_path: Path, digits_data: Path) -> None:
    run = ranks.new_run(tmp_path, ranks.experiment(epochs=200))
    processes = ranks.start(run, digits_data, 2)
    ranks.wait_for_step(run, 20, processes)  # an epoch, in which each has seen its half of every batch
    found = [pages(process, "train-images.npy") for process in processes]
    ranks.kill_all(processes)
    for one in found:
        assert one["Rss"] > 0 and one["Private_Dirty"] == 0
        assert one["Pss"] < 0.7 * one["Rss"], "most of its pages are the other rank's as well"


def test_a_loss_that_is_not_finite_names_the_step_and_the_last_checkpoint(tmp_path: Path, digits_data: Path) -> None:
    config = ranks.experiment(
        optimizer={"lr": 1e18}, schedule={"name": "constant", "warmup_epochs": 0}, checkpoint={"every_steps": 1}
    )
    run = ranks.new_run(tmp_path, config)
    codes = ranks.finish(ranks.start(run, digits_data, 2))
    assert codes == [1, 1], ranks.logs(run)
    state = run.state()
    assert state.state == "failed"
    assert "the training loss became" in state.reason and "at step" in state.reason
    saved = checkpoint.named(run.checkpoints, "latest")
    assert saved is not None and str(saved.folder.resolve()) in state.reason
    assert "Traceback" not in ranks.logs(run)


def test_a_damaged_newest_checkpoint_costs_only_its_steps(tmp_path: Path, digits_data: Path) -> None:
    config = ranks.experiment(checkpoint={"every_steps": 3})
    undisturbed, damaged = ranks.new_run(tmp_path, config), ranks.new_run(tmp_path, config)
    ranks.complete(undisturbed, digits_data, 2)
    ranks.complete(damaged, digits_data, 2, max_steps=7)
    path = damaged.checkpoints / "latest" / "state.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    ranks.complete(damaged, digits_data, 2)
    assert "skipped a damaged checkpoint" in (damaged.path / "rank-0.log").read_text()
    assert_same_tensors(final_state(undisturbed)["model"], final_state(damaged)["model"])
    assert ranks.losses(damaged) == ranks.losses(undisturbed)


def test_two_jobs_on_one_run_exclude_each_other(tmp_path: Path, digits_data: Path) -> None:
    run = ranks.new_run(tmp_path, ranks.experiment(epochs=200))
    first = ranks.start(run, digits_data, 1)
    ranks.wait_for_step(run, 1, first)
    second = ranks.start(run, digits_data, 1)
    assert ranks.finish(second) == [1]
    assert "is being trained already, by process" in ranks.logs(run)
    assert run.state().state == "running"  # the second one did not write into the first one's state
    assert first[0].poll() is None
    ranks.kill_all(first)


def test_best_checkpoint_is_chosen_by_validation_and_tested(tmp_path: Path, digits_data: Path) -> None:
    config = ranks.experiment(epochs=4, checkpoint={"select": "best", "keep_last": 1})
    run = ranks.new_run(tmp_path, config)
    result = ranks.complete(run, digits_data, 2)
    epochs = [row for row in files.read_json_lines(run.metrics_file) if row["kind"] == "epoch"]
    best = checkpoint.named(run.checkpoints, "best")
    assert best is not None
    values = [row["val_accuracy"] for row in epochs]
    assert best.manifest["epoch"] == values.index(max(values)) + 1
    assert result["selected"] == "best"


def test_who_reads_that_a_run_has_ended_finds_its_result(
    tmp_path: Path, digits_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str]] = []
    update_state = Run.update_state

    def written(self: Run, **values: Any) -> None:
        seen.append((values["state"], files.read_object(self.result_file).get("state", "none")))
        update_state(self, **values)

    monkeypatch.setattr(Run, "update_state", written)
    run = ranks.new_run(tmp_path, ranks.experiment(epochs=1))
    loop.train(run, max_steps=3, data_root=digits_data, console=False)
    loop.train(run, data_root=digits_data, console=False)
    assert ("running", "none") in seen
    assert [pair for pair in seen if pair[0] != "running"] == [("stopped", "stopped"), ("finished", "finished")]


def test_finished_run_is_not_trained_again(tmp_path: Path, digits_data: Path) -> None:
    run = ranks.new_run(tmp_path, ranks.experiment(epochs=1))
    first = ranks.complete(run, digits_data, 1)
    before = run.metrics_file.read_bytes()
    assert ranks.complete(run, digits_data, 1) == first
    assert run.metrics_file.read_bytes() == before


def test_a_run_says_which_pipeline_feeds_it_and_why(tmp_path: Path, digits_data: Path) -> None:
    run = ranks.new_run(tmp_path, ranks.experiment(epochs=1))
    ranks.complete(run, digits_data, 1)
    [event] = [row for row in files.read_json_lines(run.metrics_file) if row.get("event") == "pipeline"]
    assert event["pipeline"] == "resident" and "memory-mapped" in event["why"]
