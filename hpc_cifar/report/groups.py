"""Runs of one experiment together: mean and spread over seeds and folds, beside what the source claims."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from ..config import claim as claims
from ..config.claim import Claim, Figure, Range
from ..config.difference import comparable, flat, repeated
from .facts import FIGURES, Facts, ranking

MEASURES = ("test_accuracy", "val_accuracy", "train_accuracy")  # of a verdict, the first that is claimed and measured
# images of a test, by dataset
TESTS = {"cifar10": 10_000, "cifar10-jpeg": 10_000, "cifar10-lossless-subset": 1_017, "cifar100": 10_000, "digits": 359}


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of ``n`` values, one of each of the ``seeds``; ``std`` is None for one."""

    mean: float
    std: float | None
    n: int
    seeds: str = ""


@dataclass(frozen=True)
class Verdict:
    """``word`` is ``above``, ``as claimed``, ``below``, ``unclear``, ``unfinished`` or ``no claim``; ``text`` has numbers."""

    word: str
    text: str


@dataclass(frozen=True)
class Group:
    """Runs that differ in seed and fold only. ``title`` names them within a report."""

    title: str
    runs: tuple[Facts, ...]
    config: dict[str, Any]

    @property
    def claim(self) -> Claim | None:
        return self.runs[0].claim

    @property
    def finished(self) -> tuple[Facts, ...]:
        return tuple(one for one in self.runs if one.state == "finished")

    @cached_property
    def counted(self) -> tuple[Facts, ...]:
        """Of the finished runs the first of each seed and fold: the same seed again is no other measurement."""
        first: dict[str, Facts] = {}
        for one in self.finished:
            first.setdefault(one.label, one)
        return tuple(first.values())

    @property
    def seeds(self) -> str:
        """Those of the runs that count."""
        return seeds_of(self.counted)

    @cached_property
    def remarks(self) -> tuple[str, ...]:
        """What a reader of its figures has to know: runs that do not count, and warnings of each."""
        found = []
        for one in self.counted:
            same = [other.id for other in self.finished if other.label == one.label and other is not one]
            if same:
                found.append(f"{self.title}: {one.label} counts once, as {one.id} has it; the same: {', '.join(same)}")
        return (*found, *(f"{one.id}: {text}" for one in self.runs for text in one.warnings))

    @cached_property
    def spreads(self) -> dict[str, Spread]:
        """Figures and costs of the finished runs, each seed once."""
        found = {}
        for name in (*FIGURES, "epochs", "seconds", "gpu_hours"):
            known = [(one, value) for one in self.counted if (value := _value(one, name)) is not None]
            if known:
                found[name] = spread([value for _, value in known], seeds_of([one for one, _ in known]))
        return found

    def claimed(self, figure: str) -> Figure | None:
        """Of the accuracies and losses."""
        return getattr(self.claim, figure, None)

    @cached_property
    def verdict(self) -> Verdict:
        measured = next((name for name in MEASURES if name in self.spreads), None)
        if measured is None:
            states = ", ".join(dict.fromkeys(one.state for one in self.runs))
            return Verdict("unfinished", f"no run has finished yet ({states})")
        figure = next((name for name in MEASURES if name in self.spreads and self.claimed(name) is not None), None)
        if figure is None:
            return Verdict("no claim", f"{_words(measured)} {percent(self.spreads[measured])}")
        claim, found = self.claimed(figure), self.spreads[figure]
        assert claim is not None
        difference = outside(found.mean, claim)
        points = f"{abs(difference) * 100:.2f} points {'above' if difference > 0 else 'below'}"
        if isinstance(claim, Range):
            where = points if difference else "within"
            text = f"{_words(figure)} {percent(found)}, claimed {claims.words(claim, figure)}: {where}"
        else:
            text = f"{_words(figure)} {percent(found)}, {points} the claimed {claim:.2%}"
        margin = margin_of(found, images_of(self.runs[0], figure))
        if margin is None:
            return Verdict("unclear", f"{text}; one run, of unknown images")
        return Verdict("as claimed" if abs(difference) <= margin else "above" if difference > 0 else "below", text)


def outside(value: float, claim: Figure) -> float:
    """How far a value is above the highest one that is claimed, or, negative, below the lowest; 0 between them."""
    low, high = claims.bounds(claim)
    if high is not None and value > high:
        return value - high
    return min(value - low, 0.0) if low is not None else 0.0


def spread(values: Sequence[float], seeds: str = "") -> Spread:
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values), seeds)


def seeds_of(runs: Sequence[Facts]) -> str:
    """``seed 3``, ``seeds 0-4``, ``seeds 0, 1, folds 0-4``; ``seed 0, fold 1; seed 1, fold 0`` if they are not all there."""
    pairs = {(one.experiment.seed, one.experiment.data.fold) for one in runs}
    seeds, folds = ({pair[part] for pair in pairs} for part in (0, 1))
    if len(pairs) < len(seeds) * len(folds):
        return "; ".join(dict.fromkeys(one.label for one in runs))
    parts = [("seed", sorted(seed for seed in seeds if seed is not None)), ("fold", sorted(f for f in folds if f is not None))]
    return ", ".join(f"{word}{'s' if len(known) > 1 else ''} {_numbers(known)}" for word, known in parts if known)


def _numbers(known: Sequence[int]) -> str:
    """``0-4, 7``."""
    spans: list[list[int]] = []
    for number in known:
        if spans and number == spans[-1][-1] + 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    return ", ".join(f"{span[0]}-{span[-1]}" if len(span) > 2 else ", ".join(map(str, span)) for span in spans)


