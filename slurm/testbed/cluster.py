"""A real three-node Slurm cluster on one machine, from Debian's packages, for tests and rehearsals.

    python slurm/testbed/cluster.py up [--dir DIR] [--accounting] [--grace-time 6] [--preempt-send-user-signal]
    eval "$(python slurm/testbed/cluster.py env)"; sinfo
    python slurm/testbed/cluster.py down

Needs root (nodes are mount and UTS namespaces) and slurm-wlm and munge; with --accounting also slurmdbd and mariadb-server.
Everything lies below DIR; /etc is left alone. Jobs in partition `high` preempt those in `low`, `low0` (no grace time) and
`low6` (6 seconds of it), which are requeued.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import json
import os
import secrets
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import accounting
import configuration
from configuration import NODES, Options
from processes import ClusterError, Daemons, kill_members, until

LAST_JOB_ID = 99_999  # configuration.first_job_id() and what follows
SOCKET_PATH = 107  # characters that the kernel takes
PACKAGES = {"munged": "munge", "slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "sbatch": "slurm-wlm", "unshare": "util-linux"}
NODE_SCRIPT = 'hostname "$1" && mount --bind "$2" /etc/hosts && exec slurmd -D -N "$1" -f "$3"'


def default_folder() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime and Path(runtime).is_dir():
        return Path(runtime) / "hpc-cifar-slurm"
    return Path(f"/tmp/hpc-cifar-slurm-{os.getuid()}")


def check_machine(options: Options) -> None:
    """Say what is missing before anything is started."""
    if os.geteuid() != 0:
        raise ClusterError("the test cluster needs root: its nodes are mount and UTS namespaces (try sudo)")
    programs = PACKAGES | (accounting.PACKAGES if options.accounting else {})
    missing = sorted({package for program, package in programs.items() if shutil.which(program) is None})
    if missing:
        raise ClusterError(f"missing {', '.join(missing)}: apt-get install --no-install-recommends {' '.join(missing)}")


def check_folder(folder: Path) -> None:
    """Make ``folder`` ours and private."""
    longest = f"{folder}/spool/{NODES[0]}/{NODES[0]}_{LAST_JOB_ID}.4294967291"  # of a batch step; its job would be held
    if len(longest) > SOCKET_PATH:
        most = len(str(folder)) - (len(longest) - SOCKET_PATH)
        raise ClusterError(f"{folder}: too long a path for Slurm's sockets; name one of at most {most} characters with --dir")
    if any(character in str(folder) for character in " ,#[]%"):
        raise ClusterError(f"{folder}: Slurm's configuration cannot hold this path; name another with --dir")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = folder.lstat()
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid():
        raise ClusterError(f"{folder}: exists and is not a folder of yours; name another with --dir")
    folder.chmod(0o711)  # jobs of other users reach the munge socket, nobody lists the folder
    for name in ("log", "run", "state", "spool", "dev"):
        (folder / name).mkdir(exist_ok=True)


class Cluster:
    """One cluster folder, whether its daemons run or not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record = folder / "cluster.json"
        self.conf = folder / "slurm.conf"
        self.daemons = Daemons(folder)

    def recorded(self) -> dict[str, object]:
        try:
            value = json.loads(self.record.read_text())
        except (OSError, ValueError):
            return {}
        return value if isinstance(value, dict) else {}

    def hosts_file(self, node: str) -> Path:
        """Its name is unique to this cluster, so that the node's processes are known by it."""
        return self.folder / f"hosts-{node}-{self.recorded().get('token', 'none')}"

    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.conf)}

    def call(self, *command: str, timeout_s: float = 10) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **self.environment()}
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment, check=False)
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(command, 124, "", f"no answer from {command[0]} in {timeout_s:g} s")

    def names(self, options: Options) -> list[str]:
        before = ["mariadbd", "slurmdbd"] if options.accounting else []
        return ["munged", *before, "slurmctld", *NODES]

    def node_states(self) -> dict[str, str]:
        rows = self.call("sinfo", "--noheader", "--Node", "--partition=low", "--format=%N %T").stdout.split("\n")
        return dict(row.split(maxsplit=1) for row in rows if len(row.split(maxsplit=1)) == 2)

    def ready(self) -> bool:
        states = self.node_states()
        return set(states) == set(NODES) and all(
            state.rstrip("*") in {"idle", "mixed", "allocated"} for state in states.values()
        )

    def up(self, options: Options) -> None:
        check_machine(options)
        check_folder(self.folder)
        same = self.recorded().get("options") == dataclasses.asdict(options)
        if same and all(self.daemons.running(name) for name in self.names(options)) and self.ready():
            return
        self.down()
        check_folder(self.folder)
        try:
            self._start(options)
        except BaseException:
            self.down(keep_logs=True)
            raise

    def _start(self, options: Options) -> None:
        ports = configuration.free_ports()
        self.record.write_text(json.dumps({"token": secrets.token_hex(6), "options": dataclasses.asdict(options)}))
        for node in NODES:
            (self.folder / "spool" / node).mkdir()
            self.hosts_file(node).write_text(configuration.hosts())
        for number in range(options.gpus):
            device = self.folder / "dev" / f"gpu{number}"
            try:
                os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 20))
            except PermissionError:
                raise ClusterError(f"{device}: this root may not make device nodes; use --gpus 0") from None
        self.conf.write_text(configuration.slurm_conf(self.folder, options, ports))
        (self.folder / "gres.conf").write_text(configuration.gres_conf(self.folder, options))
        self._start_munge()
        if options.accounting:
            accounting.start(self, ports)
        self.daemons.start("slurmctld", ["slurmctld", "-D", "-f", str(self.conf)], environment=self.environment())
        for node in NODES:
            self.boot(node)
        if not until(lambda: self.ready() or not self._all_alive(options), 30) or not self.ready():
            dead = [name for name in self.names(options) if not self.daemons.running(name)] or ["slurmctld"]
            raise ClusterError(f"the cluster did not start; {dead[0]}: {self.daemons.last_words(dead[0])}")

    def _all_alive(self, options: Options) -> bool:
        return all(self.daemons.running(name) for name in self.names(options))

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        socket = self.folder / "munge.socket"
        files = {
            "key-file": key,
            "socket": socket,
            "pid-file": self.folder / "run/munged.pid",
            "seed-file": self.folder / "munge.seed",
        }
        options = [f"--{name}={path}" for name, path in files.items()]
        self.daemons.start("munged", ["munged", "--foreground", "--force", "--num-threads=4", *options])
        if not until(lambda: self.call("munge", f"--socket={socket}", "--no-input").returncode == 0, 10):
            raise ClusterError(f"munged did not start: {self.daemons.last_words('munged')}")

    def down(self, *, keep_logs: bool = False) -> None:
        """Stop what `up` started, also after a crash; remove the folder's content."""
        if not self.folder.is_dir():
            return
        if self.daemons.running("slurmctld"):
            self.call("scancel", "--state=PENDING", "--user=root", timeout_s=3)
        self.daemons.stop(["slurmctld"])
        for node in NODES:
            kill_members(self.hosts_file(node))
        self.daemons.stop([*NODES, "slurmdbd"])
        self.daemons.stop(["mariadbd", "munged"])
        self.daemons.known.clear()
        kept = {"log"} if keep_logs else set()
        for path in self.folder.iterdir():
            if path.name in kept:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def crash(self, node: str) -> int:
        """Lose a node: every process of it dies at once."""
        return kill_members(self.hosts_file(node))

    def boot(self, node: str) -> None:
        """Start a node, also after a crash."""
        arguments = [node, str(self.hosts_file(node)), str(self.conf)]
        command = ["unshare", "--mount", "--uts", "sh", "-c", NODE_SCRIPT, "node", *arguments]
        self.daemons.start(node, command, environment=self.environment())


