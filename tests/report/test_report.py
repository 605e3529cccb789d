"""What a report says of runs: grouped, beside their claims, as text."""

from __future__ import annotations

import csv
import io
import json
import os
import statistics
from pathlib import Path
from typing import Any

import pytest
from reported import EVALUATED, left_behind

from hpc_cifar import files
from hpc_cifar.cli.main import main
from hpc_cifar.config.difference import comparable
from hpc_cifar.report.charts import charts
from hpc_cifar.report.facts import gather, shown
from hpc_cifar.report.groups import changed, groups_of, seeds_of
from hpc_cifar.report.page import html
from hpc_cifar.report.text import markdown


def typed(root: Path, *arguments: str, code: int = 0) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPC_CIFAR_RUNS", str(root))
        assert main(list(arguments)) == code


CLAIM = {"source": "a paper", "test_accuracy": 0.9}


@pytest.mark.parametrize(
    ("tests", "word"), [((0.9,), "as claimed"), ((0.93, 0.931), "above"), ((0.8, 0.95), "as claimed"), ((0.8, 0.81), "below")]
)
def test_a_verdict_knows_the_spread_of_the_seeds_and_of_the_test(tmp_path: Path, tests: tuple[float, ...], word: str) -> None:
    made = [left_behind(tmp_path, test=test, seed=seed, claim=CLAIM) for seed, test in enumerate(tests)]
    [group] = groups_of([gather(run) for run in made])
    assert group.verdict.word == word
    found = group.spreads["test_accuracy"]
    assert (found.mean, found.n) == (pytest.approx(statistics.mean(tests)), len(tests))
    assert found.std == (pytest.approx(statistics.stdev(tests)) if len(tests) > 1 else None)


BELOW, ABOVE, BETWEEN = {"at_most": 0.3}, {"at_least": 0.5}, {"at_least": 0.4, "at_most": 0.5}
LEFT, RIGHT = "triangle-left-open", "triangle-right-open"


@pytest.mark.parametrize(
    ("claim", "measured", "word", "text"),
    [
        (BELOW, 0.38, "above", "test accuracy 38.00% (n = 1: seed 0), claimed below 30%: 8.00 points above"),
        (BELOW, 0.32, "as claimed", "claimed below 30%: 2.00 points above"),  # 359 digits: 4.8 points are within its interval
        (BELOW, 0.1, "as claimed", "claimed below 30%: within"),
        (ABOVE, 0.38, "below", "claimed above 50%: 12.00 points below"),
        (ABOVE, 0.9, "as claimed", "claimed above 50%: within"),
        (BETWEEN, 0.3, "below", "claimed 40% to 50%: 10.00 points below"),
        (BETWEEN, 0.38, "as claimed", "claimed 40% to 50%: 2.00 points below"),
        (BETWEEN, 0.45, "as claimed", "claimed 40% to 50%: within"),
        (BETWEEN, 0.6, "above", "claimed 40% to 50%: 10.00 points above"),
        ({"at_least": 0.365, "at_most": 0.375}, 0.37, "as claimed", "claimed 36.5% to 37.5%: within"),
    ],
)
def test_a_verdict_on_a_claimed_bound_or_range(
    tmp_path: Path, claim: dict[str, float], measured: float, word: str, text: str
) -> None:
    [group] = groups_of([gather(left_behind(tmp_path, test=measured, claim={"source": "x", "test_accuracy": claim}))])
    assert group.verdict.word == word and group.verdict.text.endswith(text)