def margin_of(found: Spread, images: int | None) -> float | None:
    """Half of the 95 % interval of a mean accuracy: what the seeds say (Student's t), and at least what so many images can say
    (binomial). None where neither says anything.
    """
    margins = []
    if images:
        margins.append(1.96 * math.sqrt(max(found.mean * (1 - found.mean), 0.0) / images))
    if found.std is not None:
        from scipy.stats import t

        margins.append(float(t.ppf(0.975, found.n - 1)) * found.std / math.sqrt(found.n))
    return max(margins, default=None)


def images_of(one: Facts, figure: str) -> int | None:
    """Images that a figure was measured on, if that is known."""
    data, split = one.experiment.data, figure.partition("_")[0]
    if split == "test" or (split == "val" and data.validation == "test"):
        evaluated = one.evaluation.get("images") if one.evaluation.get("split") == "test" else None
        return evaluated or TESTS.get(data.dataset)
    plan = one.run.plan()
    trained = (plan.train_images or None) if plan is not None else None
    if split == "train" or not trained:
        return trained
    share = 1 / data.folds if data.folds else data.validation
    return round(trained * share / (1 - share)) if isinstance(share, float) and data.train_images is None else None


def percent(found: Spread) -> str:
    """``93.12 % ± 0.10 (n = 3: seeds 0-2)``."""
    deviation = f" ± {found.std:.2%}" if found.std is not None else ""
    return f"{found.mean:.2%}{deviation} ({of(found)})"


def of(found: Spread) -> str:
    """``n = 3: seeds 0-2``."""
    return f"n = {found.n}" + (f": {found.seeds}" if found.seeds else "")


def groups_of(facts: Sequence[Facts]) -> list[Group]:
    """In the order in which their first runs came; each has a title of its own."""
    members: dict[str, list[Facts]] = {}
    configs: dict[str, dict[str, Any]] = {}
    for one in facts:
        config = comparable(one.experiment)
        key = json.dumps([one.experiment.name, config], sort_keys=True)
        members.setdefault(key, []).append(one)
        configs[key] = config
    names = {key: runs[0].experiment.name for key, runs in members.items()}
    told = {name: telling([configs[key] for key in members if names[key] == name]) for name in dict.fromkeys(names.values())}
    found = []
    for key, runs in members.items():
        fields = [f"{field}={text_of(configs[key].get(field))}" for field in told[names[key]]]
        found.append(Group(" ".join([names[key], *fields]), tuple(runs), configs[key]))
    return found


def telling(configs: Sequence[dict[str, Any]]) -> list[str]:
    """Few fields that tell these apart: first the one with the most values."""

    def values(fields: Sequence[str]) -> int:
        return len({json.dumps([config.get(name) for name in fields]) for config in configs})

    left, chosen = differing(configs), list[str]()
    while left and values(chosen) < len(configs):
        chosen.append(max(left, key=lambda name: values([*chosen, name])))
        left.remove(chosen[-1])
    return chosen


def changed(one: Facts) -> list[tuple[str, Any, Any]]:
    """What the experiment sets otherwise than it would be: dotted name, value, and the default, None where there is none."""
    said = flat(one.experiment.model_dump(mode="json", exclude_defaults=True))
    return [(name, value, _default(one.experiment, name)) for name, value in said.items() if not repeated(name)]


def _default(model: Any, name: str) -> Any:
    first, _, rest = name.partition(".")
    if not isinstance(model, BaseModel) or first not in type(model).model_fields:
        return None
    if rest:
        return _default(getattr(model, first), rest)
    default = type(model).model_fields[first].get_default(call_default_factory=True)
    return None if default is PydanticUndefined else default


def differing(configs: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the fields that are not the same in all."""
    names = dict.fromkeys(name for config in configs for name in config)
    return [name for name in names if len({json.dumps(config.get(name), sort_keys=True) for config in configs}) > 1]


def text_of(value: Any) -> str:
    """A field's value in a table."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        text = json.dumps(value)
        return text if len(text) <= 24 else f"{len(value)} entries"
    return str(value)


def headline(groups: Sequence[Group]) -> str:
    """The verdict over all, in one sentence."""
    if len(groups) == 1:
        return groups[0].verdict.text
    words = Counter(group.verdict.word for group in groups)
    known = {word: words[word] for word in ("above", "as claimed", "below") if words[word]}
    counts = ", ".join(f"{count} {word}" for word, count in known.items())
    parts = [f"of {sum(known.values())} claims, {counts}"] if known else []
    runs = [one for group in groups for one in group.runs]
    parts.append(f"{sum(one.state == 'finished' for one in runs)} of {len(runs)} runs have finished")
    if first := best(groups):
        parts.append(f"best by validation: {first.title}, {first.verdict.text}")
    return "; ".join(parts)


def remarks(groups: Sequence[Group]) -> list[str]:
    return [remark for group in groups for remark in group.remarks]


def best(groups: Sequence[Group]) -> Group | None:
    """By the mean figure on validation images; None where those are the test images, or not the same in all."""
    ranked = [(mean, group) for group in groups if (mean := _rank(group)) is not None]
    data = [group.runs[0].experiment.data for _, group in ranked]
    splits = {(one.dataset, one.validation, one.split_seed, one.folds) for one in data}
    return max(ranked, key=lambda pair: pair[0])[1] if len(splits) == 1 else None


def _rank(group: Group) -> float | None:
    ranks = [rank for one in group.counted if (rank := ranking(one)) is not None]
    return statistics.fmean(ranks) if ranks else None


def _value(one: Facts, name: str) -> float | None:
    if name == "epochs":
        return float(one.epochs[-1]["epoch"]) if one.epochs else None
    return one.figures.get(name, one.cost.get(name))


def _words(figure: str) -> str:
    return {"val": "validation", "test": "test", "train": "training"}[figure.partition("_")[0]] + " accuracy"
