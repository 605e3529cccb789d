"""Every file of runs, stores, job files and archives damaged by a seed, and a command that meets it.

``HPC_CIFAR_FUZZ=10000`` and ``HPC_CIFAR_FUZZ_COMMANDS=200`` say how many cases are played in process and as commands of their
own (``make fuzz``); one is played again alone by its number: ``python tests/fuzz/fuzz_play.py --only NUMBER``.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fuzz_damage
import fuzz_play
import pytest
from fuzz_cases import Case, case
from fuzz_judge import Outcome, judge
from fuzz_play import Player
from fuzz_site import Fuzzed

CASES = int(os.environ.get("HPC_CIFAR_FUZZ", "200"))
COMMANDS = int(os.environ.get("HPC_CIFAR_FUZZ_COMMANDS", "6"))
SEED = int(os.environ.get("HPC_CIFAR_FUZZ_SEED", "0"))
RESULTS = os.environ.get("HPC_CIFAR_FUZZ_RESULTS")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]


@pytest.fixture(scope="module")
def player(tmp_path_factory: pytest.TempPathFactory, digits_data: Path, repository: Path) -> Iterator[Player]:
    site = Fuzzed(tmp_path_factory.mktemp("fuzz"), repository)
    made = Player(site, SEED)
    try:
        made.make(digits_data, weights=CASES >= 1000)
        yield made
    finally:
        made.close()
        site.close()


def failed(played: list[fuzz_play.Played]) -> str:
    """What a person needs of the cases that went wrong."""
    lines = [json.dumps(one.as_dict()) for one in played if one.findings]
    again = "python tests/fuzz/fuzz_play.py --only NUMBER" + (f" --seed {SEED}" if SEED else "")
    return "\n".join([f"{len(lines)} of {len(played)} cases; again, alone: {again}", *lines[:50]])


def results(**parts: Any) -> None:
    if RESULTS:
        path = Path(RESULTS)
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, "hardware": fuzz_play.hardware(), "seed": SEED, **parts}, indent=1) + "\n")


def test_damaged_files_end_no_command_and_change_no_figure(player: Player) -> None:
    began = time.monotonic()
    played = fuzz_play.play_all(player, range(CASES), as_process=False)
    results(in_process=fuzz_play.summary(played, time.monotonic() - began))
    assert not any(one.findings for one in played), failed(played)


def test_nor_those_of_real_commands(player: Player) -> None:
    """Cases of their own, in processes that import everything anew."""
    player.before.clear()
    began = time.monotonic()
    played = fuzz_play.play_all(player, range(1_000_000, 1_000_000 + COMMANDS), as_process=True)
    results(commands=fuzz_play.summary(played, time.monotonic() - began))
    assert not any(one.findings for one in played), failed(played)


# ---- the harness itself ------------------------------------------------------------------------------------------------


def outcome(out: str = "", err: str = "", code: int | None = 0, **values: Any) -> Outcome:
    return Outcome(**{"code": code, "signal": None, "hung": False, "seconds": 0.1, "grown_mib": 0, **values}, out=out, err=err)


LISTED = Case(0, Path("runs/b/state.json"), "b", ("list", "--json"), None, "0")
ROW = {"run": "a", "state": "finished", "epoch": 2, "test_accuracy": 0.5, "reason": None}
CALM = json.dumps([ROW, {**ROW, "run": "b"}])


@pytest.mark.parametrize(
    ("kind", "now"),
    [
        (
            "unexpected",
            outcome(err="hpc-cifar: error: unexpected KeyError: 'x' (HPC_CIFAR_DEBUG=1 shows the traceback)", code=1),
        ),
        ("traceback", outcome(err="Traceback (most recent call last):\n  x\nKeyError: 1", code=1)),
        ("hang", outcome(code=None, hung=True)),
        ("killed", outcome(code=None, signal=11)),
        ("memory", outcome(CALM, grown_mib=900)),
        ("exit code", outcome(code=70)),
        ("one damaged run ends a command on all", outcome(err="hpc-cifar: error: b: no", code=1)),
        ("lines of other runs changed", outcome(json.dumps([{**ROW, "epoch": 3}, {**ROW, "run": "b"}]))),
        ("the run vanished without a word", outcome(json.dumps([ROW]))),
        ("a figure changed silently", outcome(json.dumps([ROW, {**ROW, "run": "b", "test_accuracy": 0.6}]))),
        ("a wrong type in a line", outcome(json.dumps([ROW, {**ROW, "run": "b", "epoch": "2"}]))),
        ("no JSON", outcome(CALM.replace("0.5", "NaN"))),
        ("the state changed silently", outcome(json.dumps([ROW, {**ROW, "run": "b", "state": "pending"}]))),
        ("scancel was given what is no job id", outcome(CALM, cancelled=("--user=root",))),
        ("control characters reach the terminal", outcome(CALM, err="\x1b[2J")),
    ],
)
def test_the_judge_sees(kind: str, now: Outcome) -> None:
    assert kind in {one.kind for one in judge(LISTED, "value", now, outcome(CALM))}


def test_the_judge_accepts_what_is_said() -> None:
    doubted = json.dumps([ROW, {**ROW, "run": "b", "test_accuracy": None, "reason": "result.json is damaged"}])
    assert judge(LISTED, "value", outcome(CALM), outcome(CALM)) == []
    assert judge(LISTED, "value", outcome(doubted), outcome(CALM)) == []


def test_a_case_is_the_same_by_its_number_and_the_site_is_put_back(player: Player) -> None:
    numbers = random.Random(1).sample(range(10_000), 40)
    assert [case(player.site, number) for number in numbers] == [case(player.site, number) for number in numbers]
    for number in numbers:
        one = case(player.site, number)
        path = player.site.here / one.file
        words = fuzz_damage.apply(path, one.random)
        player.fix()
        assert words == fuzz_damage.apply(path, one.random)
        player.fix()
        pristine = player.site.pristine / one.file
        assert (path.is_symlink(), path.is_file()) == (pristine.is_symlink(), pristine.is_file())
        assert not path.is_file() or path.read_bytes() == pristine.read_bytes()


def test_hangs_crashes_and_memory_are_outcomes(player: Player, tmp_path: Path) -> None:
    """The worker outlives what its forks do."""
    package = tmp_path / "hpc_cifar"
    (package / "cli").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "cli" / "__init__.py").touch()
    (package / "cli" / "main.py").write_text("import typer\napp = typer.Typer()\n@app.command()\ndef one() -> None: ...\n")
    (package / "__main__.py").write_text(
        "import os, sys, time\nwhat = sys.argv[1]\n"
        "if what == 'hang': time.sleep(60)\n"
        "if what == 'crash': import ctypes; ctypes.string_at(0)\n"
        "if what == 'memory': held = b'x' * (700 * 2**20)\n"
        "if what == 'kill': os.kill(1, 15)\n"
    )
    site = Fuzzed(tmp_path / "site", tmp_path)
    other = Player(site)
    try:
        fuzz_play_light = fuzz_play.LIGHT_S
        fuzz_play.LIGHT_S = 1.0
        seen = {
            what: other.run(Case(0, Path(), None, (what,), None, ""), False) for what in ("hang", "crash", "memory", "kill", "")
        }
    finally:
        fuzz_play.LIGHT_S = fuzz_play_light
        other.close()
        site.close()
    assert seen["hang"].hung and seen["crash"].signal == 11 and seen["memory"].grown_mib > 600
    assert "fuzz: signalled 1 15" in seen["kill"].err and seen[""].code == 0
