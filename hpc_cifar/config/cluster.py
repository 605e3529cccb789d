"""Where it runs: the profile of a site, as a frozen pydantic model.

Many of these values end up in ``#SBATCH`` lines, so each is checked against a pattern that leaves no room for a second line,
a space or a quote.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from .. import files, planted
from ..errors import UsageError
from ..redaction import holds_a_secret, may_name_a_secret
from . import sbatch
from .container import Container
from .experiment import NAME_PATTERN
from .explain import first_problem
from .fields import Count, Duration, Flag, Model, Positive, Whole, matching, shown
from .messages import did_you_mean, shown_path
from .packaged import cluster_files

DEFAULT_PREFLIGHT_S = 60

_word = matching(r"[A-Za-z0-9_][A-Za-z0-9_.,@+:-]*", "a name without spaces (letters, digits and _ . , @ + : -)")
_constraint = matching(r"[A-Za-z0-9_\[(][A-Za-z0-9_.,:&|*()\[\]!=-]*", "features joined by & or |, without spaces")
_hosts = matching(r"[A-Za-z0-9_][A-Za-z0-9_.,\[\]-]*", "host names such as node1,node[3-5], without spaces")
_gpu_type = matching(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", "a GPU type as in `sinfo -o %G`, such as a100")
_module = matching(r"[A-Za-z0-9_][A-Za-z0-9_.+/@=-]*", "a module name such as cuda/12.4")
_option = matching(r"--?[A-Za-z][^\x00-\x1f\x7f-\x9f\ud800-\udfff]*", "an srun option that begins with - or --, on one line")
_python = matching(
    r"(?![-\s]|~(?!/))[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\\'\"`$]+",
    "the path of a Python interpreter, without quotes, backslash or $",
)
_line = matching(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]*", "one line without control characters")

Word = Annotated[str, Field(max_length=256), AfterValidator(_word)]
Line = Annotated[str, Field(max_length=4096), AfterValidator(_line)]
Hosts = Annotated[str, Field(max_length=4096), AfterValidator(_hosts)]
Constraint = Annotated[str, Field(max_length=1024), AfterValidator(_constraint)]

_scratch = matching(
    r"(/|\$\{?[A-Za-z_])[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]*",
    "an absolute path on the node, or one that begins with a variable, such as /dev/shm or $TMPDIR",
)

NO_SECRETS = "keys and tokens do not belong in a file; export it where you submit, or log in"


class Cluster(Model):
    """One site: the executor, what every request carries, and how jobs are prepared and stopped there."""

    name: str
    """The profile is called what its file is called; this need not be written."""
    executor: Literal["slurm", "local"] = "slurm"
    """``slurm``, or this machine without a scheduler."""
    description: Line = ""
    """One line, for ``hpc-cifar jobs`` and ``validate``."""

    # Where jobs go. The command line overrides these one by one.
    partition: Word | None = None
    """Partition; the site's default without it. ``--partition`` overrides it."""
    account: Word | None = None
    """Account; ``--account`` overrides it."""
    qos: Word | None = None
    """Quality of service; ``--qos`` overrides it."""
    constraint: Constraint | None = None
    """Features of nodes, joined by & or |; ``--constraint`` overrides it."""
    exclude: Hosts | None = None
    """Nodes to leave out; ``--exclude`` overrides it."""
    nodelist: Hosts | None = None
    """Nodes that a job must have."""

    # How GPUs are asked for, and what a node has.
    gpu_request: Literal["gpus_per_node", "gres", "none"] = "gpus_per_node"
    """``--gpus-per-node=N``, ``--gres=gpu:N``, or no GPUs asked for."""
    gpu_type: Annotated[str, Field(max_length=64), AfterValidator(_gpu_type)] | None = None
    """Such as ``a100``: ``--gpus-per-node=a100:8``."""
    gpus_per_node_available: Annotated[Whole, Field(ge=0, le=64)] | None = None
    """GPUs of a node. A job that asks for more is refused; where it is 0, it gets CPU processes instead."""
    cpus_per_process: Annotated[Count, Field(le=1024)] | None = None
    """CPUs of each process, where the job file does not say."""
    memory_gib_per_node: Positive | None = None
    """Memory of a node, where the job file does not say; the site's default without it."""
    exclusive: Flag = False
    """Whole nodes, even for a job that needs less."""

    # What happens before the program starts.
    modules: tuple[Annotated[str, Field(max_length=256), AfterValidator(_module)], ...] = ()
    """Loaded in this order before the program starts."""
    setup: tuple[Line, ...] = ()
    """Shell lines, after the modules; one that fails is named and ends the job."""
    setup_may_fail: Flag = False
    """Jobs go on though a module, a line of ``setup`` or a variable failed; it is named in their log."""
    environment: dict[str, Line] = Field(default_factory=dict)
    """Variables of the jobs; keys and tokens are refused."""
    python: Annotated[str, Field(max_length=1024), AfterValidator(_python)] | None = None
    """The interpreter of the jobs; that which submits without it, and ``python3`` in a container."""
    container: Container | None = None
    """The container that jobs run in."""

    # What a job does on its nodes before it trains.
    scratch: Annotated[str, Field(max_length=1024), AfterValidator(_scratch)] | None = None
    """Folder on a node's own disk, such as ``$TMPDIR`` or ``/dev/shm``: nodes train from a verified copy of the data there."""
    preflight: Flag = True
    """Check every node before training; a bad one is named and excluded, and the job requeued once."""
    preflight_timeout_s: Annotated[Whole, Field(ge=2, le=3600)] = DEFAULT_PREFLIGHT_S
    """How long nodes wait for each other in these checks."""

    # How jobs end.
    max_time: Duration | None = None
    """The longest job. A time limit above it is cut to it."""
    signal_delay_s: Annotated[Whole, Field(ge=5, le=3600)] = 120
    """How long before the time limit Slurm warns a job; enough to save a checkpoint."""
    requeue: Flag = True
    """Jobs may go back to the queue, and do so by themselves."""
    chain_links: Annotated[Whole, Field(ge=0, le=100)] = 0
    """Jobs that wait behind the first (afterany) and continue the run, where jobs cannot requeue themselves."""
    preemptible: Flag = False
    """Where a job cannot ask Slurm, it takes a SIGTERM for a preemption, not for ``scancel``."""

    # What this model has no field for.
    sbatch_extra: dict[str, Flag | Whole | Line] = Field(default_factory=dict)
    """Any other sbatch option, without the dashes: ``{reservation: course}``."""
    srun_args: tuple[Annotated[str, Field(max_length=1024), AfterValidator(_option)], ...] = ()
    """Any other srun option, with its dashes."""

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not NAME_PATTERN.fullmatch(name):
            raise ValueError(f"should be 1 to 64 letters, digits, '.', '_' or '-', not {shown(name)}")
        return name

    @field_validator("environment")
    @classmethod
    def _environment_names(cls, environment: dict[str, str]) -> dict[str, str]:
        for name in environment:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,127}", name):
                raise ValueError(f"should name variables with letters, digits and '_', not {shown(name)}")
            if may_name_a_secret(name) or holds_a_secret(f"{name}={environment[name]}"):
                raise ValueError(f"should not hold {name}: {NO_SECRETS}")
        return environment

    @field_validator("setup", "srun_args")
    @classmethod
    def _no_secrets(cls, lines: tuple[str, ...]) -> tuple[str, ...]:
        for number, line in enumerate(lines, 1):
            if holds_a_secret(line):
                raise ValueError(f"should not hold a key, token or password (in item {number}): {NO_SECRETS}")
        return lines

    @field_validator("sbatch_extra")
    @classmethod
    def _options_of_sbatch(cls, extra: dict[str, bool | int | str]) -> dict[str, bool | int | str]:
        for name, value in extra.items():
            if not re.fullmatch(r"[a-z][a-z0-9_-]{0,63}", name):
                raise ValueError(f"should name sbatch options without dashes in front, such as reservation, not {shown(name)}")
            if (why := sbatch.refusal(name, value)) is not None:
                raise ValueError(why)
            if holds_a_secret(f"--{name}={value}"):
                raise ValueError(f"should not hold a key, token or password (in {name}): {NO_SECRETS}")
            if value is False:
                raise ValueError(f"should not set {name} to false: leave it out")
        return extra

    @model_validator(mode="after")
    def _extra_contradicts_no_field(self) -> Cluster:
        given = [field for field in sbatch.RIVALS if getattr(self, field)]
        if self.container is not None and self.container.runtime == "none":
            given.remove("container")
        if (why := sbatch.rivalry(self.sbatch_extra, given)) is not None:
            raise ValueError(f"sbatch_extra: {why}")
        return self

    @model_validator(mode="after")
    def _gpu_request_fits(self) -> Cluster:
        if self.gpu_request == "none" and self.gpu_type is not None:
            raise ValueError(f"gpu_type {self.gpu_type} needs gpu_request: gpus_per_node or gres, not none")
        return self

    @model_validator(mode="after")
    def _for_jobs_of_slurm(self) -> Cluster:
        if self.executor != "local":
            return self
        if self.container is not None and self.container.runtime != "none":
            raise ValueError(f"container: runtime {self.container.runtime} needs executor: slurm, not local")
        for name in ("python", "modules", "setup"):
            if getattr(self, name):
                raise ValueError(f"{name}: needs executor: slurm, not local, which runs jobs as hpc-cifar itself was started")
        return self

    def variables(self) -> dict[str, str]:
        """The environment of a job: the profile's own variables, and the fields that act on the nodes."""
        found = dict(self.environment)
        if self.scratch is not None:
            found["HPC_CIFAR_SCRATCH"] = self.scratch  # variables in it are expanded on each node, not here
        preflight_s = self.preflight_timeout_s if self.preflight else 0
        if preflight_s != DEFAULT_PREFLIGHT_S:
            found["HPC_CIFAR_PREFLIGHT_S"] = str(preflight_s)
        return found


