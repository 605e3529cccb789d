"""From what Slurm told to the text of a cluster profile, in which every value says where it comes from."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml
from pydantic import ValidationError

from ..config.cluster import Cluster
from ..config.experiment import NAME_PATTERN
from ..config.fields import shown
from ..config.messages import did_you_mean
from ..errors import LaunchError, UsageError
from .discover import Partition, Site

DURATION = re.compile(r"(?:\d{1,3}-)?\d{1,3}:\d\d:\d\d")
PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_. -]*")  # what YAML reads as it is written, but for words such as yes
WIDTH = 44  # where comments begin


def default_name(found: Site) -> str:
    """The cluster's own name, as far as it can name a file."""
    return found.name if NAME_PATTERN.fullmatch(found.name) else "cluster"


def chosen(found: Site, wanted: str | None) -> Partition:
    """The partition the profile is for: the wanted one, else the default one, else the first that is up.

    Raises:
        UsageError: there is no such partition.
    """
    if wanted is None:
        return found.partitions[0]
    for one in found.partitions:
        if one.name == wanted:
            return one
    hint = did_you_mean(wanted, [one.name for one in found.partitions], "partitions")
    raise UsageError(f"--partition: no partition named {shown(wanted)}; {hint}")


def text_of(found: Site, name: str, partition: Partition) -> str:
    """The profile as YAML.

    Raises:
        LaunchError: what Slurm told makes no valid profile; the message names the field.
    """
    lines = [*_head(found, name), *_where(found, partition), *_gpus(found, partition), *_ends(found, partition)]
    text = "\n".join(lines) + "\n"
    try:
        Cluster.model_validate(yaml.safe_load(text))
    except ValidationError as error:
        from ..config.explain import first_problem

        field, message = first_problem(error)
        raise LaunchError(f"what Slurm says about this cluster makes no profile: {field}: {message}") from None
    return text


def _line(key: str, value: Any, comment: str = "", *, active: bool = True) -> str:
    """``key: value    # comment``; as a comment itself where the site should decide."""
    as_it_is = isinstance(value, str) and PLAIN.fullmatch(value) and yaml.safe_load(value) == value
    written = f"{'' if active else '# '}{key}: {value if as_it_is else json.dumps(value)}"
    return _plain(f"{written:<{WIDTH - 1}} # {comment}" if comment else written)


def _plain(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text)


def _note(text: str) -> str:
    return _plain(f"# {text}")


def _head(found: Site, name: str) -> list[str]:
    version = found.config.get("SLURM_VERSION", "of unknown version")
    return [
        _note(f"Written by `hpc-cifar init` from what Slurm {version} told {found.user}. Look through it, then:"),
        _note(f"  hpc-cifar submit jobs/deep300.yaml --cluster {name} --dry-run"),
        "#",
        _note("Partitions here (`hpc-cifar init --partition NAME` writes the profile of another):"),
        *(_note(f"  {_summary(one)}") for one in found.partitions),
        "",
        _line("name", name),
        _line("description", f"{found.name or name} as Slurm describes it"),
        _line("executor", "slurm"),
        "",
    ]


def _summary(one: Partition) -> str:
    kinds = [
        f"{kind.count} x {kind.cpus} CPUs, {kind.memory_mib / 1024:.0f} GiB"
        + "".join(f", {count} {f'{gpu} ' if gpu else ''}GPU{'s' if count > 1 else ''}" for gpu, count in kind.gpus.items())
        + (f" [{kind.features}]" if kind.features else "")
        for kind in one.nodes
    ]
    state = ("default, " if one.default else "") + ("" if one.up else "not in use, ")
    limit = one.settings.get("MaxTime", "UNLIMITED")
    return f"{one.name}: {state}time limit {limit}, nodes: {'; '.join(kinds) or 'none'}"


def _where(found: Site, partition: Partition) -> list[str]:
    source = "sinfo: the default partition" if partition.default else "chosen; `sinfo -s` lists partitions"
    lines = [_line("partition", partition.name, source)]
    accounts = list(dict.fromkeys(one.account for one in found.associations if one.partition in ("", partition.name)))
    usable = [name for name in accounts if partition.allows("Accounts", name)]
    if usable:
        account = found.default_account if found.default_account in usable else usable[0]
        enforced = "associations" in found.config.get("AccountingStorageEnforce", "")
        rest = f"; also {', '.join(name for name in usable if name != account)}" if len(usable) > 1 else ""
        what = "your default" if account == found.default_account else "an account of yours"
        lines.append(_line("account", account, f"sacctmgr: {what}{rest}", active=enforced))
        of_account = [one for one in found.associations if one.account == account]
        names = [qos for one in of_account for qos in one.qos if partition.allows("Qos", qos)]
        default = next((one.default_qos for one in of_account if one.default_qos), "")
        if names:
            listed = ", ".join(dict.fromkeys(names))
            known = f"sacctmgr: yours are {listed}" + (f"; {default} without this line" if default else "")
            lines.append(_line("qos", default or names[0], known, active=False))
    else:
        why = found.accounting or f"none of your accounts may use {partition.name}"
        lines.append(_line("account", "my-project", why, active=False))
    return [*lines, ""]


