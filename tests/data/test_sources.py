"""Archives and folders: what is read, what it may be called, and how damage is told."""

from __future__ import annotations

import io
import os
import pickle
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data import makers
from PIL import Image

from hpc_cifar.cli.main import main
from hpc_cifar.data import pickles, sources
from hpc_cifar.errors import DataError, UsageError


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text and "Traceback" not in text
    return text


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "w:bz2"])
def test_official_layout(tmp_path: Path, protocol: int, mode: str) -> None:
    files = makers.batch_files(protocol=protocol)
    archive = sources.read(makers.write_tar(tmp_path / "a", files, mode), "cifar10")
    folder = sources.read(makers.write_folder(tmp_path / "f", files), "cifar10")
    assert archive.train_images.shape == (100, 32, 32, 3) and archive.test_images.shape == (20, 32, 32, 3)
    assert np.array_equal(archive.train_images, folder.train_images) and archive.content == folder.content
    pixels = np.random.default_rng(1).integers(0, 256, (20, 3072), dtype=np.uint8)
    assert np.array_equal(archive.train_images[25], pixels[5].reshape(3, 32, 32).transpose(1, 2, 0))
    assert archive.label == "custom CIFAR-10 batches" and not archive.verified and "unverified" in archive.warnings[0]


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("prefix", ["", "./", "some/where/"])
def test_class_folders(tmp_path: Path, kind: str, prefix: str) -> None:
    files = {prefix + name: data for name, data in makers.image_files(kind=kind).items()} | {"README": b"about"}
    archive = sources.read(makers.write_tar(tmp_path / "a", files, "w:xz"), "cifar10")
    folder = sources.read(makers.write_folder(tmp_path / "f", dict(reversed(files.items()))), "cifar10")
    assert archive.train_labels.tolist() == [label for label in range(10) for _ in range(3)]
    assert np.array_equal(archive.train_images, folder.train_images) and archive.content == folder.content
    assert archive.classes == pickles.CLASSES and archive.label == "custom cifar10" and not archive.verified


@pytest.mark.parametrize("missing", [0, 1])
def test_as_many_jpegs_as_cifar_10_are_called_that_with_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: int
) -> None:
    """The pixels are made up: sixty thousand files would take minutes."""

    def read(source: str, files: Iterator[tuple[str, bytes]], *_: object) -> tuple[Any, Any, tuple[str, ...]]:
        assert len(list(files)) == 60
        train = np.repeat(np.arange(10), 5_000)
        train[:missing] = 9  # one airplane less, one truck more
        sets = [(np.zeros((len(labels), 1, 1, 3), np.uint8), labels) for labels in (train, np.repeat(np.arange(10), 1_000))]
        return sets[0], sets[1], pickles.CLASSES

    monkeypatch.setattr(sources.images, "read", read)
    folder = makers.write_folder(tmp_path / "f", makers.image_files())
    if missing:
        with pytest.raises(DataError, match="train/airplane: has 4,999 images; CIFAR-10 has 5,000 of each class"):
            sources.read(folder, "cifar10")
    else:
        found = sources.read(folder, "cifar10")
        assert found.label == "JPEG CIFAR-10" and not found.verified
        assert found.warnings == (
            "these are not the known JPEG files; the label stands on their number and class folders alone",
        )


def test_own_classes_are_for_own_datasets(tmp_path: Path) -> None:
    path = makers.write_tar(tmp_path / "a", makers.image_files(classes=("no", "yes"), size=(20, 20)))
    own = sources.read(path, "mine")
    assert own.classes == ("no", "yes") and own.label == "custom mine" and own.train_images.shape == (6, 20, 20, 3)
    with pytest.raises(UsageError, match="prepare it as cifar10"):
        sources.read(makers.write_tar(tmp_path / "b", makers.batch_files()), "mine")


def test_digits() -> None:
    digits = sources.read_digits()
    assert digits.train_images.shape == (1437 + 1, 32, 32, 3) and len(digits.test_labels) == 359
    assert digits.train_images.max() == 255 and digits.train_images.min() == 0
    assert np.array_equal(digits.train_images[:, ::4, ::4, 0].repeat(4, 1).repeat(4, 2), digits.train_images[..., 2])
    assert digits.label == "digits" and digits.verified
    shares = np.bincount(digits.test_labels) / (np.bincount(digits.test_labels) + np.bincount(digits.train_labels))
    assert np.abs(shares - 0.2).max() < 0.005


