"""The HTML report in a real browser."""

from __future__ import annotations

import json
import struct
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from reported import left_behind

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train"))

import ranks

from hpc_cifar import files
from hpc_cifar.cli.main import main
from hpc_cifar.report.facts import gather
from hpc_cifar.report.groups import changed, groups_of
from hpc_cifar.report.page import html
from hpc_cifar.runs import Run

pytestmark = pytest.mark.slow
HOVER = "document.querySelector('#accuracy .hoverlayer')?.textContent ?? ''"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, digits_data: Path) -> Run:
    """A real run on digits, not evaluated."""
    config = ranks.experiment(epochs=3, claim={"source": "<script>alert(1)</script>", "val_accuracy": 0.97})
    run = ranks.new_run(tmp_path_factory.mktemp("reported"), config)
    ranks.complete(run, digits_data, 1)
    return run


@pytest.fixture(scope="module")
def page(trained: Run, digits_data: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPC_CIFAR_RUNS", str(trained.path.parent))
        patch.setenv("HPC_CIFAR_DATA", str(digits_data))
        out = trained.path.parent / "report.html"
        assert main(["report", trained.id, "--evaluate", "-o", str(out)]) == 0
    return out


def numbers(page: Any, selector: str) -> dict[str, float]:
    """``data-value`` of the cells that a selector finds, by what they are."""
    script = f"""Object.fromEntries([...document.querySelectorAll({json.dumps(selector)})].filter(cell => cell.dataset.value)
        .map(cell => [[cell.dataset.run, cell.dataset.epoch, cell.dataset.figure ?? cell.dataset.runFigure]
        .filter(part => part !== undefined).join(' '), Number(cell.dataset.value)]))"""
    return dict(page.evaluate(script))


def test_the_numbers_on_the_page_are_those_of_the_run(browser: Browser, page: Path, trained: Run) -> None:
    rows = [row for row in files.read_json_lines(trained.metrics_file) if row["kind"] == "epoch"]
    names = ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr", "images_per_second")
    result = files.read_object(trained.result_file)
    with browser.open(page) as shown:
        assert numbers(shown, "#epochs td") == {f"{row['epoch']} {name}": row[name] for row in rows for name in names}
        assert numbers(shown, "[data-run-figure]")["test_accuracy"] == result["test_accuracy"]
        shown.until(lambda: shown.evaluate("document.getElementById('accuracy').dataset.drawn"), 20, "the chart")
        drawn = shown.evaluate("document.getElementById('accuracy').data.map(line => line.y)")
        assert drawn == [[row[name] for row in rows] for name in ("val_accuracy", "train_accuracy")]
        matrix = shown.evaluate("[...document.querySelectorAll('.confusion td')].map(cell => Number(cell.textContent))")
        evaluated = files.read_json(trained.path / "evaluation" / "test" / "evaluation.json")
        assert matrix == [count for row in evaluated["confusion"] for count in row]
        images = "[...document.querySelectorAll('.mistakes img')].every(one => one.complete && one.naturalWidth == 32)"
        fields = shown.evaluate("[...document.querySelectorAll('#changed th[scope=row]')].map(cell => cell.textContent)")
        assert fields == [name for name, _, _ in changed(gather(trained))] and "optimizer.lr" in fields
        mistakes = len(evaluated["misclassified"][:24])
        assert shown.evaluate("document.querySelectorAll('.mistakes img').length") == mistakes > 0 and shown.evaluate(images)


def test_the_page_asks_nobody_and_complains_of_nothing(browser: Browser, page: Path) -> None:
    with browser.open(page) as shown:
        shown.until(lambda: shown.evaluate("document.querySelectorAll('.plot[data-drawn]').length"), 20, "a chart")
        shown.evaluate("window.scrollTo(0, document.body.scrollHeight)")
        every = "document.querySelectorAll('.plot:not([data-drawn])').length === 0"
        shown.evaluate("[...document.querySelectorAll('.plot')].forEach(plot => plot.scrollIntoView())")
        shown.until(lambda: shown.evaluate(every), 20, "all charts")
        assert [address for address in shown.requests if not address.startswith("data:")] == [page.as_uri()]
        assert shown.complaints == []


def test_hovering_over_a_curve_tells_its_value(browser: Browser, page: Path, trained: Run) -> None:
    [row, *_] = [row for row in files.read_json_lines(trained.metrics_file) if row["kind"] == "epoch"]
    with browser.open(page) as shown:
        shown.evaluate("document.getElementById('accuracy').scrollIntoView({block: 'center'})")
        shown.until(lambda: shown.evaluate("document.getElementById('accuracy').dataset.drawn"), 20, "the chart")
        place = """(() => { const plot = document.getElementById('accuracy'), box = plot.getBoundingClientRect(),
            {xaxis, yaxis} = plot._fullLayout, [line] = plot.data;
            return [box.x + xaxis._offset + xaxis.d2p(line.x[0]), box.y + yaxis._offset + yaxis.d2p(line.y[0])]; })()"""
        x, y = shown.evaluate(place)
        shown.mouse(x + 40, y)
        shown.mouse(x + 2, y)
        shown.until(lambda: shown.evaluate(HOVER), 10, "a label at the pointer")
        assert shown.evaluate(HOVER) == f"validationepoch {row['epoch']}: {row['val_accuracy']:.2%}"


def test_dragging_over_a_chart_looks_closer(browser: Browser, page: Path) -> None:
    with browser.open(page) as shown:
        shown.evaluate("document.getElementById('accuracy').scrollIntoView({block: 'center'})")
        shown.until(lambda: shown.evaluate("document.getElementById('accuracy').dataset.drawn"), 20, "the chart")
        axis = "document.getElementById('accuracy')._fullLayout.xaxis.range"
        before = shown.evaluate(axis)
        box = shown.evaluate("(({x, y, width, height}) => [x, y, width, height])"
                             "(document.querySelector('#accuracy .nsewdrag').getBoundingClientRect())")  # fmt: skip
        left, top, width, height = box
        for kind, share in (("mousePressed", 0.25), ("mouseMoved", 0.5), ("mouseMoved", 0.75), ("mouseReleased", 0.75)):
            place = {"x": left + share * width, "y": top + height / 2}
            shown("Input.dispatchMouseEvent", type=kind, button="left", buttons=1, clickCount=1, **place)
        shown.until(lambda: shown.evaluate(axis) != before, 10, "another range")
        low, high = shown.evaluate(axis)
        assert before[0] < low < high < before[1]


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Run]]:
    """Two systems with two seeds each, one run of which was preempted twice."""
    root = tmp_path_factory.mktemp("several")
    claim = {"source": "a paper", "test_accuracy": 0.9, "epochs": 5, "hours": 0.5}
    made = [
        left_behind(root, seed=seed, test=0.9 + seed / 100, claim=claim, restarts=2 * seed, optimizer={"name": "sgd", "lr": lr})
        for lr in (0.1, 0.2)
        for seed in (0, 1)
    ]
    page = root / "several.html"
    page.write_text(html(groups_of([gather(run) for run in made]), "several"))
    return page, made


