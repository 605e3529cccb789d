"""The Slurm request: experiment + cluster + placement -> submitit's parameters -> the exact sbatch script."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import submitit

from ..config import sbatch
from ..config.cluster import Cluster
from ..config.experiment import Experiment
from ..errors import UsageError
from ..plan import Plan
from . import container, policy, submission
from .job import MAX_TIMEOUTS

PLAIN_PATH = re.compile(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff%\\'\"`$]+")
KEPT_SLURM_VARIABLES = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT")
GUARD = Path(__file__).with_name("guard.sh")  # lies beside the logs, too: the code snapshot may be of an earlier version
DEFAULTS = ("ACCOUNT", "PARTITION", "QOS", "CONSTRAINT", "RESERVATION")
"""Options for which a user may have set SBATCH_... variables as defaults; they count where the script says nothing."""
NO_CONFIGURATION = ("fetch_config", "fetch config")
NO_CLUSTER = (*NO_CONFIGURATION, "unable to contact slurm controller")
COMMUNICATION_ERRORS = range(1001, 1005)  # connect, send, receive, shut down; slurm_errno.h
MOST_EARLY = 40  # restarts after early exits; Slurm misses a node that died after five minutes, where nobody set it
KILLS = ("KILL", "SEGV", "BUS", "ABRT")
AFTER_SRUN = Path(__file__).with_name("after_srun.sh")


class SlurmExecutor(submitit.SlurmExecutor):  # type: ignore[misc, unused-ignore]
    """submitit's Slurm executor, which also writes a script where there is no Slurm; ``mark`` is that of the submission."""

    mark = ""

    restarts_allowed = policy.DEFAULT_RESTARTS

    @classmethod
    def affinity(cls) -> int:
        return 2  # whether sbatch is there is checked before a submission, with a message of our own

    @property
    def _submitit_command_str(self) -> str:
        # A signal that comes before Python listens would end the task, and Slurm would call the job failed though it was
        # preempted. Nothing is at risk yet: who sends such a signal and means it kills soon after.
        return f'sh -c \'trap "" {preemption_signal_name()} TERM; exec "$@"\' sh {super()._submitit_command_str}'

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        text: str = super()._make_submission_file_text(command, uid)
        if not self.parameters["additional_parameters"].get("requeue"):
            return text
        kills = [128 + signal.Signals[f"SIG{name}"] for name in KILLS]
        memory = min(self.restarts_allowed, policy.FEWER_RESTARTS[policy.Event.OUT_OF_MEMORY])
        lines = [
            "code=$?",
            f"early='|{'|'.join(map(str, _begins_again()))}|' kills='|{'|'.join(map(str, kills))}|'",
            f"most_early={MOST_EARLY} most_kills={self.restarts_allowed} most_memory={memory}",
        ]
        return text + "\n" + "\n".join(lines) + "\n" + AFTER_SRUN.read_text(encoding="utf-8")

    def script(self) -> str:
        """Exactly the text that ``submit`` hands to sbatch."""
        text: str = self._make_submission_file_text(self._submitit_command_str, "")
        return text


def preemption_signal_name() -> str:
    """What submitit asks Slurm to send before a preemption or the time limit."""
    name = os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2")
    return name if f"SIG{name}" in signal.Signals.__members__ else "USR2"


def _begins_again() -> list[int]:
    """What srun returns where no task has begun its work.

    It is 128 and the number of the signal that ended one, or the last 8 bits of Slurm's own error, such as
    SLURM_COMMUNICATIONS_CONNECTION_ERROR (1001), of a node that died and that nobody has missed yet.
    """
    return [*(128 + number for number in _stop_signals()), *(error & 0xFF for error in COMMUNICATION_ERRORS)]


def _stop_signals() -> tuple[signal.Signals, ...]:
    return signal.Signals["SIG" + preemption_signal_name()], signal.SIGTERM


def check_path(path: Path, what: str) -> str:
    """A path that sbatch, Slurm's file name patterns and a shell all read as it is written.

    Raises:
        UsageError: it has a control character, a quote, a backslash, a dollar or a percent sign.
    """
    text = str(path)
    if not PLAIN_PATH.fullmatch(text):
        raise UsageError(f"{what} {text!r}: Slurm cannot write to a path with quotes, backslashes, $, % or control characters")
    return text


def setup_lines(cluster: Cluster, code: Path, mark: str = "") -> list[str]:
    """What the script does before ``srun``: modules, the profile's own lines, variables, the code snapshot, the pickle.

    ``launch/guard.sh`` names what fails of it, and ends the job there unless the profile says otherwise.
    """
    signals = " ".join(str(128 + number) for number in _stop_signals())
    options = [cluster.name, str(len(cluster.setup)), signals, *(["may-fail"] if cluster.setup_may_fail else [])]
    lines = [f"hpc_cifar_code={shlex.quote(str(code))}"]  # the line after srun finds the run by it too
    lines += [f'. "$hpc_cifar_code/../submitit/{GUARD.name}" {shlex.join(options)} || exit 1']
    lines += [f"hpc_cifar_module {shlex.quote(module)}" for module in cluster.modules]
    if cluster.setup:  # one text: its lines may belong together
        lines += ["hpc_cifar_first=$LINENO", *cluster.setup]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in cluster.variables().items()]
    lines += container.export_lines(cluster.container, code, cluster.variables())
    lines += ["hpc_cifar_unguard", "set +e"]  # a profile's own `set -e` would end the script before what follows srun
    # whoever submitted gives the pickle the job's number, unless it was cut off before
    lines.append("hpc_cifar_job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}")
    lines.append("hpc_cifar_pickle=$hpc_cifar_code/../submitit/${hpc_cifar_job:-$SLURM_JOB_ID}_submitted.pkl")
    pickle = f'"$hpc_cifar_code/../submitit/{submission.pickle_name(mark)}"'
    return [*lines, f'[ -e "$hpc_cifar_pickle" ] || cp {pickle} "$hpc_cifar_pickle" 2> /dev/null']


