"""What a user's commands do with the runs, folders and profiles of another user; as real commands of both.

``bob`` is the colleague, or the attacker; ``alice`` types the commands. The folder of runs is one that both write to (1777).
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path

import pytest
from two_users import Site, User
from two_users import shared as shared
from two_users import two_users as two_users

from hpc_cifar import runs
from hpc_cifar.config.experiment import Experiment
from hpc_cifar.runs import Run

JOB = {
    "name": "net", "seed": 1, "epochs": 1, "data": {"dataset": "digits", "batch_size": 500},
    "model": {"family": "sequential", "layers": ["flatten", {"dense": {"units": 10}}]},
    "optimizer": {"name": "sgd", "lr": 0.1}, "tracking": {"wandb": "disabled"},
}  # fmt: skip
NAMES = ("alice-20260101-000000-aaaa", "bob-20260102-000000-bbbb")
SECRET = "the-secret-of-alice"


@pytest.fixture
def root(shared: Site) -> Path:
    folder = shared.folder / "runs"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


def run_of(user: User, root: Path, name: str, mode: int = 0o755, **state: object) -> Run:
    """A run that has ended; later names are newer."""
    made = runs.create(root, name, Experiment.model_validate(JOB), {"batch_size": 500}, {})
    made.path.chmod(mode)
    (made.path / "checkpoints").chmod(0o755)
    (made.path / "state.json").write_text(json.dumps({"state": "failed", "reason": "ended", "epoch": 1, **state}))
    made.add_job(executor="slurm", job_id="77")
    when = 1_000_000_000 + int(name.split("-")[1])
    os.utime(made.experiment_file, (when, when))
    user.owns(made.path)
    return made


def types(shared: Site, root: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """What alice's command printed; it never ends in an exception that nobody expected."""
    done = shared.alice.types(*words, HPC_CIFAR_RUNS=str(root), HPC_CIFAR_DATA=str(shared.folder / "data"), **more)
    assert "unexpected" not in done.stderr and "Traceback" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_runs_of_others_are_left_out_with_a_count(shared: Site, root: Path, mode: int) -> None:
    mine = run_of(shared.alice, root, NAMES[0])
    run_of(shared.bob, root, NAMES[1], mode)
    for command in (["status"], ["list"], ["logs"], ["report", "--format", "csv"], ["wait"], ["resume"], ["sync", "last"]):
        done = types(shared, root, *command, WANDB_API_KEY="0" * 40)
        option = "--code-of" if command[0] in ("resume", "sync") else "--owner"  # which this command has
        told = f"1 run of {shared.bob.name} left out ({option} USER takes them)"
        assert told in done.stderr and NAMES[1] not in done.stdout, (command, done.stdout, done.stderr)
        if command[0] in ("status", "list", "report", "wait"):
            assert NAMES[0] in done.stdout
    for command in ("status", "logs", "report", "wait", "resume", "sync", "cancel"):
        done = types(shared, root, command, str(mine.path), WANDB_API_KEY="0" * 40)
        assert "denied" not in done.stderr and shared.bob.name not in done.stderr, (command, done.stderr)
    assert types(shared, root, "status", NAMES[1][:6]).returncode == 2
    done = types(shared, root, "status", NAMES[1])
    assert (done.returncode, f"run '{NAMES[1]}' is of {shared.bob.name}; to take it: --owner USER" in done.stderr) == (2, True)
    done = types(shared, root, "cancel", NAMES[1])
    assert (done.returncode, f"run '{NAMES[1]}' is of {shared.bob.name}; to take it: --code-of USER" in done.stderr) == (
        2,
        True,
    )


