"""Train the published systems and put what their sources claim beside what was measured.

    python benchmarks/systems.py ann-1 cnn-3 --json docs/results/systems-2-cores.json
    python benchmarks/systems.py --seeds 3 --json docs/results/systems.json        every system that has a claim
    python benchmarks/systems.py --show --json docs/results/systems.json           the table of what was measured
    python benchmarks/systems.py --background                                      ``make systems``: the whole plan
    python benchmarks/systems.py --background --list                               its order, hours, and what is done

One after another, each in a process of its own on this machine, on the GPU if there is one. Runs lie in HPC_CIFAR_RUNS and are
continued if this program is started again; figures of runs that were not made with the present files are kept as they are, and
marked. In the background it has the lowest priority, waits at a checkpoint while benchmarks/quiet.py runs something, and begins
what has failed once more at its next start.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import quiet
import systems_background as background
import torch
from systems_record import Results
from systems_table import failures, lines

from hpc_cifar import files
from hpc_cifar.config.difference import digest
from hpc_cifar.config.experiment import Experiment
from hpc_cifar.config.load import load_experiment
from hpc_cifar.config.model import PretrainedModel
from hpc_cifar.errors import HpcCifarError
from hpc_cifar.runs import Run

ROOT = Path(__file__).resolve().parents[1]
JOBS = ROOT / "jobs"
SEEDS = 3
# of one training of each system that needs no downloaded weights, as expected on two cores
HOURS = {
    "ann-1": 0.01, "ann-3": 0.02, "cnn-1": 0.12, "cnn-3": 0.25, "cnn-5-dropout": 0.35, "cnn-l2-plateau": 0.4,
    "mfm-01": 0.5, "mfm-02": 0.5, "three-conv-maxnorm": 0.6, "whitened-aptx": 0.7,
    "deep300": 4.0, "mfm-10": 3.0, "mfm-03": 2.0, "mfm-04": 2.0, "mfm-05": 2.0,
    "mfm-06": 2.0, "mfm-07": 2.0, "mfm-08": 2.0, "mfm-09": 2.0, "mfm-11": 2.0,
}  # fmt: skip
# nobody's account is told, and a step for which there is no processor for minutes does not hang
IN_THE_BACKGROUND = ("tracking.wandb=disabled", "resources.hang_timeout_s=3600")
RECIPES = {"speed-cpu": 0.1, "deep300-tuned": 4.0}  # our own, measured beside them

Plan = list[tuple[str, int]]  # (job, which of its seeds, from 0)


def everything() -> Plan:
    """In the order in which they are wanted: a seed of what is quick, then what is long, then the spread of what is quick."""
    quick = sorted((job for job, hours in HOURS.items() if hours < 1), key=HOURS.__getitem__)
    slow = [job for job in HOURS if job not in quick]
    return [
        *((job, 0) for job in (*quick, *slow)),
        *((job, number) for number in range(1, SEEDS) for job in quick),
        *(("speed-cpu", number) for number in range(SEEDS)),
        ("deep300-tuned", 0),
    ]


def with_claim() -> list[str]:
    """Systems with a claim, in the order of the sources."""
    found = [(load_experiment(path), path.stem) for path in sorted(JOBS.glob("*.yaml"))]
    return [
        name for experiment, name in sorted(found, key=lambda pair: getattr(pair[0].claim, "source", "")) if experiment.claim
    ]


def from_scratch() -> list[str]:
    """The published systems whose networks begin with random weights."""
    return [name for name in with_claim() if not isinstance(load_experiment(job_file(name)).model, PretrainedModel)]


def job_file(name: str) -> Path:
    """Of a name in jobs/; or of a path, as it is."""
    return Path(name).absolute() if name.endswith(".yaml") else JOBS / f"{name}.yaml"


def command(job: Path, name: str, sets: list[str]) -> list[str]:
    changes = [part for change in sets for part in ("--set", change)]
    return [sys.executable, "-m", "hpc_cifar", "train", str(job), "--name", name, *changes]


def train(job: Path, name: str, sets: list[str]) -> bool:
    """Whether it is trained to its end; what it said has been printed. A run that had ended before is not begun again."""
    run = Run(files.runs_root() / name)
    if run.finished() and run.experiment() == load_experiment(job, sets):
        return True
    return background.watched(command(job, name, sets), None) == 0 and run.finished()


def placed(run: Run, experiment: Experiment) -> list[str]:
    """A job that asks for no GPU is trained on one where there is one; a run that has begun goes on as it began."""
    if run.experiment_file.exists():
        gpus = run.experiment().resources.gpus_per_node
    elif torch.cuda.is_available():
        gpus = experiment.resources.gpus_per_node or 1
    else:
        return []
    same = gpus == experiment.resources.gpus_per_node
    return [] if same else [f"resources.gpus_per_node={gpus}", "resources.processes_per_node=null"]


def set_aside(run: Run, wanted: str) -> None:
    """Rename a run of another job file, or one that cannot be read any more, out of the way of the present one."""
    if not run.experiment_file.exists():
        return
    try:
        if digest(run.experiment()) == wanted:
            return
    except HpcCifarError:
        pass
    number = 1
    while (aside := run.path.with_name(f"{run.id}-old-{number}")).exists():
        number += 1
    run.path.rename(aside)
    print(f"{run.id}: its job file has changed since; the run is now {aside.name}", flush=True)


class Systems:
    """Trainings of one call, and where their figures go.

    Args:
        results: the figures.
        sets: changes for every job, ``a.b=value``.
        suffix: words behind the names of runs, and of the jobs in the results.
        attendant: stops and waits on behalf of the machine; None trains without a pause.
    """

    def __init__(self, results: Results, sets: list[str], suffix: str, attendant: background.Attendant | None) -> None:
        self.results, self.sets, self.attendant = results, sets, attendant
        self.suffix = f"-{suffix}" if suffix else ""

    def experiment(self, job: str, number: int) -> Experiment:
        first = load_experiment(job_file(job), self.sets)
        return load_experiment(job_file(job), [*self.sets, f"seed={first.seed + number}"])

    def entry(self, job: str) -> str:
        return job_file(job).stem + self.suffix

    def run(self, job: str, seed: int) -> Run:
        return Run(files.runs_root() / f"{self.entry(job)}-s{seed}")

    def is_done(self, job: str, number: int) -> bool:
        """Whether its figures are here, by the present job file; the run itself may be gone."""
        experiment = self.experiment(job, number)
        return self.results.has(self.entry(job), experiment.seed, digest(experiment))

    def complete(self, job: str, number: int) -> bool:
        """Train one to its end, as far as it is not trained already, and note its figures, or how else it ended.

        Raises:
            background.Stopped: somebody asked to.
        """
        experiment = self.experiment(job, number)
        run = self.run(job, experiment.seed)
        set_aside(run, digest(experiment))
        if not run.finished():
            self._train(job, run, experiment)
        return self.results.note(self.entry(job), experiment, run, self.sets)

    def _train(self, job: str, run: Run, experiment: Experiment) -> None:
        changes = [*placed(run, experiment), *self.sets, f"seed={experiment.seed}"]
        if self.attendant is not None:
            changes = [*IN_THE_BACKGROUND, *changes]
        words = command(job_file(job), run.id, changes)
        if self.attendant is None:
            self.results.begin(run)
            background.watched(words, None)
            return
        self.attendant.prepare(experiment.data.dataset)
        while True:
            self.attendant.wait_until_free(run)
            self.results.begin(run)
            background.watched(words, self.attendant)
            if run.finished() or not self.attendant.asked:
                return


def listed(systems: Systems, plan: Plan) -> list[str]:
    """The plan: what is done, and the hours that are expected of the rest."""
    hours = HOURS | RECIPES
    rows, left = [], 0.0
    for job, number in plan:
        done, seed = systems.is_done(job, number), systems.experiment(job, number).seed
        expected = hours.get(job)
        left += 0.0 if done or expected is None else expected
        rows.append(f"{job:20} seed {seed:<5} {'-' if expected is None else f'{expected:.2f}':>5} h  {'done' if done else ''}")
    waiting = ", ".join(name for name in with_claim() if name not in from_scratch())
    return [
        *(row.rstrip() for row in rows),
        f"{left:.0f} hours left, as expected on two cores; waiting for ImageNet's weights: {waiting}",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", help="names in jobs/, or files; every one with a claim unless some are named")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each, from the file's seed on")
    parser.add_argument("--set", action="append", default=[], dest="sets", help="a.b=value, as for submit; noted in the result")
    parser.add_argument("--suffix", default="", help="word behind the names of runs, and of the jobs in the result")
    parser.add_argument("--json", type=Path, help="where the figures are added to")
    parser.add_argument("--again", action="store_true", help="also seeds that are in the JSON without a run here")
    parser.add_argument("--show", action="store_true", help="train nothing; print the table")
    parser.add_argument("--background", action="store_true", help="lowest priority, with pauses; all of the plan by default")
    parser.add_argument("--nice", type=int, default=19, help="of the background: how much lower its priority is")
    parser.add_argument("--list", action="store_true", help="train nothing; print what would be trained, in order")
    options = parser.parse_args()
    if options.background and options.json is None:
        options.json = ROOT / "docs" / "results" / f"systems-{'gpu' if torch.cuda.is_available() else '2-cores'}.json"
    named: list[str] = options.jobs or with_claim()
    plan: Plan = [(job, number) for job in named for number in range(options.seeds)]
    if options.background and not options.jobs:
        plan = everything()
    results = Results(options.json)
    systems = Systems(results, options.sets, options.suffix, None)
    if options.show or options.list:
        print("\n".join(listed(systems, plan) if options.list else lines(results.systems)))
        return 0
    results.compare({systems.entry(job): systems.experiment(job, 0) for job, _ in plan})
    if not options.background:
        return _in_order(systems, plan, again=options.again)
    files.runs_root().mkdir(parents=True, exist_ok=True)
    try:
        lock = files.hold(files.runs_root() / ".systems.lock")
    except BlockingIOError as error:
        print(f"systems: trained already by {error.strerror}, in the same folder of runs", file=sys.stderr)
        return 1
    with lock, background.Attendant(quiet.lock_file(), quiet.trained_file(), options.nice) as systems.attendant:
        try:
            return _in_order(systems, plan, again=options.again)
        except background.Stopped as stopped:
            print("systems: stopped; the same command goes on", flush=True)
            return 128 + stopped.number


def _in_order(systems: Systems, plan: Plan, *, again: bool) -> int:
    """How many could not be trained to their end."""
    failed = []
    for job, number in plan:
        if systems.is_done(job, number) and not (
            again and not systems.run(job, systems.experiment(job, number).seed).path.exists()
        ):
            continue
        if not systems.complete(job, number):
            failed.append(systems.run(job, systems.experiment(job, number).seed).id)
            continue
        name = systems.entry(job)
        print("\n".join(lines({name: systems.results.systems[name]})), flush=True)
    print("\n".join(["", *lines(systems.results.systems), *failures(systems.results.systems)]))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
