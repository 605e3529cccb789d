"""Damages: what can become of a file, by name and seed; each says in words what was done, or None where it does not apply."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

Damage = Callable[[Path, random.Random], str | None]
DEEP = 100_000
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3.7, -0.5, 2**53, 2**70, 10**30, 1e308, -1e308, 1e-320),
    *(
        "",
        "text",
        "1",
        "²",
        "-1",
        "1e5",
        "../../..",
        "--user=root",
        "finished",
        "\x1b[2J\x1b]0;x\x07",
        "a\nb",
        "\u202e",
        "x" * 5000,
    ),
    *([], {}, [1], [[]], {"a": 1}, [None], {"": {}}),
)
RAW = (
    "NaN",
    "Infinity",
    "-Infinity",
    "9" * 5000,
    "1e999",
    "-" + "9" * 400,
    "[" * DEEP,
    '{"a":' * DEEP,
    '"\\ud800"',
    "nul",
    "{",
    "",
)


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container of a document with a key in it."""
    found: list[tuple[Any, Any]] = []
    pairs: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        found.append((value, key))
        found += _places(inner)
    return found


def _altered(value: Any, random_: random.Random) -> tuple[str, str] | None:
    """A JSON text of ``value`` with one odd value in it, and words for it."""
    value = copy.deepcopy(value)
    places = _places(value)
    if not places or random_.random() < 0.08:
        raw = random_.choice([*RAW, *(json.dumps(odd) for odd in ODD)])
        return raw, f"the whole is {raw[:30]!r}"
    container, key = random_.choice(places)
    name = key if isinstance(key, str) else f"[{key}]"
    kind = random_.random()
    if kind < 0.15:
        del container[key]
        return json.dumps(value), f"{name} left out"
    if kind < 0.4:
        raw = random_.choice(RAW)
        container[key] = "@@here@@"
        return json.dumps(value).replace('"@@here@@"', raw), f"{name} is {raw[:30]!r}"
    odd = random_.choice(ODD)
    container[key] = odd
    return json.dumps(value), f"{name} is {json.dumps(odd)[:30]}"


def json_value(path: Path, random_: random.Random) -> str | None:
    if path.suffix == ".jsonl":
        lines = path.read_bytes().split(b"\n")
        filled = [number for number, line in enumerate(lines) if line.startswith(b"{")]
        if not filled:
            return None
        number = random_.choice(filled)
        done = _altered(json.loads(lines[number]), random_)
        if done is None:
            return None
        lines[number] = done[0].encode("utf-8", "surrogatepass").replace(b"\n", b" ")
        path.write_bytes(b"\n".join(lines))
        return f"line {number + 1}: {done[1]}"
    if path.suffix != ".json":
        return None
    done = _altered(_json(path), random_)
    if done is None:
        return None
    path.write_bytes(done[0].encode("utf-8", "surrogatepass"))
    return done[1]


def yaml_value(path: Path, random_: random.Random) -> str | None:
    if path.suffix not in (".yaml", ".yml"):
        return None
    if random_.random() < 0.15:
        text = random_.choice(
            (
                "a: " + "[" * DEEP,
                "- " * 20_000 + "x",
                "a: &a [x,x,x,x,x,x,x,x,x]\n"
                + "".join(f"{c}: &{c} [{','.join(['*' + p] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)),
                "a: !!python/object/apply:os.getpid []",
                "a: &a\n  b: *a\n",
                "<<: *x",
                "? [1]\n: 2\n",
                "{" * 5000,
            )
        )
        whole = random_.random() < 0.5
        path.write_text(text if whole else path.read_text(encoding="utf-8") + "\n" + text + "\n", encoding="utf-8")
        return f"{'the whole is' if whole else 'at the end'} {text[:20]!r}"
    done = _altered(yaml.load(path.read_text(encoding="utf-8"), yaml.CSafeLoader), random_)
    if done is None:
        return None
    path.write_bytes(done[0].encode("utf-8", "surrogatepass"))  # JSON is YAML
    return done[1]


def digit(path: Path, random_: random.Random) -> str | None:
    """One digit for another: what stands there is still as good a number as before."""
    if path.suffix not in (".json", ".jsonl", ".yaml", ".csv"):
        return None
    data = bytearray(path.read_bytes())
    places = [place for place, byte in enumerate(data) if 48 <= byte <= 57]
    if not places:
        return None
    place = random_.choice(places)
    old = data[place]
    data[place] = random_.choice([byte for byte in range(48, 58) if byte != old])
    path.write_bytes(data)
    around = bytes(data[max(0, place - 30) : place + 8]).decode(errors="replace").replace("\n", " ")
    return f"digit {chr(old)} is {chr(data[place])} in {around!r}"


def bits(path: Path, random_: random.Random) -> str | None:
    data = bytearray(path.read_bytes())
    if not data:
        return None
    places = sorted(random_.randrange(len(data) * 8) for _ in range(random_.choice((1, 1, 1, 2, 8))))
    for place in places:
        data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)
    return f"bits {places} of {len(data)} bytes"


def shortened(path: Path, random_: random.Random) -> str | None:
    size = path.stat().st_size
    if not size:
        return None
    left = random_.randrange(size)
    os.truncate(path, left)
    return f"cut to {left} of {size} bytes"


