"""What a published source says of its system: figures, and bounds of figures.

The words for them are here, too, so that every report and table says them the same way.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, model_validator

from .fields import Count, Model, Positive, Real

Accuracy = Annotated[Real, Field(ge=0, le=1)]
Loss = Annotated[Real, Field(ge=0)]


class Range(Model):
    """A figure of which the source says a bound or two, such as ``{at_least: 0.4, at_most: 0.5}``."""

    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _low_to_high(self) -> Range:
        low, high = self.at_least, self.at_most
        if low is None and high is None:
            raise ValueError("a range needs at_least, at_most or both")
        if low is not None and high is not None and low > high:
            raise ValueError(f"at_least: {low:g} is above at_most: {high:g}")
        return self


class AccuracyRange(Range):
    """An accuracy of which the source says a bound or two: "40-50 %" is ``{at_least: 0.4, at_most: 0.5}``."""

    at_least: Accuracy | None = None
    """The lowest value that is claimed; nothing: the source names an upper bound only."""
    at_most: Accuracy | None = None
    """The highest value that is claimed; nothing: the source names a lower bound only."""


class LossRange(Range):
    """A loss of which the source says a bound or two."""

    at_least: Loss | None = None
    """As for an accuracy."""
    at_most: Loss | None = None
    """As for an accuracy."""


Figure = float | Range
"""A claimed figure: a number, or a range of it."""


def _kind(value: Any) -> str:
    """Which of the two a value is meant to be, so that what is wrong with it is said once."""
    return "range" if isinstance(value, dict | Range) else "number"


ClaimedAccuracy = Annotated[Annotated[Accuracy, Tag("number")] | Annotated[AccuracyRange, Tag("range")], Discriminator(_kind)]
ClaimedLoss = Annotated[Annotated[Loss, Tag("number")] | Annotated[LossRange, Tag("range")], Discriminator(_kind)]


class Claim(Model):
    """The source's own figures, which a report puts beside what was measured. Accuracies are fractions of 1."""

    source: str
    """Where the figures come from."""
    inferred: tuple[str, ...] = ()
    """What the source leaves open, and this file decides."""
    note: str | None = None
    """Anything else that a reader should know."""
    train_accuracy: ClaimedAccuracy | None = None
    """Claimed accuracy on the training images; a mapping where the source says bounds."""
    train_loss: ClaimedLoss | None = None
    """Claimed loss on the training images."""
    val_accuracy: ClaimedAccuracy | None = None
    """Claimed accuracy on the validation images."""
    val_loss: ClaimedLoss | None = None
    """Claimed loss on the validation images."""
    test_accuracy: ClaimedAccuracy | None = None
    """Claimed accuracy on the test images."""
    test_loss: ClaimedLoss | None = None
    """Claimed loss on the test images."""
    epochs: Count | None = None
    """Epochs that the source trained for."""
    hours: Positive | None = None
    """Hours that its training took."""


def bounds(figure: Figure) -> tuple[float | None, float | None]:
    """The lowest and the highest value that agree with a claim; None where it has no such bound. A number is both."""
    return (figure.at_least, figure.at_most) if isinstance(figure, Range) else (figure, figure)


def cell(figure: Figure | None, name: str) -> str:
    """A figure in a table: ``93.12%``, ``< 30%``, ``> 30%`` or ``40-50%``; a loss with four digits; ``-`` for none.

    Args:
        name: of the figure, such as ``val_accuracy``.
    """
    if figure is None:
        return "-"
    if not isinstance(figure, Range):
        return f"{figure:.2%}" if name.endswith("accuracy") else f"{figure:.4f}"
    unit = "%" if name.endswith("accuracy") else ""
    low, high = (_short(bound, name) for bound in bounds(figure))
    if low and high:
        return f"{low}-{high}{unit}"
    return f"> {low}{unit}" if low else f"< {high}{unit}"


def words(figure: Figure, name: str) -> str:
    """A claimed figure in a sentence, behind "claimed": ``93.12%``, ``below 30%``, ``above 30%`` or ``40% to 50%``."""
    if not isinstance(figure, Range):
        return cell(figure, name)
    unit = "%" if name.endswith("accuracy") else ""
    low, high = (f"{short}{unit}" if (short := _short(bound, name)) else "" for bound in bounds(figure))
    if low and high:
        return f"{low} to {high}"
    return f"above {low}" if low else f"below {high}"


def _short(bound: float | None, name: str) -> str:
    """Without the unit, with no more digits than the source had."""
    if bound is None:
        return ""
    return f"{100 * bound:.6g}" if name.endswith("accuracy") else f"{bound:g}"