def test_bounds_and_ranges_are_told_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claims: list[Any] = [BELOW, ABOVE, BETWEEN, 0.45]
    made = [
        left_behind(tmp_path, name=f"net-{number}", test=0.45, claim={"source": "x", "test_accuracy": claim, "val_loss": BELOW})
        for number, claim in enumerate(claims)
    ]
    groups = groups_of([gather(run) for run in made])
    typed(tmp_path, "report", *(run.id for run in made), "--format", "md")
    told = capsys.readouterr().out
    for cell in ("< 30% / 45.00%", "> 50% / 45.00%", "40-50% / 45.00%", "45.00% / 45.00%", "< 0.3 / 0.4200"):
        assert cell in told
    typed(tmp_path, "report", *(run.id for run in made), "--format", "json")
    kept = [system["claim"]["test_accuracy"] for system in json.loads(capsys.readouterr().out)["groups"]]
    assert kept == claims
    page = html(groups, "bounds")
    assert all(f'<td class="soft">{cell}</td>' in page for cell in ("&lt; 30%", "&gt; 50%", "40-50%", "&lt; 0.3"))
    assert {run.experiment() for run in made} == {group.runs[0].experiment for group in groups}, "a run keeps its claim"

    line, marks, _ = charts(groups)["claims"]["data"]
    assert (marks["name"], list(marks["x"])) == ("claimed", [0.3, 0.5, 0.4, 0.5, 0.45])
    assert list(marks["marker"]["symbol"]) == [LEFT, RIGHT, RIGHT, LEFT, "diamond-open"]
    assert list(marks["customdata"]) == ["below 30%", "above 50%", "40% to 50%", "40% to 50%", "45.00%"]
    assert list(line["x"]) == [0.4, 0.5, None] and line["y"][0] == line["y"][1] == marks["y"][2]
    for group, lines in zip(groups, ([0.3], [0.5], [0.4, 0.5], [0.45]), strict=True):
        assert [shape["y0"] for shape in charts([group])["accuracy"]["layout"]["shapes"]] == lines


def test_seeds_and_folds_are_one_group_and_every_other_field_makes_two(tmp_path: Path) -> None:
    data = {"dataset": "digits", "batch_size": 144, "folds": 2}
    made = [left_behind(tmp_path, seed=seed, data={**data, "fold": fold}) for seed in (0, 1) for fold in (0, 1)]
    made += [left_behind(tmp_path, data={**data, "fold": 0}, optimizer={"name": "sgd", "lr": 0.5})]
    groups = groups_of([gather(run) for run in made])
    assert [len(group.runs) for group in groups] == [4, 1]
    assert [group.title for group in groups] == ["net optimizer.lr=0.01", "net optimizer.lr=0.5"]
    assert groups[0].runs[3].label == "seed 1, fold 1"


def test_a_seed_counts_once_and_its_copies_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields: dict[str, Any] = {"claim": CLAIM, "tracking": {"group": "t2"}}
    made = [left_behind(tmp_path, test=test, **fields) for test in (0.9, 0.9, 0.9)]
    [group] = groups_of([gather(run) for run in made])
    found = group.spreads["test_accuracy"]
    assert (found.n, found.std, found.seeds) == (1, None, "seed 0")
    more = [left_behind(tmp_path, seed=seed, test=0.9 + seed / 100, **fields) for seed in (1, 2, 4)]
    [group] = groups_of([gather(run) for run in (*made, *more)])
    assert [one.id for one in group.counted] == [made[0].id, *(run.id for run in more)]
    words = "(n = 4: seeds 0-2, 4)"
    assert words in group.verdict.text and group.spreads["seconds"].n == 4
    copies = f"seed 0 counts once, as {made[0].id} has it; the same: {made[1].id}, {made[2].id}"
    for form in ("md", "json"):
        typed(tmp_path, "report", "--campaign", "t2", "--format", form)
        out, err = capsys.readouterr()
        assert copies in out and copies in err and words in out, form
    assert "| 4/6 | seeds 0-2, 4 |" in markdown([group], "x")
    page = html([group], "x")
    assert copies in page and words in page and '<td class="text">seeds 0-2, 4</td>' in page
    typed(tmp_path, "list", "--campaign", "t2")
    assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ([(3, None)], "seed 3"),
        ([(0, None), (1, None), (2, None), (5, None), (7, None), (8, None)], "seeds 0-2, 5, 7, 8"),
        ([(0, 0), (0, 1), (0, 2)], "seed 0, folds 0-2"),
        ([(0, 0), (1, 0), (0, 1), (1, 1)], "seeds 0, 1, folds 0, 1"),
        ([(0, 0), (1, 1), (1, 1)], "seed 0, fold 0; seed 1, fold 1"),
    ],
)
def test_seeds_are_told_shortly(tmp_path: Path, pairs: list[tuple[int, int | None]], words: str) -> None:
    data = {"dataset": "digits", "batch_size": 144}
    made = [
        left_behind(tmp_path, seed=seed, data=data if fold is None else {**data, "folds": 3, "fold": fold})
        for seed, fold in pairs
    ]
    assert seeds_of([gather(run) for run in made]) == words
    [group] = groups_of([gather(run) for run in made])
    assert group.spreads["test_accuracy"].n == len(set(pairs))