class Evil:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


@pytest.mark.parametrize(
    "call",
    [(os.system, "touch HACKED"), (eval, "open('HACKED', 'w')"), (np.load, "HACKED"), (pickle.loads, b"")],
    ids=lambda call: call[0].__name__,
)
def test_a_malicious_pickle_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: tuple[Any, ...]) -> None:
    monkeypatch.chdir(tmp_path)
    files = makers.batch_files() | {"cifar-10-batches-py/data_batch_3": pickle.dumps({b"data": Evil(*call)})}
    with pytest.raises(DataError, match=r"data_batch_3: is no CIFAR-10 batch, is damaged or is malicious") as error:
        sources.read(makers.write_tar(tmp_path / "a", files), "cifar10")
    one_line(error)
    assert not (tmp_path / "HACKED").exists()


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"labels": [3] * 19}, "20 images but 19 labels"),
        ({"labels": [3] * 19 + [10]}, "label 10 of image 19 is no class from 0 to 9"),
        ({"labels": [-1] + [3] * 19}, "label -1 of image 0"),
        ({"labels": [True] * 20}, "label True"),
        ({"labels": None, "fine_labels": []}, "this is CIFAR-100"),
        ({"data": np.zeros((20, 3072), np.float32)}, "an array of 'f4' where unsigned bytes belong"),
        ({"data": np.zeros((20, 3071), np.uint8)}, "no array of 3,072 bytes an image"),
        ({"data": b"text"}, "no array of 3,072 bytes an image"),
        ({"data": np.array([object()])}, "is malicious"),
    ],
)
def test_a_wrong_batch_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    files = makers.batch_files() | {"cifar-10-batches-py/test_batch": makers.batch_bytes(5, **changes)}
    with pytest.raises(DataError) as error:
        sources.read(makers.write_tar(tmp_path / "a", files), "cifar10")
    assert message in one_line(error) and "test_batch" in str(error.value)


def test_wrong_sets_of_batches(tmp_path: Path) -> None:
    files = makers.batch_files()
    cases = {
        "data_batch_2, test_batch: missing": {n: d for n, d in files.items() if "h_2" not in n and "test" not in n},
        "no such batch": files | {"cifar-10-batches-py/data_batch_6": makers.batch_bytes(6)},
        "a second test_batch": files | {"again/test_batch": makers.batch_bytes(6)},
        "classes cat": files | {"cifar-10-batches-py/batches.meta": pickle.dumps({"label_names": ["cat"]})},
        "is not a CIFAR-10 batch: holds list": files | {"cifar-10-batches-py/data_batch_1": pickle.dumps([1])},
        "test has no image of airplane": files
        | {"cifar-10-batches-py/test_batch": makers.batch_bytes(5, labels=[1 + n % 9 for n in range(20)])},
    }
    for number, (message, case) in enumerate(cases.items()):
        with pytest.raises(DataError) as error:
            sources.read(makers.write_tar(tmp_path / str(number), case), "cifar10")
        assert message in one_line(error)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1017, 10_000])
def test_known_counts_with_other_bytes_are_altered(tmp_path: Path, count: int) -> None:
    with pytest.raises(DataError, match="data_batch_1: altered") as error:
        sources.read(makers.write_tar(tmp_path / "a", makers.batch_files(count), "w"), "cifar10")
    assert ("CIFAR-10 lossless subset" if count == 1017 else "CIFAR-10") in one_line(error)


def test_wrong_image_folders(tmp_path: Path) -> None:
    files = makers.image_files(each=1)
    first = "train/cat/0000.jpg"
    cases: dict[str, dict[str, bytes]] = {
        "train/cats: is no class of this dataset; did you mean 'cat'?": files | {"train/cats/1.jpg": files[first]},
        "test/Automobiles: is no class of this dataset; did you mean 'automobile'?": files
        | {"test/Automobiles/1.jpg": files[first]},
        "train/xyz: is no class of this dataset; the classes are airplane": files | {"train/xyz/1.jpg": files[first]},
        "test/ship: has no images": {n: d for n, d in files.items() if not n.startswith("test/ship")},
        "train/cat/notes.txt: is no image": files | {"train/cat/notes.txt": b"x"},
        "train/cat/0000.jpg: is 31 x 32 pixels in mode RGB; should be 32 x 32": files
        | {first: makers.image_bytes(1, size=(31, 32))},
        "train/cat/0000.jpg: is 32 x 32 pixels in mode L": files | {first: makers.image_bytes(1, mode="L")},
        "train/cat/0000.jpg: is no whole JPEG or PNG": files | {first: files[first][:-300]},
        "train/cat/0001.jpg: is no whole JPEG or PNG": files | {"train/cat/0001.jpg": b""},
        "holds neither": {"train/a.jpg": b"", "x/y/z": b""},
        "is there more than once": files | {"x/" + first: files[first]},
    }
    for number, (message, case) in enumerate(cases.items()):
        for source in (makers.write_tar(tmp_path / f"{number}.tar", case), makers.write_folder(tmp_path / str(number), case)):
            if message == "is there more than once" and source.is_dir():
                continue
            with pytest.raises(DataError) as error:
                sources.read(source, "cifar10")
            assert message in one_line(error) and str(source) in str(error.value)