def test_a_page_of_several_runs(browser: Browser, several: tuple[Path, list[Run]]) -> None:
    page, made = several
    with browser.open(page) as shown:
        cells = """[...document.querySelectorAll('[data-group][data-figure=test_accuracy]')]
            .map(cell => [cell.dataset.group, Number(cell.dataset.value)])"""
        means = dict(shown.evaluate(cells))
        assert means == {f"net optimizer.lr={lr}": pytest.approx(0.905) for lr in (0.1, 0.2)}
        assert {key: value for key, value in numbers(shown, "#runs td[data-run]").items() if "test" in key} == {
            f"{run.id} test_accuracy": files.read_object(run.result_file)["test_accuracy"] for run in made
        }
        assert shown.evaluate("document.body.innerText").count("optimizer.lr") >= 5
        for name in ("claims", "segments"):
            shown.evaluate(f"document.getElementById('{name}').scrollIntoView()")
            drawn = f"document.getElementById('{name}').dataset.drawn"
            shown.until(lambda drawn=drawn: shown.evaluate(drawn), 30, name)  # type: ignore[misc]
        bars = shown.evaluate("document.getElementById('segments').data.flatMap(bar => bar.y.map(run => [run, bar.name]))")
        restarted = [run.id for run in made if run.experiment().seed == 1]
        assert sorted(bars) == sorted([run, ending] for run in restarted for ending in ("requeued", "requeued", "finished"))
        assert len(shown.evaluate("[...document.querySelectorAll('[id]')].map(one => one.id)")) == len(
            set(shown.evaluate("[...document.querySelectorAll('[id]')].map(one => one.id)"))
        )
        assert shown.complaints == []


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("dark", [False, True])
def test_phone_and_desk_light_and_dark(browser: Browser, page: Path, tmp_path: Path, width: int, dark: bool) -> None:
    with browser.open(page, width, 900, dark) as shown:
        assert shown.evaluate("document.documentElement.scrollWidth") <= width, "wide tables scroll, the page does not"
        shown.until(lambda: shown.evaluate("document.getElementById('accuracy').dataset.drawn"), 20, "the chart")
        colours = [
            shown.evaluate("getComputedStyle(document.body).backgroundColor"),
            shown.evaluate("document.getElementById('accuracy')._fullLayout.paper_bgcolor"),
        ]
        assert colours == (["rgb(17, 21, 26)", "#11151a"] if dark else ["rgb(255, 255, 255)", "#ffffff"])
        picture = shown.screenshot(tmp_path / "page.png").read_bytes()
        assert struct.unpack(">I", picture[16:20])[0] == width