def parameters(
    experiment: Experiment,
    cluster: Cluster,
    plan: Plan,
    run: Path,
    *,
    folders: Sequence[Path],
    after: Sequence[str] = (),
    follows: str | None = None,
    mark: str = "",
) -> dict[str, Any]:
    """submitit's parameters for one job of this run.

    Args:
        folders: what a container sees of the host.
        after: jobs that must have ended well before this one starts.
    """
    placement = plan.placement
    memory_gib = experiment.resources.memory_gib_per_node or cluster.memory_gib_per_node
    gpus: str | int = placement.gpus_per_node
    typed = f"{cluster.gpu_type}:{gpus}" if cluster.gpu_type else gpus
    # srun has not inherited --cpus-per-task since Slurm 22.05; and when a rank dies, its peers must not wait for it
    inside = container.srun_args(cluster.container, folders, cluster.variables())
    srun = ["--export=ALL", "--kill-on-bad-exit=1", "--open-mode=append", *inside, *cluster.srun_args]
    if placement.cpus_per_process:
        srun.insert(0, f"--cpus-per-task={placement.cpus_per_process}")
    if memory_gib and (why := sbatch.rivalry(cluster.sbatch_extra, ["memory_gib_per_node"])) is not None:
        raise UsageError(f"profile {cluster.name}: sbatch_extra: {why} (the job file has it)")
    extra: dict[str, Any] = {"requeue" if cluster.requeue else "no-requeue": True}
    extra |= {name.replace("_", "-"): value for name, value in cluster.sbatch_extra.items()}
    if after:
        extra["kill-on-invalid-dep"] = "yes"  # else it waits for ever once one of them has failed
    chosen = {
        "job_name": experiment.name,
        "comment": f"hpc-cifar run {run.name}, submission {mark}",
        "nodes": placement.nodes,
        "ntasks_per_node": placement.processes_per_node,
        "cpus_per_task": placement.cpus_per_process,
        "gpus_per_node": typed if gpus and cluster.gpu_request == "gpus_per_node" else None,
        "gres": f"gpu:{typed}" if gpus and cluster.gpu_request == "gres" else None,
        "mem": f"{math.ceil(memory_gib * 1024)}M" if memory_gib else None,
        "time": math.ceil(plan.time_s / 60),
        "dependency": f"afterany:{follows}" if follows else f"afterok:{':'.join(after)}" if after else None,
        "signal_delay_s": min(cluster.signal_delay_s, max(1, plan.time_s // 2)),
        "exclusive": True if cluster.exclusive else None,
        "setup": setup_lines(cluster, run / "code", mark),
        "srun_args": srun,
        "additional_parameters": extra,
        **{name: getattr(cluster, name) for name in ("partition", "account", "qos", "constraint", "exclude", "nodelist")},
    }
    # submitit names a workload key of its own, which sites that use them refuse
    return {name: value for name, value in chosen.items() if value is not None} | {"wckey": None}


def executor(
    experiment: Experiment,
    cluster: Cluster,
    plan: Plan,
    run: Path,
    *,
    data_root: Path | None = None,
    after: Sequence[str] = (),
    folders: Sequence[Path] | None = None,
    follows: str | None = None,
) -> SlurmExecutor:
    """The executor that submits this run; its :meth:`SlurmExecutor.script` is what it would submit.

    Args:
        data_root: where prepared datasets lie, for a container to see them.
        after: jobs that must have ended well before this one starts.
        folders: what a container sees of the host; None means the run and the datasets.
        follows: the job of the same run before this one, however it ends.
    """
    check_path(run, "run directory")
    if folders is None:
        folders = [run] if data_root is None else [run, data_root]
    python = str(Path(cluster.python).expanduser()) if cluster.python and cluster.python.startswith("~/") else cluster.python
    if python is None:
        python = container.PYTHON if container.active(cluster.container) else sys.executable
    command = container.python_command(cluster.container, python, folders, gpus=plan.placement.gpus_per_node > 0)
    made = SlurmExecutor(run / "submitit", max_num_timeout=MAX_TIMEOUTS, python=command)
    made.mark = submission.new_mark()
    made.restarts_allowed = experiment.resources.fault_restarts
    asked = parameters(experiment, cluster, plan, run, folders=folders, after=after, follows=follows, mark=made.mark)
    made.update_parameters(**asked)
    return made


@contextlib.contextmanager
def clean_environment(text: str) -> Iterator[None]:
    """Hide from sbatch what would overrule the script ``text``: a surrounding Slurm job's variables, and SBATCH_... ones."""
    kept = dict(os.environ)
    wanted = {f"SBATCH_{name}" for name in DEFAULTS if f"#SBATCH --{name.lower()}=" not in text}
    for name in kept:
        job = name.startswith(("SLURM_", "SRUN_", "SUBMITIT_LOCAL_")) and name not in KEPT_SLURM_VARIABLES
        if job or (name.startswith("SBATCH_") and name not in wanted):
            del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(kept)


def slurm_words(text: str) -> str:
    """What a Slurm command said, without its prefixes, on one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line] or lines[-3:]
    said = "; ".join(re.sub(r"^\w+: (error: )?", "", line) for line in errors)
    return "".join(char if char.isprintable() else " " for char in said)[:500] or "no reason given"