@pytest.mark.parametrize("mode", ["L", "LA", "I;16", "RGBA", "P", "1"])
def test_images_that_are_not_rgb_are_named(tmp_path: Path, mode: str) -> None:
    """In a dataset of one's own, too."""
    files = makers.image_files(each=1, classes=("a", "b"), kind="PNG")
    stream = io.BytesIO()
    image = Image.new("I;16", (32, 32), 70) if mode == "I;16" else Image.new("RGB", (32, 32)).convert(mode)
    image.save(stream, "PNG")
    files["train/b/0000.png"] = stream.getvalue()
    with pytest.raises(DataError) as error:
        sources.read(makers.write_folder(tmp_path / "x", files), "mine")
    assert f"train/b/0000.png: is 32 x 32 pixels in mode {mode}; should be" in one_line(error)


def test_own_folders_with_something_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the command: one line, exit code 2, nothing left."""
    good = makers.image_files(each=3, classes=("a", "b"))
    cases: dict[str, dict[str, bytes]] = {
        "train/b/0001.jpg: is 20 x 30 pixels, most others are 32 x 32; all should be equal": good
        | {"train/b/0001.jpg": makers.image_bytes(1, size=(20, 30))},
        "train/a/0002.jpg: is no whole JPEG or PNG": good | {"train/a/0002.jpg": good["train/a/0002.jpg"][:200]},
        "test/c: has no images": good | {"train/c/.keep": b"", "test/c/.keep": b""},
        "test/b: has no images": {name: data for name, data in good.items() if not name.startswith("test/b")},
    }
    for number, (message, case) in enumerate(cases.items()):
        source = makers.write_folder(tmp_path / str(number), case)
        assert main(["prepare", "mine", "--archive", str(source), "--root", str(tmp_path / "root")]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1, said
        assert not (tmp_path / "root" / "mine").exists()


def test_the_layout_of_cifar_100(tmp_path: Path) -> None:
    files = makers.hundred_files()
    for source in (makers.write_tar(tmp_path / "a.tar.gz", files), makers.write_folder(tmp_path / "a", files)):
        data = sources.read(source, "cifar100")
        assert (data.label, data.verified, len(data.classes)) == ("custom CIFAR-100 batches", False, 20)
        assert data.train_images.shape == (60, 32, 32, 3) and data.test_labels.tolist() == [row % 20 for row in range(60)]
        with pytest.raises(UsageError, match="holds CIFAR-100; prepare it as cifar100"):
            sources.read(source, "cifar10")


def test_wrong_files_of_cifar_100(tmp_path: Path) -> None:
    files = makers.hundred_files()
    cases = {
        "test: missing": {name: data for name, data in files.items() if not name.endswith("/test")},
        "train: has no list 'fine_labels'; this is CIFAR-10": files | {"cifar-100-python/train": makers.batch_bytes(1)},
        "is no class from 0 to 19": makers.hundred_files(fine_labels=[77] * 60),
        "train: altered: as many images as CIFAR-100": {},
    }
    pixels = pickle.dumps({b"data": np.zeros((50_000, 3072), np.uint8), b"fine_labels": [0] * 50_000}, protocol=2)
    small = pickle.dumps({b"data": np.zeros((10_000, 3072), np.uint8), b"fine_labels": [0] * 10_000}, protocol=2)
    cases["train: altered: as many images as CIFAR-100"] = files | {
        "cifar-100-python/train": pixels,
        "cifar-100-python/test": small,
    }
    for number, (message, case) in enumerate(cases.items()):
        with pytest.raises(DataError) as error:
            sources.read(makers.write_folder(tmp_path / str(number), case), "cifar100")
        assert message in one_line(error)


def test_members_that_point_elsewhere(tmp_path: Path) -> None:
    good = makers.image_files(each=1)
    for name in ("/etc/evil.jpg", "../evil.jpg", "train/../../evil.jpg"):
        with pytest.raises(DataError, match="points outside the archive"):
            sources.read(makers.write_tar(tmp_path / "a", {name: b"x"} | good), "cifar10")
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
        path = makers.write_tar(tmp_path / "b", {}, "w")
        with tarfile.open(path, "w") as archive:
            member = tarfile.TarInfo("train/cat/1.jpg")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        with pytest.raises(DataError, match="is a link or device"):
            sources.read(path, "cifar10")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "w:bz2"])
@pytest.mark.parametrize("layout", ["batches", "images"])
def test_truncation_anywhere_is_noticed(tmp_path: Path, mode: str, layout: str) -> None:
    files = makers.batch_files() if layout == "batches" else makers.image_files(each=1)
    whole = makers.write_tar(tmp_path / "whole", files, mode).read_bytes()
    # what is stored after the end-of-archive mark of a plain tar is padding and may be lost
    payload = len(whole) if mode != "w" else len(whole.rstrip(b"\0")) + 300
    places = [0, 1, 100, 512, 1024, payload // 2, payload - 1, *(random.Random(1).randrange(payload) for _ in range(12))]
    for place in places:
        path = tmp_path / "cut"
        path.write_bytes(whole[:place])
        with pytest.raises(DataError) as error:
            sources.read(path, "cifar10")
        assert str(path) in one_line(error)


@pytest.mark.parametrize("mode", ["w:gz", "w:xz", "w:bz2"])
def test_altered_bytes_are_noticed(tmp_path: Path, mode: str) -> None:
    whole = makers.write_tar(tmp_path / "whole", makers.batch_files(), mode).read_bytes()
    chance = random.Random(2)
    expected = sources.read(tmp_path / "whole", "cifar10").content
    for place in [len(whole) // 2, *(chance.randrange(16, len(whole) - 16) for _ in range(12))]:
        path = tmp_path / "altered"
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << chance.randrange(8))]) + whole[place + 1 :])
        try:
            content = sources.read(path, "cifar10").content
        except DataError as error:
            assert str(path) in str(error)
        else:
            assert content == expected  # a bit that means nothing, as in the name of the gzip header


def test_a_damaged_header_in_the_middle_is_not_the_end(tmp_path: Path) -> None:
    path = makers.write_tar(tmp_path / "a", makers.image_files(each=1), "w")
    with tarfile.open(path) as archive:
        place = archive.getmembers()[7].offset
    data = bytearray(path.read_bytes())
    data[place + 150] ^= 1  # in the checksum
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"truncated or damaged after member train/frog/0000.jpg \(unreadable header\)"):
        sources.read(path, "cifar10")


def test_what_is_not_there_or_no_archive(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello " * 1000)
    (tmp_path / "folder").mkdir()
    for name, message in (("missing", "no such file"), ("text", "no tar archive"), ("folder", "holds neither")):
        with pytest.raises(DataError, match=message):
            sources.read(tmp_path / name, "cifar10")


def test_unbalanced_data_is_told(tmp_path: Path) -> None:
    files = makers.image_files(each=2)
    del files["train/cat/0000.jpg"]
    assert (
        "train is not balanced: 1 to 2 images a class"
        in sources.read(makers.write_tar(tmp_path / "a", files), "cifar10").warnings
    )


def test_the_lossless_subset(lossless_archive: Path, tmp_path: Path) -> None:
    subset = sources.read(lossless_archive, "cifar10")
    assert subset.label == "CIFAR-10 lossless subset" and subset.verified and not subset.warnings
    assert subset.train_images.shape == (5085, 32, 32, 3) and subset.test_images.shape == (1017, 32, 32, 3)
    assert subset.train_labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]  # as anybody's CIFAR-10 begins
    with tarfile.open(lossless_archive) as archive:
        archive.extractall(tmp_path, filter="data")
    assert sources.read(tmp_path, "cifar10").label == "CIFAR-10 lossless subset"
    altered = tmp_path / "cifar-10-batches-py" / "data_batch_4"
    data = bytearray(altered.read_bytes())
    data[1_000_000] ^= 1
    altered.write_bytes(data)
    with pytest.raises(DataError, match="data_batch_4: altered"):
        sources.read(tmp_path, "cifar10")
