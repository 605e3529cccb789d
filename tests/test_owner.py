"""Whose a run is, and what others may have put there: in this process, as a user to whom the files belong or do not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpc_cifar import files, owner, planted, runs
from hpc_cifar.config.experiment import Experiment
from hpc_cifar.errors import LaunchError, RunError, UsageError
from hpc_cifar.launch import control, dependency, slurm, submit
from hpc_cifar.runs import Run

JOB = {
    "name": "net", "epochs": 1, "model": {"family": "sequential", "layers": ["flatten", {"dense": {"units": 10}}]},
    "data": {"dataset": "digits", "batch_size": 500}, "optimizer": {"name": "sgd", "lr": 0.1},
}  # fmt: skip


def made(root: Path, name: str = "net-1") -> Run:
    return runs.create(root, name, Experiment.model_validate(JOB), {}, {})


@pytest.fixture
def squashed(monkeypatch: pytest.MonkeyPatch) -> int:
    """As on a file system that shows all files as those of somebody else."""
    user = os.geteuid() + 4_000_000
    monkeypatch.setattr(owner, "uid", lambda: user)
    return user


def test_files_that_seem_to_be_somebody_elses_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made(tmp_path)
    mine = owner.name_of(os.geteuid())
    monkeypatch.setattr(owner, "uid", lambda: os.geteuid() + 4_000_000)
    for token in ("last", "net", "net-1"):
        with pytest.raises(UsageError, match=rf"no runs here \(1 run of {mine} left out .*; submit one first"):
            runs.find(token, tmp_path)
    assert runs.all_runs(tmp_path) == [] and runs.all_runs(tmp_path, os.geteuid()) == [run]
    assert runs.find(str(run.path), tmp_path) == run, "to read it"
    for act in (control.cancel, lambda one: control.resume(one, data_root=tmp_path)):
        with pytest.raises(RunError, match=f"is a run of {mine}, .*: --code-of {mine}$"):
            act(run)
    with pytest.raises(UsageError, match=f"it is a run of {mine}; wait for it first"):
        dependency.resolve([str(run.path)], tmp_path, "slurm")
    with pytest.raises(RunError, match="--code-of"):
        owner.check_own(run.path, str(os.geteuid() + 1))
    owner.check_own(run.path, str(os.geteuid()))


def test_a_user_without_a_name(squashed: int) -> None:
    assert owner.name_of(squashed) == f"user {squashed}"
    assert owner.number_of(str(squashed), "--owner") == squashed
    for name in ("", "no such", "-1", "²"):
        with pytest.raises(UsageError, match=r"--owner .*: there is no such user"):
            owner.number_of(name, "--owner")


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o2775, 0o757])
def test_a_folder_of_runs_that_others_can_write(tmp_path: Path, mode: int) -> None:
    root = tmp_path / "runs"
    root.mkdir()
    run = made(root)
    root.chmod(mode)
    for act in (lambda: made(root, "net-2"), lambda: control.resume(run, data_root=tmp_path)):
        with pytest.raises(RunError, match=rf"others can write to this folder of runs \(mode {mode:04o}\)"):
            act()
    assert [one.name for one in root.iterdir()] == ["net-1"]
    root.chmod(mode | 0o1000)
    made(root, "net-2")


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077])
def test_modes_do_not_follow_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        run = made(tmp_path / "a" / "runs")
        owner.make_part(owner.part(run.path.parent, ".arrays"))
    finally:
        os.umask(before)
    root = run.path.parent
    modes = [path.stat().st_mode & 0o777 for path in (root.parent, root, run.path, run.checkpoints, root / ".arrays")]
    assert modes == [0o755, 0o755, 0o700, 0o700, 0o700]


def test_a_part_that_is_not_ours(tmp_path: Path, squashed: int) -> None:
    (tmp_path / ".arrays").mkdir()
    (tmp_path / ".sweeps").symlink_to(tmp_path)
    for name in (".arrays", ".sweeps"):
        assert owner.part(tmp_path, name) == tmp_path / f"{name}-{squashed}"
    assert owner.part(tmp_path, ".drills") == tmp_path / ".drills"
    with pytest.raises(RunError, match="or no folder; have it removed"):
        owner.make_part(tmp_path / ".arrays")


def test_code_that_others_could_have_written(tmp_path: Path) -> None:
    run = made(tmp_path)
    package = run.code / "hpc_cifar"
    package.mkdir(parents=True)
    (package / "a.py").touch()
    (package / "a.py").chmod(0o666)
    owner.check_own(run.path, code=True)  # nobody reaches it
    run.path.chmod(0o755)
    with pytest.raises(RunError, match=r"a\.py: others than .* can write here"):
        owner.check_own(run.path, code=True)
    (package / "a.py").chmod(0o644)
    owner.check_own(run.path, code=True)
    run.path.chmod(0o775)
    with pytest.raises(RunError, match=r"others than .* can write here"):
        owner.check_own(run.path)


def test_a_tree_with_more_than_files(tmp_path: Path) -> None:
    run = made(tmp_path)
    (run.checkpoints / "step-00000001").mkdir()
    (run.checkpoints / "latest").symlink_to("step-00000001")
    owner.check_tree(run.path)
    for name, make in (
        ("fifo", lambda path: os.mkfifo(path)),
        ("out", lambda path: path.symlink_to("/etc/passwd")),
        ("up", lambda path: path.symlink_to("../../net-2")),
        ("evaluation", lambda path: path.symlink_to(tmp_path)),
    ):
        make(run.path / name)
        with pytest.raises(RunError, match=f"'{name}' is (a link that leads out of the run|neither a file nor a folder)"):
            owner.check_tree(run.path)
        (run.path / name).unlink()
    owner.check_tree(run.path)


@pytest.mark.parametrize("kind", ["link", "hard link", "fifo"])
def test_a_lock_is_a_file_of_its_own(tmp_path: Path, kind: str) -> None:
    precious, lock = tmp_path / "precious", tmp_path / ".lock"
    precious.write_text("precious")
    {"link": lambda: lock.symlink_to(precious), "hard link": lambda: os.link(precious, lock), "fifo": lambda: os.mkfifo(lock)}[
        kind
    ]()
    for attempt in (lambda: files.hold(lock), lambda: planted.open_there(lock)):
        with pytest.raises(OSError, match=r"is a link, which is not followed|is no file of its own"):
            attempt()
    assert precious.read_text() == "precious"


@pytest.mark.parametrize("job_id", ["--user=alice", "-u", "1,2", "1 2", "", "1_", "1;rm", "1\n2", "²", "１２", "1_2_3"])
def test_what_is_no_number_of_a_job_reaches_no_program(job_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def ask(command: list[str], **_: object) -> slurm.Reply:
        asked.append(command)
        return slurm.Reply("", "", 0)

    monkeypatch.setattr(slurm, "ask", ask)
    assert slurm.query([job_id]).jobs == {} and slurm.evidence(job_id) == slurm.Evidence()
    with pytest.raises(LaunchError, match="is not the number of a Slurm job"):
        slurm.cancel(["12", job_id])
    run = made(tmp_path)
    run.add_job(executor="slurm", job_id=job_id)
    with pytest.raises(LaunchError, match="is not the number of a Slurm job"):
        submit.job_ids([run])
    assert asked == []
    slurm.cancel(["12", "12_3"])
    assert asked == [["scancel", "12", "12_3"]]


def test_homes_of_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPC_CIFAR_RUNS", "~no-such-user/runs")
    with pytest.raises(UsageError, match="HPC_CIFAR_RUNS=~no-such-user/runs: there is no user 'no-such-user'"):
        files.runs_root()
