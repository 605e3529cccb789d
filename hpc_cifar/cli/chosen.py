"""Which runs a command is about: one's own, unless the user says whose.

Commands that read take a colleague's run by its path or with ``--owner``. Commands that run its code, signal its processes, or
send its files away take it only with ``--code-of``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from pathlib import Path

    from ..runs import Run


def user_of(name: str | None, option: str) -> int | None:
    """The number of the user of ``--owner`` or ``--code-of``."""
    from .. import owner

    return None if name is None else owner.number_of(name, option)


def to_read(tokens: Sequence[str] | str, root: Path, whose: str | None = None, *, quiet: bool = False) -> list[Run]:
    """The runs meant by tokens, or the one run meant by a text; a colleague's is read only if nothing in it leads elsewhere.

    Args:
        quiet: say nothing about runs that are left out: it was said before.

    Raises:
        UsageError: there is no such run.
        RunError: none of them may be read; the first of several that may not is a warning.
    """
    return sound(_found(tokens, root, whose, "--owner", quiet), quiet=quiet)


def everything(root: Path, whose: str | None = None, campaign: str | None = None, *, quiet: bool = False) -> list[Run]:
    """All runs of one's own, or of a colleague's, or those of a campaign; says on standard error how many others there are."""
    from .. import runs

    user = user_of(whose, "--owner")
    if not quiet:
        say_left_out(root, user, "--owner")
    chosen = runs.all_runs(root, user) if campaign is None else runs.of_campaign(campaign, root, user)
    if campaign is not None:
        _say_unknown(runs.all_runs(root, user), campaign)
    return sound(chosen, some=True, quiet=quiet)


def _say_unknown(every: Sequence[Run], campaign: str) -> None:
    """Name the runs of which nobody can say whether they are of the campaign: its figures may be without theirs."""
    from .. import files, runs

    for run in every:
        if run.campaign is None:
            try:
                found = runs.tree(run.experiment_file)
            except (OSError, files.Damaged):
                found = None
            if not isinstance(found, dict) or "tracking" not in found:  # which every experiment has that a command wrote
                typer.echo(f"warning: {run.id}: experiment.yaml is damaged; it may be of campaign {campaign}", err=True)


def to_act_on(tokens: Sequence[str] | str, root: Path, code_of: str | None) -> list[Run]:
    """The runs meant by tokens, or the one meant by a text, which are one's own, or of the user whose code may run.

    Raises:
        UsageError: there is no such run.
        RunError: one is somebody else's.
    """
    from .. import owner

    found = _found(tokens, root, code_of, "--code-of")
    for run in found:
        owner.check_own(run.path, code_of)
    return found


def _found(tokens: Sequence[str] | str, root: Path, whose: str | None, option: str, quiet: bool = False) -> list[Run]:
    from .. import runs

    one, user = isinstance(tokens, str), user_of(whose, option)
    found = [runs.find(str(tokens), root, user, option)] if one else runs.find_all(tokens, root, user, option)
    if not quiet and any(os.sep not in token for token in ([str(tokens)] if one else tokens)):
        say_left_out(root, user, option)
    return found


def sound(found: list[Run], *, some: bool = False, quiet: bool = False) -> list[Run]:
    """Without runs of others in which a link leads elsewhere, or the like; each is a warning.

    Args:
        some: whether it is no error if none is left.
        quiet: without the warnings.

    Raises:
        RunError: none is left.
    """
    from .. import owner
    from ..errors import RunError

    kept: list[Run] = []
    problems: list[RunError] = []
    for run in found:
        try:
            if not owner.is_own(run.path):
                owner.check_tree(run.path)
            kept.append(run)
        except RunError as error:
            problems.append(error)
    if problems and not kept and not some:
        raise problems[0]
    for problem in () if quiet else problems:
        typer.echo(f"warning: left out: {problem}", err=True)
    return kept


def say_left_out(root: Path, user: int | None, option: str) -> None:
    """How many runs of others lie in the folder, and whose, on standard error; ``option`` is how the command takes them."""
    from .. import owner

    if words := owner.listing(root, user).words(option):
        typer.echo(f"hpc-cifar: {words}", err=True)