def test_a_colleagues_run_is_read_by_path_or_owner(shared: Site, root: Path) -> None:
    run_of(shared.alice, root, NAMES[0])
    theirs = run_of(shared.bob, root, NAMES[1])
    for words in (["status", str(theirs.path)], ["status", "--owner", shared.bob.name], ["list", "--owner", shared.bob.name]):
        assert NAMES[1] in types(shared, root, *words).stdout, words
    done = types(shared, root, "report", "last", "--owner", str(shared.bob.uid), "--format", "csv")
    assert NAMES[1] in done.stdout and NAMES[0] not in done.stdout
    assert types(shared, root, "list", "--owner", "nobody-of-that-name").stderr.strip().endswith("no such user on this machine")
    theirs.path.chmod(0o700)
    done = types(shared, root, "status", str(theirs.path))
    assert (done.returncode, f"cannot be read by you; ask its owner {shared.bob.name}" in done.stderr) == (2, True), done.stderr
    assert "Permission denied" not in types(shared, root, "list", "--owner", shared.bob.name).stderr


def test_nothing_of_others_is_run_signalled_or_sent_without_their_name(shared: Site, root: Path, tmp_path: Path) -> None:
    """Their code would leave a file, and so would the programs of Slurm."""
    theirs = run_of(shared.bob, root, NAMES[1])
    package = theirs.path / "code" / "hpc_cifar"
    package.mkdir(parents=True)
    proof = shared.folder / "proof"
    (package / "__init__.py").write_text(f"open({str(proof)!r}, 'w')\n")
    (theirs.path / "jobs.jsonl").write_text(json.dumps({"executor": "slurm", "job_id": f"--user={shared.alice.name}"}) + "\n")
    shared.bob.owns(theirs.path)
    programs = shared.folder / "bin"
    programs.mkdir()
    for name in ("scancel", "squeue", "scontrol", "sbatch", "sacct"):
        (programs / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {shared.alice.home}/calls\n')
        (programs / name).chmod(0o755)
    path = {"PATH": f"{programs}:{os.environ['PATH']}", "WANDB_API_KEY": "0" * 40}
    for name in ("resume", "cancel", "sync", "export"):
        for words in ([name, "last"], [name, NAMES[1]], [name, str(theirs.path)]):
            done = types(shared, root, *words, **path)
            assert done.returncode in (1, 2) and shared.bob.name in done.stderr, (words, done.stdout, done.stderr)
        assert f"is a run of {shared.bob.name}" in done.stderr and f"--code-of {shared.bob.name}" in done.stderr
        done = types(shared, root, name, str(theirs.path), "--code-of", shared.alice.name, **path)
        assert done.returncode == 1 and f"is a run of {shared.bob.name}" in done.stderr
    for words in (["status", str(theirs.path)], ["cancel", str(theirs.path), "--code-of", shared.bob.name]):
        types(shared, root, *words, **path)
    calls = shared.alice.home / "calls"
    assert "--user=" + shared.alice.name not in (calls.read_text() if calls.exists() else ""), "a planted id is no option"
    assert not proof.exists()
    done = types(shared, root, "submit", "quickstart-digits", "--cluster", "local", "--after", str(theirs.path))
    assert done.returncode != 0


def test_a_name_that_others_took_is_not_gone_on_with(shared: Site, root: Path) -> None:
    theirs = run_of(shared.bob, root, "taken-1-x")
    for words in ([], ["--fresh"], ["--force"]):
        done = types(shared, root, "train", "quickstart-digits", "--name", "taken-1-x", *words)
        assert (done.returncode, f"is a run of {shared.bob.name}; give this one a name" in done.stderr) == (1, True), (
            done.stderr
        )
    assert theirs.path.stat().st_uid == shared.bob.uid


@pytest.mark.parametrize(
    "where", ["evaluation/test/mistakes.png", "metrics.jsonl", "evaluation", "checkpoints/latest", "submitit"]
)
def test_no_link_out_of_a_run_is_followed(shared: Site, root: Path, where: str) -> None:
    secret = shared.alice.home / "private"
    secret.mkdir(exist_ok=True)
    for name in ("mistakes.png", "evaluation.json", "77_0_log.out"):
        (secret / name).write_text(SECRET)
    shared.alice.owns(secret)
    for user, name in zip((shared.alice, shared.bob), NAMES, strict=True):
        run = run_of(user, root, name)
        (run.path / where).parent.mkdir(parents=True, exist_ok=True)
        (run.path / where).symlink_to(secret if "." not in where else secret / "mistakes.png")
        user.owns(run.path)
    theirs = root / NAMES[1]
    done = types(shared, root, "report", str(theirs), "-o", str(shared.alice.home / "page.html"))
    assert done.returncode == 1 and "is a link that leads out of the run" in done.stderr, done.stderr
    for command in ("status", "logs", "wait"):
        done = types(shared, root, command, str(theirs))
        assert SECRET not in done.stdout + done.stderr
    done = types(shared, root, "list", "--owner", shared.bob.name)
    assert "left out" in done.stderr and SECRET not in done.stdout + done.stderr
    done = types(shared, root, "report", "last", "-o", str(shared.alice.home / "page.html"))  # her own, as from an archive
    page = shared.alice.home / "page.html"
    assert SECRET not in (page.read_text() if page.exists() else "")


def test_a_folder_that_others_can_write_is_refused(shared: Site) -> None:
    root = shared.folder / "open"
    root.mkdir()
    shared.alice.owns(root)
    shared.alice.types("prepare", "digits", HPC_CIFAR_DATA=str(shared.folder / "data"), cwd=shared.alice.home)
    for mode in (0o777, 0o775, 0o2770):
        root.chmod(mode)
        for words in (["submit", "quickstart-digits", "--cluster", "local"], ["train", "quickstart-digits"]):
            done = types(shared, root, *words)
            assert done.returncode == 1 and f"others can write to this folder of runs (mode {mode:04o})" in done.stderr, (
                done.stderr
            )
        assert not list(root.iterdir())
        doctor = types(shared, root, "doctor", "--json")
        [row] = [row for row in json.loads(doctor.stdout)["machines"][0]["findings"] if row["name"] == "runs"]
        assert (row["state"], "chmod go-w" in row["fix"]) == ("problem", True), row
        assert types(shared, root, "status").returncode == 0, "to read is no risk"


def test_modes_are_by_design_and_not_by_the_umask(shared: Site) -> None:
    (shared.folder / "site").mkdir()
    shared.alice.owns(shared.folder / "site")
    sweep = shared.alice.home / "sweep.yaml"
    sweep.write_text("method: grid\nparameters: {optimizer.lr: [0.1, 0.2]}\n")
    for umask in (0o000, 0o002, 0o077):
        root = shared.folder / "site" / f"runs-{umask:03o}"
        places = {"HPC_CIFAR_RUNS": str(root), "HPC_CIFAR_DATA": str(shared.folder / "site" / f"data-{umask:03o}")}
        words = ["submit", "quickstart-digits", "--cluster", "local", "--set", "epochs=1", "--set", "tracking.wandb=disabled"]
        assert shared.alice.types("prepare", "digits", umask=umask, **places).returncode == 0
        done = shared.alice.types(
            *words, "--set", "data.validation=0.1", "--sweep", str(sweep), "--wait", umask=umask, **places
        )
        assert done.returncode == 0, done.stdout + done.stderr
        made = [one for one in root.rglob("*") if not one.is_symlink()]
        wrong = [str(one) for one in (root, *made) if one.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)]
        assert not wrong, wrong[:5]
        [run, _] = [one for one in root.iterdir() if not one.name.startswith(".")]
        modes = [one.stat().st_mode & 0o777 for one in (root, root / ".sweeps", run, run / "submitit", run / "checkpoints")]
        assert modes == [0o755, 0o700, 0o700, 0o700, 0o700], [oct(mode) for mode in modes]
        store = Path(places["HPC_CIFAR_DATA"])
        assert {one.stat().st_mode & 0o777 for one in (store / "digits").iterdir()} == {0o644}
        assert [(one.stat().st_mode & 0o777) for one in (store, store / "digits")] == [0o755, 0o755]
        assert shared.bob.types("status", HPC_CIFAR_RUNS=str(root)).returncode == 0


