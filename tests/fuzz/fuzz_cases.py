"""Case number -> which file is damaged, and which command meets it. The same number is the same case, whatever ran before."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from fuzz_site import CAMPAIGN, Fuzzed

LISTING = {"status", "list"}
HEAVY = {"evaluate", "export", "train", "prepare", "report"}  # torch may be asked for a checkpoint
# commands that meet a damaged file of a run; {run} is that run
OF_RUNS: tuple[tuple[int, tuple[str, ...]], ...] = (
    (16, ("status", "--json")),
    (14, ("list", "--json")),
    (8, ("status", "{run}", "--json")),
    (5, ("status",)),
    (5, ("list",)),
    (6, ("list", "--campaign", CAMPAIGN)),
    (14, ("report", "fin-a", "fin-b", "swept-0", "{run}", "--format", "json")),
    (2, ("report", "fin-a", "{run}", "-o", "out.html")),
    (3, ("report", "--campaign", "swept", "--format", "csv")),
    (3, ("report", "{run}", "--format", "md")),
    (4, ("logs", "{run}")),
    (5, ("resume", "{run}", "--cluster", "slurm")),
    (4, ("cancel", "{run}")),
    (2, ("status", "4712", "--json")),
    (2, ("report", "--campaign", "swept", "--winner", "best.yaml")),
)
OF_CHECKPOINTS: tuple[tuple[int, tuple[str, ...]], ...] = (
    (5, ("evaluate", "{run}", "--json", "--no-pictures")),
    (2, ("evaluate", "{run}", "--json", "--no-pictures", "--split", "validation")),
    (3, ("export", "{run}", "-o", "out.safetensors")),
    (2, ("status", "--json")),
    (2, ("resume", "{run}", "--cluster", "slurm")),
    (2, ("train", "tiny.yaml", "--name", "stopped")),
)
OF_DATA: tuple[tuple[int, tuple[str, ...]], ...] = (
    (5, ("evaluate", "fin-a", "--json", "--no-pictures")),
    (3, ("submit", "tiny.yaml", "--cluster", "local", "--dry-run")),
    (2, ("resume", "failed", "--cluster", "slurm")),
    (2, ("train", "tiny.yaml", "--name", "stopped")),
)
OF_WORK: tuple[tuple[int, tuple[str, ...]], ...] = (
    (6, ("validate", "{file}")),
    (3, ("submit", "{file}", "--cluster", "local", "--dry-run")),
    (3, ("submit", "tiny.yaml", "--cluster", "./mine.yaml", "--dry-run")),
    (3, ("submit", "tiny.yaml", "--cluster", "local", "--sweep", "sweep.yaml", "--dry-run")),
    (1, ("validate", "tiny.yaml", "other.yaml")),
)
# what the records of a run are, beside what only few commands read
MOSTLY = {
    "state.json": 12,
    "result.json": 10,
    "metrics.jsonl": 10,
    "jobs.jsonl": 10,
    "plan.json": 8,
    "experiment.yaml": 8,
    "evaluation.json": 6,
    "sweep.json": 4,
    "provenance.json": 4,
    "cluster.json": 4,
    "saved.json": 3,
    "waits.json": 4,
    "interruptions.jsonl": 5,
    "manifest.json": 4,
    "state.pt": 4,
}
OF_ARCHIVES: tuple[tuple[int, tuple[str, ...]], ...] = (
    (1, ("prepare", "{name}", "--archive", "{file}", "--root", "made", "--no-beton")),
)
OF_WEIGHTS: tuple[tuple[int, tuple[str, ...]], ...] = ((1, ("submit", "transfer.yaml", "--cluster", "local", "--dry-run")),)


@dataclass(frozen=True)
class Case:
    """``file`` is relative to the site; ``later``: it is removed so many seconds after the start, and not damaged."""

    number: int
    file: Path
    run: str | None
    argv: tuple[str, ...]
    later: float | None
    seed: str

    @property
    def heavy(self) -> bool:
        return self.argv[0] in HEAVY or "transfer.yaml" in self.argv or "--campaign" in self.argv

    @property
    def random(self) -> random.Random:
        return random.Random(f"{self.seed} damage")


def files_of(site: Fuzzed) -> dict[str, list[Path]]:
    """What can be damaged, by kind."""
    found: dict[str, list[Path]] = {"runs": [], "data": [], "work": []}
    for path in sorted(site.pristine.rglob("*")):
        relative = path.relative_to(site.pristine)
        if "code" in relative.parts or not (path.is_file() or path.is_symlink()) or path.suffix == ".lock":
            continue
        if relative.parts[0] in found:
            found[relative.parts[0]].append(relative)
    return found


def path_is_archive(path: Path) -> bool:
    return path.name.endswith(".tar.gz")


def case(site: Fuzzed, number: int, seed: int = 0, heavy_share: float = 0.025) -> Case:
    name = f"{seed}/{number}"
    random_ = random.Random(name)
    files = files_of(site) if not hasattr(site, "files") else site.files
    site.files = files  # type: ignore[attr-defined]
    kind = random_.choices(
        ("runs", "checkpoints", "data", "work"), (1 - 2 * heavy_share - 0.08, heavy_share, heavy_share, 0.08)
    )[0]
    if kind == "checkpoints":
        chosen = [
            path for path in files["runs"] if "checkpoints" in path.parts or path.name in ("experiment.yaml", "result.json")
        ]
        chosen = [path for path in chosen if path.parts[1] in ("fin-a", "swept-0", "stopped", "failed")]
        file, commands = random_.choice(chosen), OF_CHECKPOINTS
    elif kind == "data":
        chosen = [path for path in files["data"] if not path.name.startswith("train.beton")]
        file, commands = random_.choice(chosen), OF_DATA
    elif kind == "work":
        file = random_.choices(files["work"], [1 if path.suffix == ".yaml" else 0.4 for path in files["work"]])[0]
        archive = OF_ARCHIVES if path_is_archive(file) else OF_WEIGHTS
        commands = OF_WORK if file.suffix == ".yaml" else archive
    else:
        file = random_.choices(files["runs"], [MOSTLY.get(path.name, 1) for path in files["runs"]])[0]
        commands = OF_RUNS
    run = file.parts[1] if kind in ("runs", "checkpoints") and not file.parts[1].startswith(".") else None
    argv = random_.choices([words for _, words in commands], [weight for weight, _ in commands])[0]
    if argv[0] == "train" and run is not None:
        run = "stopped"
        file = (
            Path("runs", "stopped", *file.parts[2:])
            if (site.pristine / "runs" / "stopped" / Path(*file.parts[2:])).exists()
            else Path("runs/stopped/state.json")
        )
    shown = tuple(
        word.format(run=run or "fin-b", file=file.name, name="cifar10" if file.name.startswith("b") else "pets")
        for word in argv
    )
    shown = tuple(word for place, word in enumerate(shown) if word not in shown[:place] or word.startswith("-"))
    later = random_.uniform(0.0, 0.06) if random_.random() < 0.03 else None
    return Case(number, file, run, shown, later, name)
