"""``hpc-cifar doctor``: parse, call, print."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from . import complete

if TYPE_CHECKING:
    from ..launch.doctor import Machine


def doctor(
    cluster: Annotated[
        str | None,
        typer.Option(
            help="Look at a compute node of this profile, too, by a job.", show_default=False, autocompletion=complete.clusters
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="An object with the machines and the verdict.")] = False,
) -> None:
    """Check this machine, and a compute node with --cluster; each line that is not ok says what fixes it.

    \b
    hpc-cifar doctor
    hpc-cifar doctor --cluster mysite
    hpc-cifar doctor --json | jq '.machines[].findings[] | select(.state != "ok")'

    Python, packages, compiler, folders with their room, locks and clock, data, weights, scratch, /dev/shm, torch with
    every GPU, FFCV, DALI, the W&B login, TensorBoard, Slurm. Exit code 1 if there is a problem; a warning is none.
    """
    from .. import files
    from ..errors import HpcCifarError
    from ..findings import problem
    from ..launch import doctor as looks
    from .submit import chosen_cluster

    chosen = chosen_cluster(cluster, False)
    places = files.data_root(), files.runs_root()
    found = [looks.here(*places, chosen)]
    if not as_json:
        _print("this machine", found[0])
    if cluster is not None and chosen.executor == "slurm":
        try:
            found.append(looks.on_node(chosen, *places, lambda text: typer.echo(text, err=as_json)))
        except HpcCifarError as error:
            fix = f"hpc-cifar submit quickstart-digits --cluster {cluster} --dry-run shows the script of a job there"
            refused = problem("job", str(error), fix)
            found.append(looks.Machine("no node", (refused,)))
        if not as_json:
            _print(f"compute node of {chosen.name}", found[1])
    states = [one.state for machine in found for one in machine.findings]
    if as_json:
        machines = [{"host": one.host, "findings": [row.as_dict() for row in one.findings]} for one in found]
        typer.echo(json.dumps({"good": "problem" not in states, "machines": machines}, indent=2))
    else:
        counts = [(states.count(state), state) for state in ("problem", "warning")]
        said = ", ".join(f"{count} {state}{'s' if count > 1 else ''}" for count, state in counts if count)
        typer.echo(f"doctor: {said or 'all is well'}")
    if "problem" in states:
        raise typer.Exit(1)


def _print(what: str, found: Machine) -> None:
    from .console import printable

    width = max(len(one.name) for one in found.findings)
    typer.echo(f"{what} ({found.host})")
    for one in found.findings:
        typer.echo(f"  {one.state:<7}  {one.name:<{width}}  {printable(one.said)}")
        if one.fix:
            typer.echo(f"{'':{width + 13}}fix: {printable(one.fix)}")