LOCAL = Cluster(
    name="local", executor="local", description="this machine, without a scheduler", gpu_request="none", signal_delay_s=30
)
SLURM = Cluster(name="slurm", executor="slurm", description="the Slurm cluster of this machine, with its default partition")
BUILT_IN: Mapping[str, Cluster] = {"local": LOCAL, "slurm": SLURM}


def profile_folders() -> list[Path]:
    """Folders searched for ``NAME.yaml``, first hit wins; the packaged profiles come after them.

    ``slurm`` is first, where ``hpc-cifar jobs`` puts copies: in a checkout ``slurm/profiles`` has the packaged ones.
    """
    home = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    folders = [Path("slurm"), Path("slurm/profiles")]
    try:
        folders.append(Path(home).expanduser() / "hpc-cifar" / "clusters")
    except RuntimeError:  # no home directory, as in some containers
        pass
    return folders


def known_clusters() -> dict[str, Path | None]:
    """Every name ``find_cluster`` would find and its file (None: built in)."""
    known: dict[str, Path | None] = {file.stem: file for file in cluster_files()}
    for folder in reversed(profile_folders()):
        try:
            known.update({file.stem: file for file in sorted(folder.glob("*.yaml")) if file.is_file()})
        except OSError:  # an unreadable folder holds no profile for us
            continue
    return known | dict.fromkeys(BUILT_IN)  # whose names always mean what they say