def shell_lines(cluster: Cluster) -> str:
    """What to evaluate in a shell to use the cluster."""
    binaries = Path(shutil.which("sbatch") or "/usr/bin/sbatch").parent
    return f'export SLURM_CONF={shlex.quote(str(cluster.conf))}\nexport PATH="{binaries}:$PATH"'


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description="A three-node Slurm cluster on this machine, for tests.")
    verbs = top.add_subparsers(dest="verb", required=True)

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text)
        added.add_argument("--dir", type=Path, default=default_folder(), help="where everything lies (%(default)s)")
        return added

    up = verb("up", "start it; does nothing if it runs already with the same options")
    up.add_argument("--cpus", type=int, default=Options.cpus, help="CPUs of each node (%(default)s)")
    up.add_argument("--gpus", type=int, default=Options.gpus, help="fake GPUs of each node (%(default)s)")
    up.add_argument("--grace-time", type=int, default=0, metavar="S", help="seconds a preempted job has to end (%(default)s)")
    up.add_argument("--preempt-send-user-signal", action="store_true", help="preemption sends the signal of --signal too")
    up.add_argument("--accounting", action="store_true", help="with slurmdbd and mariadb, so that sacct works")
    verb("down", "stop it and remove its files")
    verb("status", "one line for each node; exit code 1 if it does not run")
    verb("env", "shell lines that make sbatch and the others use it")
    verb("crash", "kill everything on a node").add_argument("node", choices=NODES)
    verb("boot", "start a crashed node").add_argument("node", choices=NODES)
    return top


def act(arguments: argparse.Namespace, cluster: Cluster) -> int:
    match arguments.verb:
        case "up":
            signal_too = arguments.preempt_send_user_signal
            cluster.up(
                Options(
                    cpus=arguments.cpus,
                    gpus=arguments.gpus,
                    grace_time_s=arguments.grace_time,
                    preempt_send_user_signal=signal_too,
                    accounting=arguments.accounting,
                )
            )
            print(f"# running in {cluster.folder}; to use it:\n{shell_lines(cluster)}")
        case "down":
            cluster.down()
        case "status":
            states = cluster.node_states() if cluster.conf.exists() else {}
            if not states:
                print(f"no cluster runs in {cluster.folder}")
                return 1
            print("\n".join(f"{node} {state}" for node, state in sorted(states.items())))
        case "crash":
            print(f"{cluster.crash(arguments.node)} processes of {arguments.node} killed")
        case "boot":
            cluster.boot(arguments.node)
        case "env":
            if not cluster.conf.exists():
                raise ClusterError(f"no cluster runs in {cluster.folder}; start one with `up`")
            print(shell_lines(cluster))
    return 0


def main() -> int:
    arguments = parser().parse_args()
    os.environ["PATH"] = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    folder = arguments.dir.absolute()
    try:
        if arguments.verb in {"up", "down"} and folder.parent.is_dir():
            with folder.with_name(f".{folder.name}.lock").open("w") as lock:  # two at once: one waits
                fcntl.flock(lock, fcntl.LOCK_EX)
                return act(arguments, Cluster(folder))
        return act(arguments, Cluster(folder))
    except ClusterError as error:
        print(f"cluster: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