def test_a_figure_of_fewer_seeds_than_its_group_says_of_which(tmp_path: Path) -> None:
    made = [left_behind(tmp_path, seed=seed) for seed in (0, 1)]
    made[0].result_file.write_text(json.dumps({"state": "finished", "steps": 45}))
    groups = groups_of([gather(run) for run in made])
    assert "90.00% (n = 1: seed 1)" in markdown(groups, "x")
    assert '<span class="soft">n = 1: seed 1</span>' in html(groups, "x")


def test_what_has_not_finished_counts_for_nothing(tmp_path: Path) -> None:
    made = [left_behind(tmp_path, test=None, claim=CLAIM), left_behind(tmp_path, test=0.9, seed=1, claim=CLAIM)]
    facts = [gather(run) for run in made]
    [group] = groups_of(facts)
    assert group.spreads["test_accuracy"].n == 1
    [alone] = groups_of(facts[:1])
    assert alone.verdict.word == "unfinished" and "running" in alone.verdict.text


def test_the_selected_epoch_is_the_one_that_is_reported(tmp_path: Path) -> None:
    run = left_behind(tmp_path, checkpoint={"select": "best", "monitor": "val_loss"})
    rows = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    rows[2]["val_loss"] = 0.001  # the second epoch; the first row is an event
    run.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert gather(run).figures["val_accuracy"] == rows[2]["val_accuracy"] != rows[-2]["val_accuracy"]


def test_segments_and_what_was_lost(tmp_path: Path) -> None:
    run = left_behind(tmp_path, restarts=2, lost=5)
    facts = gather(run)
    assert [segment.ending for segment in facts.segments] == ["requeued", "requeued", "finished"]
    assert facts.goodput == 45 / 50
    lines = run.metrics_file.read_text().splitlines()
    run.metrics_file.write_text("\n".join([*lines[:1], *lines[2:]]) + "\n")  # killed: nothing tells its end
    assert [segment.ending for segment in gather(run).segments] == ["lost", "requeued", "finished"]


def test_the_run_that_is_shown_is_not_chosen_by_the_test(tmp_path: Path) -> None:
    better, luckier = left_behind(tmp_path, seed=0, test=0.8), left_behind(tmp_path, seed=5, test=0.99)
    for run in (better, luckier):
        (run.path / "evaluation" / "test").mkdir(parents=True)
        (run.path / "evaluation" / "test" / "evaluation.json").write_text(json.dumps(EVALUATED))
    found = shown([gather(better), gather(luckier)])
    assert found is not None and found.id == better.id


def test_one_run_with_a_link_out_of_it_is_left_out_of_a_report_on_several(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = left_behind(tmp_path, seed=0), left_behind(tmp_path, seed=5)
    (bad.path / "evaluation" / "test").mkdir(parents=True)
    (bad.path / "evaluation" / "test" / "confusion.png").symlink_to("/etc/hostname")
    typed(tmp_path, "report", good.id, bad.id, "--format", "csv")
    told = capsys.readouterr()
    assert good.id in told.out and bad.id not in told.out
    assert (
        "warning: left out: " in told.err and f"{bad.id}: 'evaluation/test/confusion.png' is a link that leads out" in told.err
    )
    typed(tmp_path, "report", bad.id, "--format", "csv", code=1)


@pytest.mark.parametrize("left", [0, 40])
def test_a_run_whose_campaign_cannot_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], left: int) -> None:
    good, bad = (left_behind(tmp_path, seed=seed, tracking={"group": "one"}) for seed in (0, 5))
    os.truncate(bad.experiment_file, left)
    for command in (["report", "--campaign", "one", "--format", "csv"], ["list", "--campaign", "one"]):
        typed(tmp_path, *command)
        told = capsys.readouterr()
        assert good.id in told.out
        assert f"warning: {bad.id}: experiment.yaml is damaged; it may be of campaign one" in told.err


