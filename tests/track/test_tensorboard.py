"""Event files of a run, by TensorBoard's own readers: every row once, wherever a writer is cut off; nothing else is touched."""

from __future__ import annotations

import importlib.machinery
import json
import os
import random
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install 'hpc-cifar[tensorboard]'")

from events import accumulated, assert_whole, curve
from mirrored import EXPERIMENT, a_run, train
from tensorboard.plugins.hparams import metadata, plugin_data_pb2

from hpc_cifar import files
from hpc_cifar.config.cluster import LOCAL, SLURM
from hpc_cifar.config.experiment import Experiment
from hpc_cifar.errors import TrackingError
from hpc_cifar.launch.submit import plan_for
from hpc_cifar.runs import Run
from hpc_cifar.track import tensorboard, tracker
from hpc_cifar.track.sync import sync

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c6360606060000000050001a5f645400000000049454e44ae426082"
)


def push(run: Run) -> int:
    return sync(run, lambda _: True, lambda _: None, to="tensorboard")


def newest(run: Run) -> Path:
    return max((run.path / "tensorboard").iterdir())


def test_segments_become_one_curve(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    train(run, 0, 14)
    assert push(run) == 15
    train(run, 11, 27, ended="requeued")  # after a kill: steps 12 to 14 are computed again
    assert push(run) == 14
    assert_whole(run)
    assert not [tag for tag in accumulated(run).Tags()["scalars"] if tag.startswith("result/")], "it has not ended"
    train(run, 27, 30, ended="finished")
    assert push(run) == 4
    assert_whole(run)
    shown = accumulated(run)
    assert curve(shown, "epoch") == [(10, 1.0), (20, 2.0), (30, 3.0)], "the axis is the step"
    times = {row["step"]: row["time"] for row in files.read_json_lines(run.metrics_file) if row["kind"] == "step"}
    told = {one.step: one.wall_time for one in shown.Scalars("step/train_loss")}
    assert told | {step: times[step] for step in (12, 13, 14)} == times, "but of steps that were made twice, the first"
    before = {path.name: path.stat().st_size for path in (run.path / "tensorboard").iterdir()}
    assert push(run) == 0
    assert {path.name: path.stat().st_size for path in (run.path / "tensorboard").iterdir()} == before and len(before) == 3


def test_the_experiment_its_outcome_and_pictures_are_there_once(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    train(run, 0, 10)
    picture = run.path / "evaluation" / "test" / "confusion.png"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(PNG)
    (picture.parent / "none.png").write_bytes(b"no picture at all")
    (picture.parent / "link.png").symlink_to(picture)
    for _ in range(2):
        push(run)
    train(run, 10, 20, ended="finished")
    for _ in range(2):
        push(run)
    shown = accumulated(run)
    assert shown.Tags()["images"] == ["evaluation/test-confusion"]
    [image] = shown.Images("evaluation/test-confusion")
    assert (image.encoded_image_string, image.width, image.height, image.step) == (PNG, 1, 1, 10)
    [text] = shown.Tensors("experiment")
    assert text.tensor_proto.string_val[0].decode() == f"```yaml\n{run.experiment_file.read_text()}\n```"
    about = plugin_data_pb2.HParamsPluginData.FromString(
        shown.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    ).session_start_info
    assert about.group_name == run.id
    assert about.hparams["optimizer.lr"].number_value == EXPERIMENT["optimizer"]["lr"]
    assert about.hparams["data.dataset"].string_value == "digits" and "tracking.wandb" not in about.hparams
    assert curve(shown, "result/test_accuracy") == [(20, 0.75)]
    assert curve(shown, "result/val_accuracy.max") == [(20, pytest.approx(0.2))]
    assert metadata.SESSION_END_INFO_TAG in shown.Tags()["tensors"]
    picture.write_bytes(PNG + b"\0")  # another evaluation
    push(run)
    assert len(accumulated(run).Images("evaluation/test-confusion")) == 2


@pytest.mark.parametrize("seed", range(8))
def test_whatever_was_written_last_every_row_is_there_once(tmp_path: Path, seed: int) -> None:
    """The newest file is cut at any offset, or its end is zeros, as after a loss of power; TensorBoard's reader reads all."""
    dice, run, step = random.Random(seed), a_run(tmp_path), 0
    for _ in range(12):
        begin = max(0, step - dice.randrange(4))
        step = begin + dice.randrange(1, 9)
        train(run, begin, step)
        push(run)
        path = newest(run)
        data = path.read_bytes()
        cut = dice.choice((dice.randrange(len(data)), len(data) - dice.randrange(min(40, len(data))), 0))
        path.write_bytes(data[:cut] + bytes(dice.choice((0, 0, 7, 100))))
    push(run)
    assert_whole(run)


def test_a_record_is_there_or_not_at_each_of_its_bytes(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    train(run, 0, 3)
    push(run)
    first = newest(run)
    train(run, 3, 5)
    push(run)
    path = newest(run)
    data, last = path.read_bytes(), files.read_json_lines(run.metrics_file)
    assert path != first and len(data) < 400
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        push(run)
        assert_whole(run)
        for other in (run.path / "tensorboard").iterdir():
            if other not in (first, path):
                other.unlink()
    assert files.read_json_lines(run.metrics_file) == last


def test_what_was_damaged_or_is_of_others_is_passed_over(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    train(run, 0, 10)
    push(run)
    folder, secret = run.path / "tensorboard", tmp_path / "secret"
    secret.write_text("secret")
    (folder / "events.out.tfevents.9000000000.a").symlink_to(secret)
    os.mkfifo(folder / "events.out.tfevents.9000000001.a")
    (folder / "events.out.tfevents.9000000002.a").mkdir()
    (folder / "events.out.tfevents.9000000003.a").write_bytes(os.urandom(100))
    (folder / "notes.txt").write_text("mine")
    train(run, 10, 20, ended="finished")
    assert push(run) == 11 and push(run) == 0
    assert secret.read_text() == "secret" and newest(run).name == "notes.txt"
    for path in (*folder.glob("*.a"), folder / "notes.txt"):  # whose owner sees that they are nothing
        path.rmdir() if path.is_dir() else path.unlink()
    assert_whole(run)


@pytest.fixture
def in_its_place(tmp_path: Path) -> Iterator[Path]:
    yield a_run(tmp_path).path / "tensorboard"


@pytest.mark.parametrize("kind", ["file", "fifo", "link", "dangling"])
def test_something_else_in_the_place_of_the_folder_is_one_line(tmp_path: Path, in_its_place: Path, kind: str) -> None:
    run = Run(in_its_place.parent)
    train(run, 0, 10)
    elsewhere = tmp_path / "elsewhere"
    if kind == "file":
        in_its_place.write_text("")
    elif kind == "fifo":
        os.mkfifo(in_its_place)
    else:
        in_its_place.symlink_to(elsewhere)
        if kind == "link":
            elsewhere.mkdir()
    with pytest.raises(TrackingError) as error:
        push(run)
    assert str(error.value) == f"TensorBoard: {in_its_place} is no folder of this run; remove it"
    assert not elsewhere.exists() or not list(elsewhere.iterdir())


def test_a_full_disk_is_one_line_and_the_rest_comes_later(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    train(run, 0, 100, ended="finished")
    command = [sys.executable, "-B", "-m", "hpc_cifar", "sync", str(run.path), "--to", "tensorboard"]

    def no_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))

    done = subprocess.run(command, preexec_fn=no_room, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert f"{run.path / 'tensorboard'}: cannot be written: File too large" in done.stderr
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and done.stdout.startswith(f"{run.id}: ") and not done.stderr, done.stderr
    assert_whole(run)


def test_without_its_package_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, said = a_run(tmp_path), list[str]()
    folder = importlib.machinery.ModuleSpec("tensorboard", None)  # as a run's folder is one for Python that is begun beside it
    monkeypatch.setattr(tensorboard.importlib.util, "find_spec", lambda name: folder)
    tracking = run.experiment().tracking.model_copy(update={"mirrors": ("tensorboard", "tensorboard")})
    lacking = "TensorBoard: its package is not installed (pip install 'hpc-cifar[tensorboard]')"
    assert tracker.lacking(tracking) == [lacking] and tracker.lacking(run.experiment().tracking) == []
    assert not tensorboard.begins(run, tracking, said.append)
    assert said == [f"{lacking}; hpc-cifar sync {run.id} --to tensorboard writes later"]


def test_it_is_light(tmp_path: Path) -> None:
    """The process beside a training imports neither torch nor tensorflow nor a server."""
    run = a_run(tmp_path)
    train(run, 0, 10)
    code = (
        "import json, sys; from pathlib import Path; from hpc_cifar.runs import Run; from hpc_cifar.track.sync import sync\n"
        "sync(Run(Path(sys.argv[1])), lambda _: True, print, to='tensorboard')\n"
        "print(json.dumps([name for name in ('torch', 'tensorflow', 'grpc', 'werkzeug', 'wandb') if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run.path)], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout) == []


def test_submit_says_so_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = Experiment.model_validate(EXPERIMENT | {"tracking": {"mirrors": ["tensorboard"]}})
    before = plan_for(experiment, LOCAL, 1000).notes
    monkeypatch.setattr(tensorboard.importlib.util, "find_spec", lambda name: None)
    *others, note = plan_for(experiment, LOCAL, 1000).notes
    assert tuple(others) == before
    assert note.startswith("TensorBoard: its package is not installed") and note.endswith("; the run trains without")
    elsewhere = SLURM.model_copy(update={"python": "/shared/venv/bin/python"})
    assert not [note for note in plan_for(experiment, elsewhere, 1000).notes if "TensorBoard" in note], "of that nobody knows"
