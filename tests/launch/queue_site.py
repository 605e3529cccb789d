"""A queue without Slurm, whose ``sbatch`` may take a job and not say so, or hang; and what a user sees of it."""

from __future__ import annotations

import re
import shlex
import subprocess

from launch_site import Site, command

from hpc_cifar import runs
from hpc_cifar.launch import submission
from hpc_cifar.runs import Run

TIMED_OUT = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
UNREACHABLE = "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)"
FULL = "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit)"


class Queue:
    """A queue in a folder: ``sbatch`` does what ``behaves`` says, a line for each call, the last line for all that follow."""

    def __init__(self, site: Site) -> None:
        self.site, self.folder = site, site.folder / "queue"
        self.folder.mkdir()
        tested = "sbatch: Job 1 to start at 2030-01-01T00:00:00 using 2 processors on nodes n1 in partition x"
        command(
            site.folder / "bin",
            "sbatch",
            f"""cd {self.folder}
if [ "$1" = --test-only ]; then echo {shlex.quote(tested)} >&2; exit 0; fi
echo x >> calls
number=$((76 + $(wc -l < calls)))
what=$(sed -n "$(wc -l < calls)p" behaves); what=${{what:-$(tail -n 1 behaves)}}
take() {{ echo "$1" > "$number"; sed -n "s/#SBATCH --comment='\\(.*\\)'/\\1/p" "$1" > "$number.k"; }}
case $what in
  works) take "$1"; echo "Submitted batch job $number" ;;
  takes) take "$1"; echo "{TIMED_OUT}" >&2; exit 1 ;;
  hidden) take "$1"; mv "$number" "late-$number"; echo "{TIMED_OUT}" >&2; exit 1 ;;
  loses) echo "{TIMED_OUT}" >&2; exit 1 ;;
  away) echo "{UNREACHABLE}" >&2; exit 1 ;;
  refuses) echo "{FULL}" >&2; exit 1 ;;
  hangs) sleep 60 ;;
  takes-and-hangs) take "$1"; touch hanging; sleep 60 ;;
  slow) touch hanging; sleep 3; take "$1"; echo "Submitted batch job $number" ;;
esac""",
        )
        command(
            site.folder / "bin",
            "squeue",
            f"""cd {self.folder}
echo x >> looks
[ -e silent ] && {{ echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2; exit 1; }}
for job in [0-9][0-9]; do
  [ -e "$job" ] || continue
  case "$*" in
    *%o*) echo "$job|PENDING|$(cat "$job")|$(cat "$job.k")" ;;
    *) echo "$job|PENDING|Priority|N/A|"; for element in 0 1 2; do echo "${{job}}_$element|PENDING|Priority|N/A|"; done ;;
  esac
done; true""",
        )
        command(
            site.folder / "bin",
            "scancel",
            f"""cd {self.folder}
[ -e silent ] && {{ echo "scancel: error: Unable to contact slurm controller (connect failure)" >&2; exit 1; }}
echo "$@" >> cancelled; for job; do rm -f "${{job%_*}}"; done""",
        )
        command(site.folder / "bin", "scontrol", "exit 1")
        site.environment["PATH"] = f"{site.folder / 'bin'}:/usr/bin:/bin"
        self.set(PAUSES_S="(0.1, 0.1, 0.2)", SECOND_LOOK_S="0.1", SBATCH_LIMIT_S="2.0", LAST_WORD_S="1.0")

    def set(self, **values: str) -> None:
        """Constants of the module under test."""
        module = self.site.package / "launch" / "handover.py"
        text = module.read_text()
        for name, value in values.items():
            text = re.sub(rf"^{name} = [^#\n]+", f"{name} = {value}  ", text, flags=re.MULTILINE)
        module.write_text(text)

    def behaves(self, *how: str) -> None:
        (self.folder / "behaves").write_text("\n".join(how) + "\n")

    @property
    def calls(self) -> int:
        return (self.folder / "calls").read_text().count("x")

    @property
    def looks(self) -> int:
        return (self.folder / "looks").read_text().count("x")

    @property
    def jobs(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("[0-9][0-9]"))

    @property
    def cancelled(self) -> list[str]:
        path = self.folder / "cancelled"
        return path.read_text().split() if path.exists() else []

    def silent(self, now: bool) -> None:
        (self.folder / "silent").touch() if now else (self.folder / "silent").unlink()

    def comes(self, number: str) -> None:
        """What was taken unseen is in the queue."""
        (self.folder / f"late-{number}").rename(self.folder / number)


def submit(queue: Queue, *options: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    return queue.site.cli("submit", queue.site.job(processes=1), "--cluster", "slurm", "--parsable", *options, code=code)


def only(site: Site) -> Run:
    [run] = runs.all_runs(site.runs)
    return run


def ids(run: Run) -> list[str]:
    return [row.job_id for row in run.jobs()]


def is_open(run: Run) -> bool:
    return (run.path / submission.FILE).exists()


def state(run: Run, site: Site) -> tuple[str, str | None, str | None]:
    row = site.status(run)
    return row["state"], row["job_id"], row["reason"]


def chained(queue: Queue, links: int = 2) -> str:
    path = queue.site.work / "chain.yaml"
    path.write_text(f"executor: slurm\nrequeue: false\nchain_links: {links}\n")
    return str(path)