@pytest.mark.parametrize("folder_mode", [0o777, 0o1777, 0o775])
def test_a_planted_profile_is_refused(shared: Site, root: Path, folder_mode: int) -> None:
    """Its environment would be that of alice's job."""
    here = shared.folder / "here"
    (here / "slurm").mkdir(parents=True)
    (here / "slurm").chmod(folder_mode)
    for name in ("local", "slurm", "site"):
        (here / "slurm" / f"{name}.yaml").write_text("executor: local\nenvironment: {LD_PRELOAD: /tmp/evil.so}\n")
    shared.bob.owns(*(here / "slurm").iterdir())
    words = ["submit", "quickstart-digits", "--dry-run", "--cluster"]
    for name in ("site", "slurm/site.yaml"):
        done = shared.alice.types(*words, name, cwd=here, HPC_CIFAR_RUNS=str(root))
        assert (
            done.returncode == 2
            and f"is not used as a profile, whose lines jobs run: it is of {shared.bob.name}" in done.stderr
        )
    done = shared.alice.types(*words, "local", cwd=here, HPC_CIFAR_RUNS=str(root))
    assert done.returncode == 0 and "slurm/local.yaml is not used: local is built in" in done.stderr, done.stderr
    (here / "slurm" / "mine.yaml").write_text("executor: local\n")
    shared.alice.owns(here / "slurm" / "mine.yaml")
    assert shared.alice.types(*words, "mine", cwd=here, HPC_CIFAR_RUNS=str(root)).returncode == 0
    (here / "slurm").chmod(0o755)
    assert shared.alice.types(*words, "site", cwd=here, HPC_CIFAR_RUNS=str(root)).returncode == 0, "a site's own folder"