def empty(path: Path, random_: random.Random) -> str | None:
    path.write_bytes(b"")
    return "empty"


def absent(path: Path, random_: random.Random) -> str | None:
    path.unlink()
    return "deleted"


def inserted(path: Path, random_: random.Random) -> str | None:
    data = path.read_bytes()
    what = random_.choice(
        (b"\0", b"\0" * 100, b"\xff\xfe", b"\xc3(", b"\xed\xa0\x80", b"\x1b[31m", b"\r", b"\xef\xbb\xbf", b"{", b"}", b"\n\n")
    )
    place = random_.choice((0, len(data), random_.randrange(len(data) + 1)))
    path.write_bytes(data[:place] + what + data[place:])
    return f"{what[:4]!r} at {place}"


def garbage(path: Path, random_: random.Random) -> str | None:
    path.write_bytes(random_.randbytes(random_.choice((1, 100, 10_000))))
    return "random bytes"


def zeros(path: Path, random_: random.Random) -> str | None:
    if random_.random() < 0.5:
        path.write_bytes(b"")
    os.truncate(path, 100 * 2**20)
    return "zeros to 100 MiB, sparse"


def lines(path: Path, random_: random.Random) -> str | None:
    data = path.read_bytes()
    rows = data.split(b"\n")
    if len(rows) < 3 or b"\0" in data:
        return None
    one, other = random_.randrange(len(rows) - 1), random_.randrange(len(rows) - 1)
    kind = random_.choice(("lost", "doubled", "swapped", "joined", "odd", "long", "tail lost"))
    if kind == "lost":
        del rows[one]
    elif kind == "doubled":
        rows.insert(one, rows[one])
    elif kind == "swapped":
        rows[one], rows[other] = rows[other], rows[one]
    elif kind == "joined":
        rows[one : one + 2] = [rows[one] + rows[one + 1]]
    elif kind == "odd":
        rows.insert(
            one,
            random_.choice(
                (b"[1, 2]", b"7", b'"x"', b"null", b"{}", b"true", b"NaN", b'{"kind": "epoch"}', b"{" * 1000, b"[" * DEEP)
            ),
        )
    elif kind == "long":
        rows.insert(one, b"x" * 2**20)
    else:
        rows = rows[:one]
    path.write_bytes(b"\n".join(rows))
    return f"line {one + 1} {kind}"


def _node(make: Callable[[Path, random.Random], str | None]) -> Damage:
    def act(path: Path, random_: random.Random) -> str | None:
        path.unlink()
        return make(path, random_)

    return act


def _fifo(path: Path, _: random.Random) -> str | None:
    os.mkfifo(path)
    return "a FIFO"


def _socket(path: Path, _: random.Random) -> str | None:
    here = Path.cwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(path.name[:100])
    finally:
        os.chdir(here)
    return "a socket"


def _device(path: Path, random_: random.Random) -> str | None:
    minor = random_.choice((3, 5))
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, minor))
        with path.open("rb"):
            pass
    except OSError:  # not root, or a file system without devices
        path.unlink(missing_ok=True)
        path.symlink_to("/dev/null" if minor == 3 else "/dev/zero")
    return "the device null" if minor == 3 else "the device zero"


def _folder(path: Path, random_: random.Random) -> str | None:
    path.mkdir()
    if random_.random() < 0.5:
        (path / "x").write_text("x")
    return "a folder"


def _link(path: Path, random_: random.Random) -> str | None:
    there = random_.choice((path.name, "nowhere", "/dev/zero", "/dev/null", "/proc/self/mem", "..", "/etc/hostname"))
    path.symlink_to(there)
    return f"a link to {'itself' if there == path.name else there}"


def unreadable(path: Path, _: random.Random) -> str | None:
    if os.getuid() == 0:
        return None
    path.chmod(0)
    return "mode 000"


WEIGHTS: dict[str, tuple[int, Damage]] = {
    "value": (36, json_value),
    "yaml": (20, yaml_value),
    "digit": (8, digit),
    "bits": (10, bits),
    "cut": (7, shortened),
    "empty": (3, empty),
    "absent": (4, absent),
    "inserted": (7, inserted),
    "garbage": (2, garbage),
    "zeros": (1, zeros),
    "lines": (12, lines),
    "fifo": (2, _node(_fifo)),
    "socket": (1, _node(_socket)),
    "device": (2, _node(_device)),
    "folder": (3, _node(_folder)),
    "link": (3, _node(_link)),
    "mode": (1, unreadable),
}
NODES = ("absent", "fifo", "socket", "device", "folder", "link")


def apply(path: Path, random_: random.Random) -> tuple[str, str]:
    """Damage a file; the name of the kind, and words. Its time of change is as before: runs are ordered by it."""
    times, names = path.lstat(), list(WEIGHTS)
    if path.is_symlink():
        names = list(NODES)
    while True:
        name = random_.choices(names, [WEIGHTS[name][0] for name in names])[0]
        words = WEIGHTS[name][1](path, random_)
        if words is not None:
            if not path.is_symlink() and path.exists():
                os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
            return name, words


def restore(pristine: Path, path: Path) -> None:
    """Put a file back as it was, whatever stands in its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(pristine, path, follow_symlinks=False)
