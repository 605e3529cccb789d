"""A report on many runs reads little of each, and says how far it is."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from reported import left_behind

from hpc_cifar import reading
from hpc_cifar.cli import report as command
from hpc_cifar.cli.main import main
from hpc_cifar.config import source
from hpc_cifar.report.facts import gather, segments_of
from hpc_cifar.track.metrics import MetricsLog
from hpc_cifar.track.rows import rows_but_steps, rows_of

EPOCHS, EACH = 20, 50


def write(path: Path, segments: int = 2) -> None:
    """Rows of segments of which none says how it ended, the last row a step's."""
    log = MetricsLog(path)
    step = 0
    for _ in range(segments):
        log.write("event", epoch=0, step=step, event="started")
        for epoch in range(1, EPOCHS + 1):
            for _ in range(EACH):
                step += 1
                log.write("step", epoch=epoch, step=step, train_loss=1.5, train_accuracy=0.5, lr=1e-05, images_per_second=None)
            log.write("epoch", epoch=epoch, step=step, val_accuracy=0.5)
        log.write("step", epoch=epoch, step=step + 1, train_loss=1.5, lr=0.1)
    log.close()


def test_the_rows_are_the_same_without_those_of_steps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path)
    (all_rows, _), (few, damaged) = rows_of(path), rows_but_steps(path)
    assert [row for row in all_rows if row["kind"] != "step"] == [row for row in few if row["kind"] != "step"]
    assert damaged == 0 and segments_of(few) == segments_of(all_rows) and len(few) < len(all_rows) / 10


def test_damage_is_seen_in_every_line_that_matters(tmp_path: Path) -> None:
    """Bytes of a file changed at random: an epoch that is lost is always counted as damage."""
    path, dice = tmp_path / "metrics.jsonl", random.Random(1)
    write(path, 1)
    sound = path.read_bytes()
    for _ in range(300):
        data = bytearray(sound)
        at = dice.randrange(len(data))
        match dice.randrange(3):
            case 0:
                data[at] = dice.randrange(256)
            case 1:
                del data[at : at + dice.randrange(1, 200)]
            case _:
                data[at:at] = bytes([dice.randrange(256)])
        path.write_bytes(data)
        (all_rows, all_damaged), (few, damaged) = rows_of(path), rows_but_steps(path)
        assert [row for row in all_rows if row["kind"] == "epoch"] == [row for row in few if row["kind"] == "epoch"]
        assert damaged <= all_damaged
        if len([row for row in few if row["kind"] == "epoch"]) < EPOCHS:
            assert damaged == all_damaged


def test_a_report_reads_each_file_once_and_few_of_its_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = [left_behind(tmp_path, seed=seed, tracking={"group": "many"}) for seed in range(6)]
    for run in made:
        write(run.metrics_file)
    parsed: list[int] = []
    trees: list[int] = []
    parse_json, parse = reading.parse_json, source.parse
    monkeypatch.setattr(reading, "parse_json", lambda data: parsed.append(1) or parse_json(data))
    monkeypatch.setattr("hpc_cifar.runs.parse", lambda text, name: trees.append(1) or parse(text, name))
    monkeypatch.setattr(command, "PROGRESS_S", -1.0)
    monkeypatch.setenv("HPC_CIFAR_RUNS", str(tmp_path))
    assert main(["report", "--campaign", "many", "--format", "json"]) == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)["groups"][0]["runs"]) == 6 and "5 of 6 runs read" in err
    assert len(trees) <= 6, "the campaign and the experiment are in one file"
    assert len(parsed) < 6 * (2 * EPOCHS + 30), f"{len(parsed)} of {6 * 2 * EPOCHS * EACH} lines"


def test_nothing_of_a_run_is_kept_from_before_it_changed(tmp_path: Path) -> None:
    run = left_behind(tmp_path)
    text = run.experiment_file.read_text()
    assert gather(run).experiment.seed == 0
    run.experiment_file.write_text(text.replace("seed: 0", "seed: 9", 1))
    assert gather(run).experiment.seed == 9
