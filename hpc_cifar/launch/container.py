"""How the profile's container becomes words of the batch script: Apptainer in front of Python, pyxis as options of srun."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..config.container import APPTAINER, Container
from ..errors import UsageError

PYTHON = "python3"
"""The interpreter of an image, where the profile names none: the one that submits lies outside."""


def active(container: Container | None) -> Container | None:
    """The container, unless it is none."""
    return None if container is None or container.runtime == "none" else container


def python_command(container: Container | None, python: str, folders: Sequence[Path], *, gpus: bool) -> str:
    """What starts Python in the job, quoted for the shell.

    Args:
        python: the interpreter, in the image if there is one.
        folders: bound under their own paths.
        gpus: whether the job has any; only then the host's driver is let in.
    """
    container = active(container)
    if container is None or container.runtime not in APPTAINER:
        return shlex.quote(python)
    words = [container.runtime, "exec", *(["--nv"] if gpus else [])]
    for bind in _binds(container, folders):
        words += ["--bind", bind]
    return shlex.join([*words, *container.args, str(container.image), python])


def srun_args(container: Container | None, folders: Sequence[Path], environment: Mapping[str, str]) -> list[str]:
    """Options of pyxis for srun; its hook lets the GPUs of the job in by itself.

    Args:
        environment: variables of the profile, which go before those of the image.
    """
    container = active(container)
    if container is None or container.runtime != "pyxis":
        return []
    mounts = ",".join(_binds(container, folders))
    ours = ",".join(["PYTHONPATH", "PYTHONSAFEPATH", *environment])
    return [f"--container-image={container.image}", f"--container-mounts={mounts}", f"--container-env={ours}", *container.args]


def export_lines(container: Container | None, code: Path, environment: Mapping[str, str]) -> list[str]:
    """Shell lines that make the job import the code snapshot at ``code``, and set the profile's variables, inside too."""
    container = active(container)
    if container is None:
        # after the modules, which may set PYTHONPATH too
        return [f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}", "export PYTHONSAFEPATH=1"]
    # what the host's modules put into PYTHONPATH is not for the Python of the image
    inside = {"PYTHONPATH": str(code), "PYTHONSAFEPATH": "1"}
    lines = [f"export {name}={shlex.quote(value)}" for name, value in inside.items()]
    if container.runtime in APPTAINER:  # these go before what the image sets
        prefix = f"{container.runtime.upper()}ENV_"
        lines += [f"export {prefix}{name}={shlex.quote(value)}" for name, value in {**environment, **inside}.items()]
    return lines


def _binds(container: Container, folders: Sequence[Path]) -> list[str]:
    for folder in folders:
        if re.search(r"[,:]", str(folder)):
            raise UsageError(f"{str(folder)!r}: a container cannot be given a folder with a comma or a colon in its path")
    own = [f"{folder}:{folder}" for folder in folders]
    return own + [bind if ":" in bind else f"{bind}:{bind}" for bind in container.binds]
