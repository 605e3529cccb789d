"""The job files and cluster profiles that come with the package.

In a wheel they lie in ``hpc_cifar/_files``; in a source checkout in ``jobs/`` and ``slurm/profiles/`` beside the package.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import UsageError
from .fields import shown
from .messages import did_you_mean, shown_path

_PACKAGE = Path(__file__).resolve().parent.parent


def _folder(inside: str, beside: str) -> Path:
    packaged = _PACKAGE / "_files" / inside
    return packaged if packaged.is_dir() else _PACKAGE.parent / beside


def job_folder() -> Path:
    """Where the packaged job files lie."""
    return _folder("jobs", "jobs")


def job_files() -> list[Path]:
    """Packaged job files by name."""
    return sorted(job_folder().glob("*.yaml"))


def cluster_files() -> list[Path]:
    """Packaged cluster profiles by name."""
    return sorted(_folder("clusters", "slurm/profiles").glob("*.yaml"))


def find_job(name: str | Path) -> Path:
    """The file meant by a path, or by the name of a job file such as ``quickstart`` or ``jobs/quickstart.yaml``.

    What lies in the working folder goes first: the path itself, then ``jobs/NAME.yaml``; then the packaged files.

    Raises:
        UsageError: there is no such file; the message lists the packaged names.
    """
    path = Path(name)
    stem = path.stem if path.suffix in (".yaml", ".yml") else path.name
    in_jobs_folder = len(path.parts) == 1 or path.parent == Path("jobs")
    candidates = [path]
    if in_jobs_folder and stem:
        candidates += [Path("jobs") / f"{stem}.yaml"]
        candidates += [file for file in job_files() if file.stem == stem]
    try:
        for candidate in candidates:
            if candidate.is_file():
                return candidate
        kind = "a directory; name its files, as in *.yaml" if path.is_dir() and path.parts else "no such job file"
    except (OSError, ValueError):  # a name too long for the file system, or with a NUL in it
        kind = "no such job file"
    names = [file.stem for file in job_files()]
    raise UsageError(f"{shown_path(path)}: {kind}; {did_you_mean(stem, names, 'packaged jobs')}")


def headline(path: Path) -> str:
    """The first comment line of a job file that says something: what the job shows."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return ""
    for line in lines:
        text = line.lstrip("# ").strip()
        if line.startswith("#") and text and not text.startswith("yaml-language-server"):
            return text if text.isprintable() else shown(text)
    return ""
