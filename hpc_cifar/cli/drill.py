"""``hpc-cifar drill``: parse, call, print."""

from __future__ import annotations

import json
import random
import secrets
import time
from typing import TYPE_CHECKING, Annotated

import typer

from . import complete, options

if TYPE_CHECKING:
    from ..launch.drill import Drill, Outcome

HEADS = ("fault", "emulated by", "then", "lost steps", "seconds", "as the twin")


def drill(
    job: options.Job,
    cluster: Annotated[
        str | None, typer.Option(help="Profile: a name or a path.", show_default=False, autocompletion=complete.clusters)
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a field; may be repeated.")
    ] = None,
    short: Annotated[bool, typer.Option("--short", help="Five faults instead of all.")] = False,
    faults: Annotated[str | None, typer.Option(help="Which faults, separated by commas.", show_default=False)] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**63 - 1, help="Of the random steps and ranks.", show_default=False)
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the runs of the drill.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="An object with the faults and the verdict.")] = False,
) -> None:
    """Rehearse failures: disturb a short training in every way that clusters have, and prove that nothing is lost.

    \b
    hpc-cifar drill quickstart-digits --short
    hpc-cifar drill jobs/deep300.yaml --cluster mysite --faults preempt,kill-all,time-limit

    It trains the job, shortened, twice: once undisturbed, once under preemptions, kills, damaged checkpoints, a full disk,
    hangs and a time limit, with W&B out of reach. Exit code 1 if anything was lost that need not be.
    """
    from .. import files, owner
    from ..config.load import load_experiment
    from ..config.messages import did_you_mean
    from ..config.packaged import find_job
    from ..errors import HpcCifarError, UsageError
    from ..launch import drill as drills
    from ..launch import submit
    from .submit import chosen_cluster

    chosen = chosen_cluster(cluster, False)
    data_root = files.data_root()
    experiment = load_experiment(find_job(job), sets or [])
    plan = submit.plan_for(experiment, chosen, submit.checked_train_images(experiment, data_root))
    possible = drills.possible(chosen, plan.placement.world_size)
    wanted = [name.strip() for name in faults.split(",")] if faults is not None else list(drills.SHORT) if short else possible
    if unknown := [name for name in wanted if name not in possible]:
        hint = did_you_mean(unknown[0], possible, "faults")
        raise UsageError(f"--faults: {unknown[0]!r} is none that {chosen.name} can have; {hint}")
    if short and faults is not None:
        raise UsageError("--short and --faults: use one of them")
    rehearsal = drills.rehearsed(experiment, wanted, plan.train_images)
    number = seed if seed is not None else random.SystemRandom().randrange(10**6)
    root = owner.part(files.runs_root(), ".drills") / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    owner.make_part(root.parent)
    made = drills.Drill(rehearsal, chosen, root, data_root, number, lambda text: typer.echo(text, err=as_json))
    typer.echo(f"drill of {experiment.name} on {chosen.name}: {len(wanted)} faults, --seed {number}, in {root}", err=as_json)
    try:
        outcomes = made.run(wanted)
    except HpcCifarError:
        typer.echo(f"drill: not survived; the runs and their logs are kept in {root}", err=True)
        raise
    same = _same_weights(made)
    good = same and all(outcome.good for outcome in outcomes)
    if as_json:
        rows = [outcome.as_dict() for outcome in outcomes]
        typer.echo(json.dumps({"seed": number, "good": good, "same_weights": same, "faults": rows}, indent=2))
    else:
        _print(outcomes, same)
    if not good or keep or not made.remove():
        typer.echo(f"the runs are kept in {root}", err=as_json)
    if not good:
        raise typer.Exit(1)


def _same_weights(made: Drill) -> bool:
    from ..errors import RunError
    from ..train import checkpoint

    found = [checkpoint.named(run.checkpoints, "latest") for run in (made.victim, made.twin)]
    if found[0] is None or found[1] is None:
        raise RunError(f"{made.root}: a run has no checkpoint")
    return checkpoint.same(found[0], found[1])


def _print(outcomes: list[Outcome], same: bool) -> None:
    from ..launch.drill import FAULTS

    rows = [
        (
            FAULTS[one.fault].what, FAULTS[one.fault].how, f"on from step {one.from_step} {one.note}", str(one.lost),
            f"{one.back_s:.1f}", "yes" if one.same else "NO",
        )
        for one in outcomes
    ]  # fmt: skip
    widths = [max(len(row[column]) for row in [HEADS, *rows]) for column in range(len(HEADS))]
    typer.echo()
    for row in [HEADS, *rows]:
        typer.echo("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    lost = sum(one.lost or 0 for one in outcomes)
    bad = [one.fault for one in outcomes if not one.good]
    words = "bit for bit the same" if same else "NOT the same"
    typer.echo(f"\n{len(outcomes)} faults, W&B out of reach: {lost} steps were made twice; the final weights are {words}")
    if bad:
        typer.echo(f"lost what need not be: {', '.join(bad)}")