def test_everything_has_a_name_for_those_who_do_not_see_it(browser: Browser, page: Path) -> None:
    with browser.open(page) as shown:
        nameless = "img:not([alt]), .plot:not([aria-labelledby]), th:not([scope]), .scroll:not([aria-label])"
        unnamed = f"[...document.querySelectorAll('{nameless}')].map(one => one.outerHTML.slice(0, 80))"
        assert shown.evaluate(unnamed) == []
        dangling = """[...document.querySelectorAll('[aria-labelledby]')].map(one => one.getAttribute('aria-labelledby'))
            .filter(name => !document.getElementById(name))"""
        assert shown.evaluate(dangling) == []
        assert shown.evaluate("document.documentElement.lang") == "en"
        contrast = """(() => { const value = (name) => { const hex = getComputedStyle(document.documentElement)
              .getPropertyValue(name).trim(); return [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16) / 255)
              .map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
              .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0); };
            const paper = value('--paper'), band = value('--band');
            return ['--ink', '--soft', '--good', '--bad', '--accent'].flatMap(name => [paper, band].map(back => {
              const [high, low] = [value(name), back].sort((a, b) => b - a); return (high + 0.05) / (low + 0.05); })); })()"""
        assert min(shown.evaluate(contrast)) >= 4.5, "WCAG 2.2 AA, for text"
        shown("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
        assert min(shown.evaluate(contrast)) >= 4.5


@pytest.mark.alone
def test_a_hundred_runs_open_at_once(browser: Browser, tmp_path: Path) -> None:
    lines = ("sgd", 0.1), ("sgd", 0.2), ("adam", 0.001), ("adam", 0.01)
    made = [
        left_behind(tmp_path / "runs", epochs=300, test=0.9 + seed / 1000, seed=seed, restarts=seed % 3,
                    optimizer={"name": name, "lr": lr}, claim={"source": "x", "test_accuracy": 0.91})
        for seed in range(25) for name, lr in lines
    ]  # fmt: skip
    began = time.perf_counter()
    out = tmp_path / "hundred.html"
    out.write_text(html(groups_of([gather(run) for run in made]), "a hundred runs"))
    assert time.perf_counter() - began < 20
    ready = []
    for _ in range(3):  # the best, since other processes share the machine
        with browser.open(out) as shown:
            ready.append(shown.load_seconds)  # all that can be read is there; the curves follow
            runs = numbers(shown, "#runs td[data-run]")
    assert min(ready) < 2, ready
    with browser.open(out) as shown:
        shown.until(lambda: shown.evaluate("document.getElementById('accuracy').dataset.drawn"), 30, "the curves")
        assert shown.evaluate("document.getElementById('accuracy').data.length") == 100
    assert {runs[f"{run.id} test_accuracy"] for run in made} == {0.9 + seed / 1000 for seed in range(25)}
