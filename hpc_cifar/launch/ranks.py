"""Which of several processes this one is, as torchrun, srun or mpirun tells it: the variables of torchrun, all or none."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from ..errors import UsageError
from .job import port_for

OTHERWISE = "start it by `torchrun`, by `srun torchrun` on several nodes, or by `hpc-cifar submit`"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# names of rank, size, local rank and local size
_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
    ("PMIX_RANK", "PMIX_SIZE", "PMIX_LOCAL_RANK", "PMIX_LOCAL_SIZE"),
)
FIRST_SPECIAL_STEP = 4294967290 - 10  # steps of Slurm itself: interactive, batch, extern
_STEP = ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NODELIST", "SLURM_SRUN_COMM_HOST")
_ORDER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def described(found: Mapping[str, str], parent: int) -> dict[str, str]:
    """What torchrun would have set, for a process of several; empty for one that is alone.

    Args:
        found: the environment.
        parent: the process that started this one, the same for all ranks of a node.

    Raises:
        UsageError: variables do not fit together, or do not tell enough; the message names them.
    """
    told = {name: found[name] for name in _ORDER if found.get(name)}
    size = _whole(told, "WORLD_SIZE")
    known = _of_mpi(found) or _of_step(found)  # one of several by a launcher's word, though nothing says so in torchrun's
    if size == 1 or (size is None and not _whole(told, "RANK") and not known):
        return {}
    if (known_size := known.get("WORLD_SIZE")) and size is not None and known_size != str(size):
        known = {}  # torchrun in a step of one task a node, or the like: its own word counts
    told = {**known, **told}
    if (place := _whole(told, "RANK")) is not None and (count := _whole(told, "WORLD_SIZE")) is not None and not place < count:
        raise UsageError(f"RANK={place}, WORLD_SIZE={count}: ranks count from 0 to WORLD_SIZE - 1, as torchrun sets them")
    _fill(told, found, parent)
    if missing := [name for name in _ORDER if name not in told]:
        who = f"RANK={told.get('RANK', '?')}, WORLD_SIZE={told.get('WORLD_SIZE', '?')}"
        raise UsageError(f"{who}: {' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not set; {OTHERWISE}")
    numbers = {name: _whole(told, name) for name in _ORDER if name != "MASTER_ADDR"}
    _, world, local, local_world = (numbers[name] or 0 for name in _ORDER[:4])
    if not local < local_world <= world:
        raise UsageError(
            f"LOCAL_RANK={local}, LOCAL_WORLD_SIZE={local_world}, WORLD_SIZE={world}: these do not fit together; {OTHERWISE}"
        )
    if (numbers["MASTER_PORT"] or 0) > 65535:
        raise UsageError(f"MASTER_PORT={told['MASTER_PORT']}: should be at most 65535")
    return told


def _whole(told: Mapping[str, str], name: str) -> int | None:
    text = told.get(name, "")
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,12}", text):
        raise UsageError(f"{name}: should be a whole number as torchrun sets it, not {text[:60]!r}")
    return int(text)


def _of_mpi(found: Mapping[str, str]) -> dict[str, str]:
    for names in _MPI:
        rank, size, local, local_size = (found.get(name, "") for name in names)
        if rank and size and size != "1" and (local or names[0] != "PMI_RANK" or names[2] != "MPI_LOCALRANKID"):
            told = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": local_size}
            step = _of_step(found)
            if step.get("RANK") == rank and step.get("WORLD_SIZE") == size:  # srun, which speaks PMI too
                told = step | {name: value for name, value in told.items() if value}
            return {name: value for name, value in told.items() if value}
    return {}


def _of_step(found: Mapping[str, str]) -> dict[str, str]:
    """A task of several in a step of Slurm; the batch script of a job has such variables too, and is one process."""
    size = found.get("SLURM_STEP_NUM_TASKS") or found.get("SLURM_NTASKS") or found.get("SLURM_NPROCS") or ""
    rank = found.get("SLURM_PROCID", "")
    is_step = any(found.get(name) for name in _STEP) or found.get("ENVIRONMENT") != "BATCH"
    step = found.get("SLURM_STEP_ID", "")
    if step.startswith("-") or (_whole(found, "SLURM_STEP_ID") or 0) >= FIRST_SPECIAL_STEP:  # Slurm 26.05 prints them signed
        return {}
    if not rank or size in ("", "0", "1") or not is_step:
        return {}
    told = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": found.get("SLURM_LOCALID", "")}
    nodes = found.get("SLURM_STEP_NUM_NODES") or found.get("SLURM_NNODES") or found.get("SLURM_JOB_NUM_NODES") or ""
    if nodes == "1":
        told |= {"LOCAL_WORLD_SIZE": size, "LOCAL_RANK": told["LOCAL_RANK"] or rank}
    else:
        told |= {"LOCAL_WORLD_SIZE": _tasks_here(found), "MASTER_ADDR": first_host(_hosts(found))}
    return {name: value for name, value in told.items() if value}


def _tasks_here(found: Mapping[str, str]) -> str:
    """Tasks of this node, of ``2(x3),1``."""
    counts: list[str] = []
    for part in (found.get("SLURM_STEP_TASKS_PER_NODE") or found.get("SLURM_TASKS_PER_NODE") or "").split(","):
        if form := re.fullmatch(r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?", part):
            counts += [form[1]] * int(form[2] or 1)
    node = _whole(found, "SLURM_NODEID") or 0
    return counts[node] if node < len(counts) else ""


def _hosts(found: Mapping[str, str]) -> str:
    return found.get("SLURM_STEP_NODELIST") or found.get("SLURM_NODELIST") or found.get("SLURM_JOB_NODELIST") or ""


def first_host(hosts: str) -> str:
    """The first of ``n[01-03,7],m1``, where rank 0 runs; "" if there is none."""
    form = re.match(r"([\w.-]+)(?:\[([0-9]+)[0-9,-]*\]([\w.-]*))?", hosts)
    return "" if form is None else f"{form[1]}{form[2] or ''}{form[3] or ''}"


def _fill(told: dict[str, str], found: Mapping[str, str], parent: int) -> None:
    """What follows from the rest."""
    size = told.get("WORLD_SIZE")
    if told.get("MASTER_ADDR") in LOOPBACK:  # all on this machine
        told.setdefault("LOCAL_WORLD_SIZE", size or "")
    if size and told.get("LOCAL_WORLD_SIZE") == size:
        told.setdefault("MASTER_ADDR", "127.0.0.1")
        if "RANK" in told:
            told.setdefault("LOCAL_RANK", told["RANK"])
    if "LOCAL_WORLD_SIZE" in told and not told["LOCAL_WORLD_SIZE"]:
        del told["LOCAL_WORLD_SIZE"]
    step = ".".join(found.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    if "MASTER_PORT" not in told and "LOCAL_RANK" in told:
        restart = _whole(found, "SLURM_RESTART_COUNT") or 0
        if step != ".":
            told["MASTER_PORT"] = str(port_for(step, restart))
        elif told.get("LOCAL_WORLD_SIZE") == size:  # one launcher has started them all
            told["MASTER_PORT"] = str(port_for(f"started by {parent}", restart))


def settle() -> None:
    """Set this process's variables as torchrun does, if it is one of several.

    Raises:
        UsageError: as :func:`described`.
    """
    os.environ.update(described(os.environ, os.getppid()))