def _gpus(found: Site, partition: Partition) -> list[str]:
    node = partition.biggest
    if node is None:
        return [_note("sinfo shows no nodes in this partition"), ""]
    lines = []
    if node.gpu_count:
        modern = "cons_tres" in found.config.get("SelectType", "")
        style = f"scontrol: SelectType={found.config.get('SelectType', 'unknown')}"
        comment = f"{style} knows --gpus-per-node" if modern else f"{style} knows only --gres"
        lines.append(_line("gpu_request", "gpus_per_node" if modern else "gres", comment))
        kinds = sorted({gpu for kind in partition.nodes for gpu in kind.gpus if gpu})
        if kinds:
            mine = next((gpu for gpu in node.gpus if gpu), kinds[0])
            known = f"sinfo: {', '.join(kinds)}; any type without this line"
            lines.append(_line("gpu_type", mine, known, active=len(kinds) > 1))
        counts = sorted({kind.gpu_count for kind in partition.nodes})
        available = f"sinfo: nodes have {', '.join(map(str, counts))}"
        lines.append(_line("gpus_per_node_available", node.gpu_count, available))
        share = max(1, node.cpus // node.gpu_count)
        lines.append(_line("cpus_per_process", share, f"sinfo: {node.cpus} CPUs a node / {node.gpu_count} GPUs"))
    else:
        lines.append(_line("gpu_request", "none", "sinfo: no GPUs in this partition"))
        lines.append(_line("gpus_per_node_available", 0, "jobs that ask for GPUs run on CPU processes here"))
        half = f"sinfo: {node.cpus} CPUs a node, for two processes"
        lines.append(_line("cpus_per_process", max(1, node.cpus // 2), half, active=False))
    counted = "MEMORY" in found.config.get("SelectTypeParameters", "").upper()
    needed = "without this line a job gets the site's default" if counted else "jobs need not ask for memory here"
    memory = f"sinfo: nodes have {node.memory_mib / 1024:.1f} GiB; {needed}"
    # a little less than a node has, since sites keep some for the system
    lines.append(_line("memory_gib_per_node", max(1, int(node.memory_mib / 1024 * 0.9)), memory, active=False))
    return [*lines, ""]


def _ends(found: Site, partition: Partition) -> list[str]:
    longest = partition.settings.get("MaxTime", "UNLIMITED")
    if DURATION.fullmatch(longest):
        lines = [_line("max_time", longest, "scontrol: MaxTime; a run that needs more goes on in a requeued job")]
    else:
        lines = [_line("max_time", "24:00:00", f"scontrol: MaxTime={longest}", active=False)]
    lines.append(_line("signal_delay_s", 120, "seconds before the time limit in which a job saves its checkpoint"))
    requeue = found.config.get("JobRequeue", "1") == "1"
    mode = partition.settings.get("PreemptMode", found.config.get("PreemptMode", "OFF")).split(",")[0]
    preempts = found.config.get("PreemptType", "preempt/none") not in ("preempt/none", "(null)") and mode not in ("OFF", "")
    default = f"scontrol: JobRequeue={found.config.get('JobRequeue', 'unknown')}"
    lines.append(_line("requeue", True, default if requeue else f"{default}: off by default, jobs ask for it themselves"))
    how = f"scontrol: PreemptType={found.config.get('PreemptType', 'unknown')}, PreemptMode={mode}"
    lines.append(_line("preemptible", preempts, how))
    if preempts:
        grace = partition.settings.get("GraceTime", "0")
        # under either name, by version: SlurmctldParameters has preempt_send_user_signal, PreemptParameters send_user_signal
        settings = ",".join(found.config.get(name, "") for name in ("SlurmctldParameters", "PreemptParameters"))
        signals = "SIGUSR2 and SIGTERM" if "send_user_signal" in settings else "SIGTERM"
        lines.append(_note(f"A preempted job is told by {signals} and has GraceTime={grace} s to end."))
        if grace == "0":
            lines.append(_note("That is no time to save a checkpoint: in job files, set checkpoint.every_steps."))
        if mode not in ("REQUEUE", "SUSPEND", "GANG"):
            lines.append(_note(f"PreemptMode={mode} ends a preempted job for good: continue its run with `hpc-cifar resume`."))
    return lines
