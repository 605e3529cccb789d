"""Which pipeline `auto` takes and why; what pipelines say where they cannot work; bench and preview."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import DALI, FFCV, make

from hpc_cifar.cli.main import main
from hpc_cifar.config.experiment import Augment
from hpc_cifar.data import bench, choice, pipeline, preview, reference
from hpc_cifar.data.store import Arrays
from hpc_cifar.errors import DataError, UsageError

GPU = torch.device("cuda")


@pytest.fixture
def gpu_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., choice.Choice]:
    """What is chosen on a GPU with so many free bytes, where these cannot run."""

    def chosen(arrays: Arrays, free: int, *missing: str) -> choice.Choice:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 2 * free))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(choice, "problem", lambda name, _=None: f"no {name} here" if name in missing else "")
        return choice.choose("auto", GPU, arrays)

    return chosen


def test_auto_chooses_by_device_memory_and_what_is_installed(arrays: Arrays, gpu_of: Callable[..., choice.Choice]) -> None:
    assert choice.choose("auto", torch.device("cpu"), arrays).name == "resident"
    fits = gpu_of(arrays, 2 * arrays.images.nbytes)
    assert fits.name == "resident" and "MiB free on the GPU" in fits.why
    small = 2 * arrays.images.nbytes - 1
    assert gpu_of(arrays, small).name == "ffcv"
    without = gpu_of(arrays, small, "ffcv")
    assert without.name == "dali" and without.why.endswith("ffcv: no ffcv here")
    plain = gpu_of(arrays, small, "ffcv", "dali")
    assert plain.name == "reference" and "dali: no dali here" in plain.why


@pytest.mark.parametrize(
    ("name", "raised", "said"),
    [
        (
            "ffcv",
            ModuleNotFoundError("No module named 'ffcv'", name="ffcv"),
            r"ffcv is not installed \(.*`make ffcv-wheel`.*conda",
        ),
        (
            "dali",
            ModuleNotFoundError("No module", name="nvidia"),
            r"nvidia-dali-cuda130 is not installed \(pip install 'hpc-ci",
        ),
        (
            "ffcv",
            ModuleNotFoundError("No module", name="cv2"),
            r"opencv-python-headless, which ffcv needs, .*\(pip install open",
        ),
        (
            "ffcv",
            OSError("libturbojpeg.so.0: cannot open shared object file: No"),
            r"libturbojpeg.so.0, a library that ffcv needs,",
        ),
        (
            "ffcv",
            ImportError("libGL.so.1: cannot open shared object file: No"),
            r"libGL.so.1, .* \(pip uninstall opencv-python, ",
        ),
        (
            "dali",
            OSError("libcufile.so.0: cannot open shared object file"),
            r"libcufile.so.0, a library that dali needs,.*container",
        ),
        ("ffcv", AttributeError("numba has no\nxyz"), r"ffcv cannot be imported: numba has no \("),
    ],
    ids=lambda value: "" if isinstance(value, Exception) else None,
)
def test_what_is_missing_and_how_to_get_it(
    arrays: Arrays, monkeypatch: pytest.MonkeyPatch, name: str, raised: Exception, said: str
) -> None:
    def fails(module: str) -> None:
        raise raised

    monkeypatch.setattr(choice.importlib, "import_module", fails)
    with pytest.raises(UsageError, match=f"data.pipeline: {name}: {said}.*; or use pipeline: auto") as refused:
        choice.choose(name, torch.device("cpu"), arrays)
    assert "\n" not in str(refused.value)


@pytest.mark.component("dali")
def test_dali_on_a_gpu_that_is_not_there(arrays: Arrays, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nvidia.dali")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # torch is content, and DALI is not
    with pytest.raises(UsageError, match=r"data.pipeline: dali: no pipeline on GPU 0, is there a driver\?") as refused:
        make(arrays, "dali", device="cuda:0")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["auto", "resident", "reference"])
def test_a_gpu_that_is_not_there(arrays: Arrays, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=r"no GPU can be used here, though cuda is asked for: is there a driver\?"):
        make(arrays, name, device="cuda")


@pytest.mark.slow
def test_a_killed_worker_process_is_an_error(arrays: Arrays) -> None:
    import multiprocessing

    one = make(arrays, "reference", workers=2, batch_size=4)
    iterator = one.batches(0)
    next(iterator)
    for child in multiprocessing.active_children():
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r"data.pipeline: reference: its workers failed .*; data.workers: 0 needs neither"):
        list(iterator)
    one.close()


@pytest.mark.slow
@pytest.mark.component("root")
@pytest.mark.skipif(os.geteuid() != 0, reason="a small /dev/shm needs root")
@pytest.mark.parametrize("name", ["resident", "reference", FFCV, DALI])
def test_no_room_in_shared_memory(name: str, readable: Callable[[str], Arrays], tmp_path: Path) -> None:
    """Only worker processes need it, and that is said before they start."""
    arrays = readable(name)
    for part in ("images", "labels", "moments"):
        np.save(tmp_path / f"{part}.npy", getattr(arrays, part))
    code = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        import numpy as np
        from pathlib import Path
        from pipelines import make
        from hpc_cifar.data.store import Arrays
        from hpc_cifar.errors import DataError
        parts = [np.load(Path({str(tmp_path)!r}) / f"{{part}}.npy") for part in ("images", "labels", "moments")]
        arrays = Arrays(*parts, {arrays.beton and str(arrays.beton)!r} and Path({str(arrays.beton)!r}))
        try:
            print(sum(len(batch.labels) for batch in make(arrays, {name!r}, workers=2, batch_size=350).batches(0)))
        except DataError as error:
            print(error)
    """)
    full = 'mount -t tmpfs -o size=4k full /dev/shm && head -c 4096 /dev/zero > /dev/shm/x && exec "$@"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", full, "sh", sys.executable, "-c", code],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    said = done.stdout.strip()
    if name == "reference":
        assert said.startswith("data.pipeline: reference: its 2 workers need "), (said, done.stderr)
        assert " of /dev/shm, where 0.0 MiB are free; data.workers: 0 needs none" in said and "\n" not in said
    else:
        assert said == "700", done.stderr


