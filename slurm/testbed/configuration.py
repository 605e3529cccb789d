"""The configuration files of the test cluster, as text."""

from __future__ import annotations

import secrets
import socket
from dataclasses import dataclass
from pathlib import Path

NODES = ("n1", "n2", "n3")
FIRST_PORT, PORTS = 30_000, 2_768


@dataclass(frozen=True)
class Options:
    """What a user may choose; kept with the cluster, so that `up` with other options starts it anew."""

    cpus: int = 8
    gpus: int = 4  # fake ones, per node
    grace_time_s: int = 0
    preempt_send_user_signal: bool = False
    credential_expire_s: int = 5
    accounting: bool = False


@dataclass(frozen=True)
class Ports:
    controller: int
    nodes: tuple[int, ...]
    database_daemon: int
    database: int


def address(node: str) -> str:
    """n1 is 127.0.0.11, and so on: every node has its own loopback address."""
    return f"127.0.0.{10 + int(node[1:])}"


def host() -> str:
    return socket.gethostname().split(".")[0]


def free_ports() -> Ports:
    """Ports nobody listens on now, next to each other.

    They lie above those where ranks meet and below those that the kernel gives to connections: it could give one of these away
    before the daemon asks for it. A random place, since another cluster may be looking at the same time.
    """
    number = len(NODES) + 3
    for _ in range(100):
        start = FIRST_PORT + number * secrets.randbelow(PORTS // number)
        if all(_is_free(port) for port in range(start, start + number)):
            break
    first, second, third, *nodes = range(start, start + number)
    return Ports(controller=first, database_daemon=second, database=third, nodes=tuple(nodes))


def _is_free(port: int) -> bool:
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the daemons do: of one that has just ended is free
        try:
            tried.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True


def hosts() -> str:
    """/etc/hosts as the nodes see it."""
    lines = ["127.0.0.1 localhost", f"127.0.0.1 {host()}", *(f"{address(node)} {node}" for node in NODES)]
    return "\n".join(lines) + "\n"


def first_job_id() -> int:
    """Jobs derive ports from their ids, and other clusters of this kind may run on the machine."""
    return 1 + 1000 * secrets.randbelow(60)


def slurm_conf(folder: Path, options: Options, ports: Ports) -> str:
    """slurm.conf of three nodes on one machine, quick to schedule, with preemption between partitions."""
    controller = ["preempt_send_user_signal"] if options.preempt_send_user_signal else []
    if options.accounting:
        accounting = f"""\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={ports.database_daemon}
AccountingStoragePass={folder}/munge.socket
AccountingStorageEnforce=associations
AccountingStorageTRES=gres/gpu"""
    else:
        accounting = "AccountingStorageType=accounting_storage/none"
    nodes = "\n".join(
        f"NodeName={node} NodeHostname={node} NodeAddr={address(node)} Port={port} CPUs={options.cpus} RealMemory=8000"
        + (f" Gres=gpu:{options.gpus}" if options.gpus else "")
        for node, port in zip(NODES, ports.nodes, strict=True)
    )
    return f"""\
ClusterName=testbed
SlurmctldHost={host()}(127.0.0.1)
SlurmctldPort={ports.controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={options.credential_expire_s}
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
SlurmdTimeout=10
SlurmctldTimeout=10
KillWait=5
MinJobAge=7200
FirstJobId={first_job_id()}
JobRequeue=1
MailProg=/bin/true
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{"SlurmctldParameters=" + ",".join(controller) if controller else "# SlurmctldParameters="}
{accounting}
{nodes}
PartitionName=low Nodes=n[1-{len(NODES)}] Default=YES PriorityTier=1 PreemptMode=REQUEUE \
GraceTime={options.grace_time_s} State=UP
PartitionName=low0 Nodes=n[1-{len(NODES)}] PriorityTier=1 PreemptMode=REQUEUE GraceTime=0 State=UP
PartitionName=low6 Nodes=n[1-{len(NODES)}] PriorityTier=1 PreemptMode=REQUEUE GraceTime=6 State=UP
PartitionName=mid Nodes=n[1-{len(NODES)}] PriorityTier=5 PreemptMode=REQUEUE GraceTime=6 State=UP
PartitionName=high Nodes=n[1-{len(NODES)}] PriorityTier=10 PreemptMode=OFF State=UP
"""


def gres_conf(folder: Path, options: Options) -> str:
    if not options.gpus:
        return ""
    return f"NodeName=n[1-{len(NODES)}] Name=gpu File={folder}/dev/gpu[0-{options.gpus - 1}]\n"


def slurmdbd_conf(folder: Path, ports: Ports, password: str) -> str:
    return f"""\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost={host()}
DbdAddr=127.0.0.1
DbdPort={ports.database_daemon}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={ports.database}
StorageUser=slurm
StoragePass={password}
StorageLoc=slurm_acct_db
LogFile={folder}/log/slurmdbd.log
PidFile={folder}/run/slurmdbd.pid
"""