@pytest.mark.parametrize(("file", "old", "new"), [("result.json", "0.9", "0.8"), ("state.json", '"step": 45', '"step": 46')])
def test_a_digit_that_changed_in_a_sealed_record_is_no_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, old: str, new: str
) -> None:
    run = left_behind(tmp_path, test=0.9)
    result = files.read_object(run.result_file)
    files.write_sealed(run.result_file, result)
    assert "crc32" not in run.result_file.read_text(), "what an older version's code wrote, and may change again, gets none"
    run.result_file.unlink()
    files.write_sealed(run.result_file, result)
    assert files.read_object(run.result_file) == result and '"crc32": "' in run.result_file.read_text()
    path = run.path / file
    path.write_text(path.read_text().replace(old, new, 1))
    typed(tmp_path, "status", "--json")
    [row] = json.loads(capsys.readouterr().out)
    assert f"{file}: was changed after it was written" in row["reason"]
    assert row["test_accuracy"] != 0.8 and row["step"] != 46
    files.write_json(path, result)  # as an older version wrote it
    assert files.read_object(path) == result


def test_what_one_experiment_changes_is_shown_beside_the_defaults(tmp_path: Path) -> None:
    one = gather(left_behind(tmp_path, seed=3, schedule={"name": "cosine", "warmup_epochs": 2}, training={"precision": "bf16"}))
    found = {name: (value, default) for name, value, default in changed(one)}
    assert found["training.precision"] == ("bf16", "auto")
    assert found["schedule.warmup_epochs"] == (2, 0) and found["optimizer.lr"][0] == 0.01
    assert found["data.batch_size"] == (144, None), "what must be given has no default"
    assert not {"seed", "name", "training.compile"} & found.keys()
    assert set(found) < set(comparable(one.experiment))


def test_csv_json_and_markdown_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = [left_behind(tmp_path, seed=seed, test=0.9 + seed / 100, claim=CLAIM, tracking={"group": "t2"}) for seed in (0, 1)]
    left_behind(tmp_path, name="other")
    texts = {}
    for form in ("csv", "json", "md"):
        typed(tmp_path, "report", "--campaign", "t2", "--format", form)
        texts[form] = capsys.readouterr().out
    rows = list(csv.DictReader(io.StringIO(texts["csv"])))
    assert [row["run"] for row in rows] == [run.id for run in made]
    [system] = json.loads(texts["json"])["groups"]
    assert [row["test_accuracy"] for row in system["runs"]] == [float(row["test_accuracy"]) for row in rows] == [0.9, 0.91]
    assert system["measured"]["test_accuracy"]["mean"] == pytest.approx(0.905)
    assert "90.00% / 90.50% ± 0.71%" in texts["md"] and all(run.id in texts["md"] for run in made)
    assert all("/opt/here" not in text for text in texts.values())
    assert system["runs"][0]["provenance"]["command"] == "hpc-cifar submit net.yaml"


def test_list_of_a_campaign_ends_with_mean_and_spread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1):
        left_behind(tmp_path, seed=seed, test=0.9 + seed / 100, tracking={"group": "t2"})
    other = left_behind(tmp_path, name="other")
    typed(tmp_path, "list", "--campaign", "t2")
    said = capsys.readouterr().out
    assert other.id not in said and "net: test accuracy 90.50% ± 0.71% (n = 2: seeds 0, 1)" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--campaign", "t3"), "campaigns are t2"),
        (("--format", "pdf"), "should be one of html"),
        (("--campaign", "t2", "last"), "leave the others out"),
        (("last", "-o", "no/such/folder/x.html"), "No such file or directory"),
        (("nothing",), "no such run or job id"),
    ],
)
def test_what_is_mistyped_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: Any, words: str) -> None:
    left_behind(tmp_path, tracking={"group": "t2"})
    typed(tmp_path, "report", *arguments, code=2)
    assert words in capsys.readouterr().err


def test_nothing_is_chosen_by_the_test_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {"dataset": "digits", "batch_size": 144, "validation": "test"}
    for seed in (0, 1):
        left_behind(tmp_path, seed=seed, data=data, tracking={"group": "t2"})
    typed(tmp_path, "report", "--campaign", "t2", "--winner", str(tmp_path / "best.yaml"), code=2)
    assert "none may be chosen" in capsys.readouterr().err and not (tmp_path / "best.yaml").exists()
