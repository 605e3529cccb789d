"""Asks Slurm what a cluster is like: partitions, GPUs, limits, accounts, preemption. Whatever cannot be asked is left out."""

from __future__ import annotations

import dataclasses
import getpass
import re
import shutil
from dataclasses import dataclass

from .. import files
from ..errors import LaunchError, NoCluster
from . import slurm
from .script import slurm_words


@dataclass(frozen=True)
class Nodes:
    """Nodes of one kind in a partition; ``gpus`` is a number by type, ``""`` for GPUs without one."""

    count: int
    cpus: int
    memory_mib: int
    gpus: dict[str, int]
    features: str

    @property
    def gpu_count(self) -> int:
        return sum(self.gpus.values())


@dataclass(frozen=True)
class Partition:
    """One partition, with its lines of ``sinfo`` and ``scontrol show partition``."""

    name: str
    default: bool
    up: bool
    settings: dict[str, str]  # scontrol's own names
    nodes: tuple[Nodes, ...]

    @property
    def biggest(self) -> Nodes | None:
        """The kind of node with the most GPUs, then the most CPUs; the smaller of its kinds would refuse its requests."""
        return max(self.nodes, key=lambda kind: (kind.gpu_count, kind.cpus), default=None)

    def allows(self, name: str, what: str) -> bool:
        """Whether the account or QOS ``what`` may be used; ``name`` is Accounts or Qos."""
        allowed, denied = self.settings.get(f"Allow{name}", "ALL"), self.settings.get(f"Deny{name}", "")
        return (allowed in ("ALL", "(null)") or what in allowed.split(",")) and what not in denied.split(",")


@dataclass(frozen=True)
class Association:
    """An account the user may charge, perhaps in one partition only, with its QOS."""

    account: str
    partition: str
    qos: tuple[str, ...]
    default_qos: str


@dataclass(frozen=True)
class Site:
    """What Slurm told. ``config`` is ``scontrol show config``; ``accounting`` is why there are no accounts, or ``""``."""

    config: dict[str, str]
    partitions: tuple[Partition, ...]
    user: str
    default_account: str = ""
    associations: tuple[Association, ...] = ()
    accounting: str = ""

    @property
    def name(self) -> str:
        return self.config.get("ClusterName", "")


def site() -> Site:
    """Ask sinfo, scontrol and sacctmgr.

    Raises:
        LaunchError: there is no Slurm on this machine, or it does not answer.
    """
    if shutil.which("sinfo") is None:
        raise LaunchError("no Slurm on this machine (sinfo is missing): run this on the cluster's login node")
    told = _must(["sinfo", "--all", "--exact", "--noheader", "--format=%R|%D|%c|%m|%G|%f"])
    kinds: dict[str, list[Nodes]] = {}
    for line in told.splitlines():
        name, count, cpus, memory, gres, features, *_ = [*line.split("|"), "", "", "", "", "", ""]
        if name:
            kind = Nodes(_number(count), _number(cpus), _number(memory), gpus_of(gres), _known(features))
            kinds.setdefault(name.strip(), []).append(kind)
    partitions = []
    for line in _must(["scontrol", "--all", "--oneliner", "show", "partition"]).splitlines():
        settings = dict(re.findall(r"(\w+)=(\S*)", line))
        name = settings.get("PartitionName", "")
        if name:
            usable = settings.get("State") == "UP" and settings.get("RootOnly", "NO") == "NO"
            partitions.append(Partition(name, settings.get("Default") == "YES", usable, settings, tuple(kinds.get(name, ()))))
    if not partitions:
        raise LaunchError("Slurm answers, but shows no partition that you may use: ask the site which one is yours")
    partitions.sort(key=lambda one: (not one.default, not one.up))
    config = dict(re.findall(r"^(\S+)\s*= (.*?)\s*$", _must(["scontrol", "show", "config"]), re.MULTILINE))
    return _with_accounts(Site(config, tuple(partitions), getpass.getuser()))


def _with_accounts(found: Site) -> Site:
    """Accounts and QOS, where the site keeps accounts and sacctmgr is there."""
    kept = found.config.get("AccountingStorageType", "")
    if kept in ("accounting_storage/none", "(null)", ""):
        return dataclasses.replace(found, accounting="this cluster keeps no accounts (AccountingStorageType=none)")
    query = ["sacctmgr", "--noheader", "--parsable2", "show", "user", found.user, "withassoc"]
    told = slurm.ask([*query, "format=DefaultAccount,Account,Partition,QOS,DefaultQOS"])
    if told.code != 0:
        return dataclasses.replace(found, accounting=f"sacctmgr did not say: {slurm_words(told.err)}")
    default, associations = "", []
    for line in told.out.splitlines():
        first, account, partition, qos, default_qos, *_ = [*line.split("|"), "", "", "", "", ""]
        if account:
            default = first
            associations.append(Association(account, partition, tuple(name for name in qos.split(",") if name), default_qos))
    missing = "" if associations else f"sacctmgr knows no account of {found.user}"
    return dataclasses.replace(found, default_account=default, associations=tuple(associations), accounting=missing)


def _must(command: list[str]) -> str:
    reply = slurm.ask(command)
    if reply.code == 0:
        return reply.out
    words = reply.err if reply.code is None else slurm_words(reply.err or reply.out)
    if reply.unanswered:
        raise NoCluster(f"no Slurm cluster answers here: run this on its login node ({words})")
    raise LaunchError(f"{command[0]} failed: {words}")


def _number(text: str) -> int:
    digits = re.match(r"[0-9]{1,15}", text.strip())
    return int(digits[0]) if digits else 0


def _known(text: str) -> str:
    return "" if text.strip() in ("(null)", "N/A", "") else text.strip()


def gpus_of(gres: str) -> dict[str, int]:
    """``gpu:a100:4(S:0-1),shard:8`` -> ``{"a100": 4}``; ``gpu:4`` -> ``{"": 4}``; ``gpu`` alone is one."""
    found: dict[str, int] = {}
    for entry in re.sub(r"\([^)]*\)", "", gres).split(","):
        name, *rest = entry.strip().split(":")
        if name == "gpu":
            counted = rest and re.match("[0-9]", rest[-1]) and (len(rest) == 2 or files.whole(rest[-1]) is not None)
            count = _number(rest[-1]) if counted else 1
            kind = rest[0] if rest and not (len(rest) == 1 and files.whole(rest[0]) is not None) else ""
            found[kind] = found.get(kind, 0) + count
    return found