def test_a_folder_that_was_planted_is_refused_with_its_profile(shared: Site, root: Path) -> None:
    (root / "slurm").mkdir()
    (root / "slurm" / "site.yaml").write_text("executor: local\n")
    shared.bob.owns(root / "slurm")
    done = shared.alice.types("submit", "quickstart-digits", "--dry-run", "--cluster", "site", cwd=root)
    assert done.returncode == 2 and f"is of {shared.bob.name}, in a folder that everybody can write" in done.stderr, done.stderr


def test_parts_of_the_folder_of_runs_that_others_took(shared: Site, root: Path) -> None:
    (root / ".sweeps").mkdir(mode=0o777)
    (root / ".drills").symlink_to(shared.bob.home)
    shared.bob.owns(root / ".sweeps")
    sweep = shared.alice.home / "sweep.yaml"
    sweep.write_text("method: grid\nparameters: {optimizer.lr: [0.1, 0.2]}\n")
    shared.alice.types("prepare", "digits", HPC_CIFAR_DATA=str(shared.alice.home / "data"))
    places = {"HPC_CIFAR_RUNS": str(root), "HPC_CIFAR_DATA": str(shared.alice.home / "data")}
    words = [
        "submit",
        "quickstart-digits",
        "--cluster",
        "local",
        "--set",
        "data.validation=0.1",
        "--sweep",
        str(sweep),
        "--wait",
    ]
    done = shared.alice.types(*words, "--set", "epochs=1", "--set", "tracking.wandb=disabled", **places)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list((root / ".sweeps").iterdir()), "nothing of hers is in a folder of his"
    assert (root / f".sweeps-{shared.alice.uid}").stat().st_mode & 0o777 == 0o700


def test_the_home_of_somebody_who_is_not_there(shared: Site) -> None:
    for variable in ("HPC_CIFAR_RUNS", "HPC_CIFAR_DATA"):
        done = shared.alice.types("doctor", **{variable: "~no-such-user/runs"})
        words = f"{variable}=~no-such-user/runs: there is no user 'no-such-user' on this machine"
        assert (done.returncode, words in done.stderr) == (2, True), done.stderr
    hidden = f"~{shared.bob.name}/runs"
    done = shared.alice.types("status", HPC_CIFAR_RUNS=hidden)
    assert (done.returncode, f"cannot be read by you; ask its owner {shared.bob.name}" in done.stderr) == (2, True), done.stderr
    done = shared.alice.types("submit", "quickstart-digits", "--cluster", "local", HPC_CIFAR_RUNS=hidden)
    assert done.returncode != 0 and "unexpected" not in done.stderr
