"""Which options of sbatch a profile may add, and which would contradict what a job has already."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .fields import shown

RESERVED = frozenset(
    {"array", "chdir", "cpus-per-gpu", "cpus-per-task", "error", "gpus", "gpus-per-node", "gpus-per-task", "gres", "job-name"}
    | {"mem", "no-requeue", "nodes", "ntasks", "ntasks-per-node", "open-mode", "output", "requeue", "signal", "time", "wrap"}
    | {"dependency", "kill-on-invalid-dep", "gpus-per-socket", "ntasks-per-core", "ntasks-per-gpu", "ntasks-per-socket"}
    | {"time-min"}
    | {"clusters", "parsable", "quiet", "test-only", "wait"}  # these change what sbatch does and prints
)
"""Options that follow from the experiment and the profile; ``sbatch_extra`` must not contradict them."""

RIVALS: Mapping[str, tuple[str, ...]] = {
    **{name: (name,) for name in ("partition", "account", "qos", "constraint", "exclude")},
    "nodelist": ("nodelist", "nodefile"),
    "exclusive": ("exclusive", "oversubscribe", "share"),
    "memory_gib_per_node": ("mem-per-cpu", "mem-per-gpu"),
    "container": ("container", "container-image", "container-name", "container-id"),
}
"""Options that say what a field of the profile says, too; sbatch would be given both."""

TRES = ("tres-per-job", "tres-per-node", "tres-per-socket", "tres-per-task")


def abbreviated(name: str, options: Iterable[str]) -> str | None:
    """The one of these options that sbatch takes ``name`` for: it accepts the beginnings of names."""
    name = name.replace("_", "-")
    found = sorted(option for option in options if option.startswith(name))
    return name if name in found else found[0] if found else None


def refusal(name: str, value: Any) -> str | None:
    """Why ``sbatch_extra`` must not have this option; None if it may."""
    option = abbreviated(name, RESERVED)
    if option is None and abbreviated(name, TRES) and any(word in str(value) for word in ("gpu", "cpu", "mem")):
        option = abbreviated(name, TRES)
    if option is None:
        return None
    which = "" if option == name.replace("_", "-") else f", which sbatch may take for {option}"
    return f"should not set {shown_name(name)}{which}: it follows from the job and the other fields of the profile"


def rivalry(extra: Mapping[str, Any], given: Iterable[str]) -> str | None:
    """Which entry of ``sbatch_extra`` contradicts a field that is ``given``; None if none does."""
    for field in given:
        for name in extra:
            if (option := abbreviated(name, RIVALS.get(field, ()))) is not None:
                which = "" if option == name.replace("_", "-") else f", which sbatch may take for {option},"
                return f"{shown_name(name)}{which} contradicts {field}: keep one of them"
    return None


def shown_name(name: str) -> str:
    return name if name.isprintable() else shown(name)
