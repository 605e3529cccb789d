"""What is wrong with an outcome, in words; nothing, if nothing is."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fuzz_cases import Case

from hpc_cifar.cli.status_table import COLUMNS

DOCUMENTED = (0, 1, 2)
MOST_GROWN_MIB = 512
LONGEST_LINE = 3000
FIGURES = ("epoch", "epochs", "step", "val_accuracy", "test_accuracy", "restarts", "gpu_hours", "gpu_hours_planned")
TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("run", "state", "job_id", "reason", "estimated_start", "nodes", "wandb"), (str,)),
    **dict.fromkeys(("epoch", "epochs", "step", "restarts"), (int,)),
    **dict.fromkeys(
        ("val_accuracy", "test_accuracy", "gpu_hours", "eta_s", "images_per_second", "gpu_hours_planned", "gpu_hours_left"),
        (int, float),
    ),
}
STATES = ("pending", "running", "requeued", "finished", "failed", "cancelled", "stopped", "damaged", "unreadable")
UNKNOWN = ("a figure lost silently", "the state changed silently", "the run vanished without a word")
VOLATILE = re.compile(r'"(evaluated|time|updated|age)": "[^"]*"|\d+ s ago')


@dataclass(frozen=True)
class Outcome:
    """What a command did: as of ``fuzz_worker``, with what it printed and the arguments of ``scancel``."""

    code: int | None
    signal: int | None
    hung: bool
    seconds: float
    grown_mib: int
    out: str
    err: str
    cancelled: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """``kind`` is one of few words; ``words`` say what was seen."""

    kind: str
    words: str


class NotJson(ValueError):
    """NaN and Infinity are no JSON."""


def _constant(name: str) -> Any:
    raise NotJson(f"{name} in JSON")


def judge(case: Case, damage: str, now: Outcome, before: Outcome) -> list[Finding]:
    """Compare the outcome with the one of the same command on the undamaged site.

    A file that is not there is that of a run which has not come so far: what it would say is not known, and nobody can tell.
    """
    found = list(_judge(case, now, before))
    if damage in ("absent", "deleted"):
        ended = case.run is not None and case.run.startswith(("fin", "swept"))
        unknown = UNKNOWN if ended else (*UNKNOWN, "a figure changed silently")
        found = [one for one in found if one.kind not in unknown]
        if case.file.name == "experiment.yaml" and case.run in case.argv:  # the name of no run: refused
            found = [one for one in found if not one.kind.startswith("one damaged run ends")]
    return found


def _judge(case: Case, now: Outcome, before: Outcome) -> Iterator[Finding]:
    last = (now.err.strip().splitlines() or [""])[-1][:300]
    if now.hung:
        if case.argv[0] != "wait" or before.code is not None:
            yield Finding("hang", f"no end within {now.seconds:.0f} s; {last}")
        return
    if now.signal is not None:
        yield Finding("killed", f"by signal {now.signal}")
        return
    if "Traceback (most recent call last)" in now.err + now.out:
        yield Finding("traceback", last)
    if found := re.search(r"unexpected (\w+): ?(.*)", now.err):
        yield Finding("unexpected", f"{found[1]}: {found[2][:200]}")
    elif re.search(r"Fatal Python error|MemoryError|RecursionError", now.err):
        yield Finding("unexpected", last)
    if now.code not in DOCUMENTED:
        yield Finding("exit code", f"{now.code}; {last}")
    if now.grown_mib > MOST_GROWN_MIB:
        yield Finding("memory", f"grew by more than {MOST_GROWN_MIB} MiB")
    found = re.search(r"fuzz: signalled (.*)", now.err)
    if found and f"signalled {before_pid(before)} " not in found[0]:
        yield Finding("signal to another process", found[0])
    for word in now.cancelled:
        if not re.fullmatch(r"\d+(_\d+)?", word):
            yield Finding("scancel was given what is no job id", repr(word)[:80])
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f\x80-\x9f\u202e]", now.out + now.err) and case.argv[0] != "logs":
        yield Finding("control characters reach the terminal", "")
    if any(len(line) > LONGEST_LINE for line in now.err.splitlines()):
        yield Finding("a message without end", f"{max(map(len, now.err.splitlines()))} characters")
    if case.run is None and case.argv[0] not in ("evaluate",):
        return
    if now.code != 0:
        if before.code == 0 and _others(case) and case.run is not None:
            yield Finding("one damaged run ends a command on all", last)
        return
    if case.argv[0] in ("status", "list"):
        yield from _table(case, now, before)
    elif case.argv[0] in ("report", "evaluate", "export"):
        yield from _figures(case, now, before)


def before_pid(before: Outcome) -> str:
    found = re.search(r"fuzz: signalled (\d+)", before.err)
    return found[1] if found else "none"


def _others(case: Case) -> bool:
    """Whether the command is about more runs than the damaged one."""
    words = [
        word
        for word in case.argv[1:]
        if not word.startswith("-") and word not in ("json", "csv", "md", "out.html", "best.yaml")
    ]
    if case.argv[0] in ("status", "list"):
        return not [word for word in words if word == case.run or word.isdigit()]
    return case.argv[0] == "report" and "--winner" not in case.argv and (len(words) > 1 or "--campaign" in case.argv)


def _told(case: Case, err: str) -> bool:
    """Whether it names the run; some are called as a state is, so that the word alone is not enough."""
    return case.run is not None and re.search(rf"(?<![\w-]){re.escape(case.run)}(?=[:/'\"]|$)", err, re.MULTILINE) is not None


def _table(case: Case, now: Outcome, before: Outcome) -> Iterator[Finding]:
    if "--json" not in case.argv:
        mine = case.run or ""
        there = [line for line in before.out.splitlines() if not line.startswith(f"{mine}\t") and ": " not in line]
        here = [line for line in now.out.splitlines() if not line.startswith(f"{mine}\t") and ": " not in line]
        if there != here:
            yield Finding("lines of other runs changed", f"{len(there)} before, {len(here)} now")
        if any(len(line.split("\t")) != len(COLUMNS) for line in now.out.splitlines() if line.startswith(f"{mine}\t")):
            yield Finding("a line is torn", "")
        return
    try:
        rows = json.loads(now.out, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        yield Finding("no JSON", f"{type(error).__name__}: {error}"[:100])
        return
    olds = {row["run"]: row for row in json.loads(before.out)}
    news = {row.get("run"): row for row in rows}
    for name in olds.keys() | news.keys():
        if name == case.run:
            continue
        if olds.get(name) != news.get(name):
            yield Finding("lines of other runs changed", f"{name}: {_difference(olds.get(name), news.get(name))}")
            break
    if case.run not in olds:
        return
    old, new = olds[case.run], news.get(case.run)
    if new is None:
        if not _told(case, now.err):
            yield Finding("the run vanished without a word", "")
        return
    for name, types in TYPES.items():
        value = new.get(name)
        if value is None:
            continue
        if not isinstance(value, types) or isinstance(value, bool):
            yield Finding("a wrong type in a line", f"{name} is {value!r:.60}")
        elif isinstance(value, int | float) and not 0 <= value <= (1 if name.endswith("accuracy") else 1e15):
            yield Finding("an impossible number in a line", f"{name} is {value!r:.60}")
    if new.get("state") not in STATES:
        yield Finding("a state that there is not", f"{new.get('state')!r:.60}")
    warned = _told(case, now.err) or (new.get("reason") and new.get("reason") != old.get("reason"))
    if warned:
        return
    for name in FIGURES:
        if new.get(name) is not None and new.get(name) != old.get(name):
            yield Finding("a figure changed silently", f"{name}: {old.get(name)} is {new.get(name)!r:.40}")
            break
    else:
        if new.get("state") != old.get("state"):
            yield Finding("the state changed silently", f"{old.get('state')} is {new.get('state')!r:.40}")
        elif lost := [name for name in FIGURES if new.get(name) is None and old.get(name) is not None]:
            yield Finding("a figure lost silently", ", ".join(lost))


def _difference(old: dict[str, Any] | None, new: dict[str, Any] | None) -> str:
    if old is None or new is None:
        return "not there before" if old is None else "not there now"
    return ", ".join(
        f"{name}: {old.get(name)!r:.40} is {new.get(name)!r:.40}" for name in old if old.get(name) != new.get(name)
    )


def _numbers(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            name = inner.get("run", number) if isinstance(inner, dict) else number
            yield from _numbers(inner, f"{path}.{name}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value


def _figures(case: Case, now: Outcome, before: Outcome) -> Iterator[Finding]:
    """A report or an evaluation with other figures than before must have said of which run it doubts."""
    warned = _told(case, now.err) or now.err.count("warning") > before.err.count("warning")
    json_form = "json" in case.argv or "--json" in case.argv
    if not json_form:
        if re.search(r"(?<![A-Za-z])(nan|inf)\s*%?(?![A-Za-z])", now.out) and not re.search(r"\b(nan|inf)\b", before.out):
            yield Finding("NaN in a report", "")
        old, new = (re.findall(r"\d+\.\d+ ?%|\d\.\d{3,}", one.out) for one in (before, now))
        if warned or case.argv[0] == "export":
            return
        if others := [number for number in new if number not in old]:
            yield Finding("a figure changed silently", f"in {case.argv[0]}: {others[0]}")
        elif len(new) < len(old):
            yield Finding("a figure lost silently", f"in {case.argv[0]}: {len(old) - len(new)} of {len(old)}")
        return
    try:
        value = json.loads(now.out, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        yield Finding("no JSON", f"{type(error).__name__}: {error}"[:100])
        return
    numbers = dict(_numbers(value))
    for path, number in numbers.items():
        if not math.isfinite(number) or (path.endswith("accuracy") and not 0 <= number <= 1):
            yield Finding("an impossible number in a report", f"{path} is {number!r:.40}")
            break
    if warned:
        return
    olds = dict(_numbers(json.loads(before.out)))
    watched = re.compile(r"accuracy|loss|\.n$|mean|std|epoch|selected|ece|precision|recall|f1|seconds|gpu_hours|images")
    for path, number in numbers.items():
        if ".config." in path or not watched.search(path):
            continue
        if path in olds and olds[path] != number:
            yield Finding("a figure changed silently", f"in {case.argv[0]}: {path}: {olds[path]} is {number!r:.40}")
            return
    if lost := [path for path in olds if path not in numbers and watched.search(path) and ".config." not in path]:
        yield Finding("a figure lost silently", f"in {case.argv[0]}: {lost[0]} and {len(lost) - 1} more")