def overshadowed(name: str) -> Path | None:
    """A profile that has the name of a built-in one, and so is not used by that name."""
    if name not in BUILT_IN:
        return None
    for folder in profile_folders():
        with contextlib.suppress(OSError):
            if (folder / f"{name}.yaml").is_file():
                return folder / f"{name}.yaml"
    return None


def find_cluster(name: str | None = None, *, have_sbatch: bool) -> Cluster:
    """The profile to use.

    Args:
        name: a path or a name; None means ``HPC_CIFAR_CLUSTER``, else ``slurm`` with sbatch at hand and ``local`` without.
        have_sbatch: whether this machine can submit to Slurm.

    Raises:
        UsageError: there is no such profile (the message lists those there are), or it has errors (each with file:line).
    """
    name = name or os.environ.get("HPC_CIFAR_CLUSTER") or ("slurm" if have_sbatch else "local")
    if os.sep in name or name.endswith((".yaml", ".yml")):
        return _named_by_file(files.expanded(Path(name), f"--cluster {name}") if name.startswith("~/") else Path(name))
    known = known_clusters()
    if name not in known:
        folders = ", ".join(str(folder) for folder in profile_folders())
        hint = did_you_mean(name, sorted(known), "known profiles")
        raise UsageError(f"--cluster: no profile named {shown(name)}; {hint}; searched {folders} and the packaged profiles")
    path = known[name]
    if path is None:
        return BUILT_IN[name]
    return _named_by_file(path, checked=path not in cluster_files())  # who can write those can write this code


def _named_by_file(path: Path, *, checked: bool = True) -> Cluster:
    """The profile in ``path`` under the file's name: a copied profile often keeps the name of the one it was copied from.

    Raises:
        UsageError: somebody else may have put it there: its environment and setup are run by jobs.
    """
    from .load import load_cluster  # it needs the model above

    if checked and (why := planted.problem(path)):
        raise UsageError(f"{shown_path(path)}: is not used as a profile, whose lines jobs run: {why}")
    return load_cluster(path).model_copy(update={"name": path.stem})


def with_overrides(cluster: Cluster, **overrides: Any) -> Cluster:
    """``cluster`` with the command line's partition, account, qos, constraint, exclude, ...; None leaves a field as it is.

    Raises:
        UsageError: a value would not be right in the profile either; the message names the option.
    """
    given = {field: value for field, value in overrides.items() if value is not None}
    if not given:
        return cluster
    try:
        return Cluster.model_validate({**cluster.model_dump(), **given})
    except ValidationError as error:
        field, message = first_problem(error)
        option = f"--{field.replace('_', '-')}: " if field else ""  # else it is a rule over several fields
        raise UsageError(f"{option}{message}") from None