def test_what_does_not_fit_the_images_is_refused(arrays: Arrays) -> None:
    with pytest.raises(UsageError, match=r"padding_value: 2 values for images of 3 channels"):
        make(arrays, "resident", Augment(crop_padding=1, padding_mode="constant", padding_value=(1, 2)))
    with pytest.raises(ValueError, match="padding_value goes with padding_mode: constant"):
        Augment(padding_value=3)


@pytest.mark.parametrize("shape", [(30, 20, 28, 3), (30, 40, 40, 1)])
@pytest.mark.parametrize("name", ["resident", "reference", DALI])
def test_images_of_any_one_size(shape: tuple[int, ...], name: str, readable: Callable[[str], Arrays]) -> None:
    from pipelines import plain, raw

    readable(name)
    images = np.random.default_rng(2).integers(0, 256, shape, dtype=np.uint8)
    labels = np.arange(len(images), dtype=np.int64)
    arrays = Arrays(images, labels, np.zeros((len(images), 2, shape[3]), np.int64))
    augment = Augment(crop_padding=6, padding_mode="reflect", flip="random", cutout=10)
    mean, std = (0.49, 0.48, 0.45)[: shape[3]], (0.25, 0.24, 0.26)[: shape[3]]
    one = make(arrays, name, augment, indices=labels, batch_size=30, mean=mean, std=std)
    [batch] = one.batches(2)
    pixels = raw(batch.images.expand(-1, 3, -1, -1))[..., : shape[3]]
    assert np.array_equal(pixels, plain(arrays, batch.labels.tolist(), augment, 2))
    one.close()


@pytest.mark.slow
def test_bench_and_preview(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPC_CIFAR_DATA", str(tmp_path))
    assert main(["prepare", "digits", "--preview", str(tmp_path / "sheet.png")]) == 0
    said = capsys.readouterr().out.replace("\n", " ")
    names = said.rpartition("(")[2].rpartition(")")[0].split(", ")
    assert "preview: " in said and {"resident", "reference"} <= set(names)
    with Image.open(tmp_path / "sheet.png") as sheet:
        sheet.load()
        pixels = np.asarray(sheet)
    cell = (len(pixels) - preview._MARGIN) / (len(names) + 1)
    assert cell == 32 * preview.SCALE + preview._MARGIN + preview._TEXT
    originals, *rows = (pixels[int(row * cell) + preview._MARGIN + preview._TEXT :][:64] for row in range(len(names) + 1))
    assert all(np.array_equal(row, rows[0]) for row in rows) and not np.array_equal(rows[0], originals)
    options = ["--images", "300", "--batch-size", "100", "--rounds", "1", "--json", str(tmp_path / "b.json")]
    assert main(["bench", "data", "--dataset", "digits", *options]) == 0
    said = capsys.readouterr().out
    assert "n = 1 rounds" in said and "x reference" in said
    figures: dict[str, Any] = json.loads((tmp_path / "b.json").read_text())
    assert {"resident", "reference"} <= set(figures["images_per_second"]) and figures["hardware"]["cores"] >= 1
    assert main(["bench", "data", "--dataset", "cifar10"]) == 2
    assert "is not prepared" in capsys.readouterr().err
    assert main(["prepare", "digits", "--preview", str(tmp_path / "no" / "sheet.png")]) == 2


@pytest.mark.slow
def test_bench_goes_on_without_a_pipeline_that_cannot_begin(arrays: Arrays, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(*_: Any) -> None:
        raise DataError("data.pipeline: reference: no luck\nmore words")

    monkeypatch.setattr(reference.Reference, "__init__", cannot)
    rates, missing = bench.measure(arrays, 100, 50, 1, "cpu", torch.float32)
    assert missing["reference"] == "data.pipeline: reference: no luck" and len(rates["resident"]) == 1
    assert "reference" not in rates and "images/s" in bench.table(rates, "reference")[0]


def test_the_first_of_several_iterators_ends_with_the_next(arrays: Arrays) -> None:
    one = make(arrays, "resident")
    first = one.batches(0)
    next(first)
    assert isinstance(next(one.batches(1)), pipeline.Batch)
    assert list(first) == []
