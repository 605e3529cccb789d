"""YAML text to a tree that knows the line of every key, with every problem of the text at once.

PyYAML only delivers events here; no tag is ever resolved, so nothing can be constructed from a file. Scalars are read as
YAML 1.2 means them: ``no``, ``0123`` and ``10:00:00`` stay text. The limits below keep a hostile file
(alias bomb, endless nesting, megabytes) from costing more than milliseconds.
"""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from .fields import shown
from .messages import Place, Problem, shown_key, shown_path

MAX_BYTES = 1_000_000
MAX_NODES = 50_000  # after aliases are expanded; a network of 1000 layers has about 10,000
MAX_DEPTH = 40

_PARSER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NOT_PRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,39})")
# Only what YAML 1.1 reads as a number too, so that what PyYAML wrote reads back: 5e-4 stays text, as number fields accept.
_FLOAT = re.compile(r"([-+]?(0|[1-9][0-9]*)\.[0-9]*|\.[0-9]+)([eE][-+][0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


@dataclass
class Node:
    """A scalar, a mapping of keys to (place of the key, node), or a list of nodes."""

    kind: Literal["scalar", "mapping", "list"]
    place: Place
    scalar: Any = None
    raw: str = ""
    entries: dict[str, tuple[Place, Node]] = field(default_factory=dict)
    items: list[Node] = field(default_factory=list)
    size: int = 1
    height: int = 1

    def value(self) -> Any:
        """The plain Python value."""
        if self.kind == "mapping":
            return {key: node.value() for key, (_, node) in self.entries.items()}
        if self.kind == "list":
            return [node.value() for node in self.items]
        return self.scalar


class _Stop(Exception):
    """Reading cannot go on after this problem."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem


def read_text(path: Path) -> str | Problem:
    """The text of a job file or profile, or why it cannot be read."""
    whole = Place(shown_path(path))
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            return Problem(whole, "", "is a directory; name a YAML file")
        if not stat.S_ISREG(status.st_mode):
            return Problem(whole, "", "is not a regular file; name a YAML file")
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return Problem(whole, "", "no such file; check the path")
    except OSError as error:
        return Problem(whole, "", f"cannot be read: {error.strerror or 'input/output error'}")
    except ValueError:
        return Problem(whole, "", "no such file; its name holds a NUL character")
    if len(data) > MAX_BYTES:
        size = max(status.st_size, len(data)) / 1e6
        return Problem(whole, "", f"is {size:.1f} MB; a job file or profile has at most {MAX_BYTES / 1e6:.0f} MB")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return Problem(
            Place(whole.file, line), f"byte {error.start}", f"0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"
        )


def parse(text: str, file: str, *, lines: bool = True, path: str = "") -> tuple[Node | None, list[Problem]]:
    """The tree of one YAML document and every problem found; None where there is no usable tree.

    Args:
        file: what the places are called, such as the path or ``--set``.
        lines: whether places have line numbers.
        path: field path of the document's root, for messages.
    """
    composer = _Composer(file, lines, path)
    if bad := _NOT_PRINTABLE.search(text):
        line, column = text.count("\n", 0, bad.start()) + 1, bad.start() - text.rfind("\n", 0, bad.start())
        place = Place(file, line if lines else 0)
        return None, [Problem(place, path or f"column {column}", f"the character {bad[0]!a} is not allowed; remove it")]
    events = yaml.parse(text, Loader=_PARSER)
    try:
        for event in events:
            composer.take(event)
    except _Stop as stop:
        composer.problems.append(stop.problem)
        return None, composer.problems
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        number, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        place = Place(file, number if lines else 0)
        composer.problems.append(Problem(place, path or f"column {column}", _words_for(error, text)))
        return None, composer.problems
    except yaml.YAMLError:
        composer.problems.append(Problem(Place(file), path, "is not valid YAML"))
        return None, composer.problems
    finally:
        events.close()  # type: ignore[attr-defined]  # a generator, which the stubs call an iterator
    return composer.root, composer.problems


class _Composer:
    """Builds nodes from events without recursion."""

    def __init__(self, file: str, lines: bool, path: str) -> None:
        self.file, self.lines, self.base = file, lines, path
        self.problems: list[Problem] = []
        self.root: Node | None = None
        self.open: list[tuple[Node, str, str | None]] = []  # collection, its path, its anchor
        self.key: list[tuple[str, Place] | None] = []  # per open collection: the key whose value comes next
        self.anchors: dict[str, Node | None] = {}
        self.nodes = 0
        self.documents = 0

    def place(self, event: Any) -> Place:
        return Place(self.file, event.start_mark.line + 1 if self.lines else 0)

    def here(self) -> str:
        """Field path of the value that comes next."""
        if not self.open:
            return self.base
        node, path, _ = self.open[-1]
        if node.kind == "list":
            return f"{path}[{len(node.items)}]"
        key = self.key[-1]
        return path if key is None else join(path, key[0])

    def stop(self, event: Any, message: str) -> _Stop:
        return _Stop(Problem(self.place(event), self.here(), message))

    def take(self, event: Any) -> None:
        if isinstance(event, yaml.DocumentStartEvent):
            self.documents += 1
            if self.documents > 1:
                raise _Stop(Problem(self.place(event), self.base, "a second YAML document begins here; keep one a file"))
        elif isinstance(event, yaml.AliasEvent):
            self.alias(event)
        elif isinstance(event, yaml.ScalarEvent):
            self.check_tag(event)
            self.scalar(event)
        elif isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            self.check_tag(event)
            if self.awaits_key():
                raise self.stop(event, "a key should be plain text, not a list or mapping; check brackets and dashes")
            if len(self.open) >= MAX_DEPTH:
                raise self.stop(event, f"is nested more than {MAX_DEPTH} levels deep; no job file needs that")
            kind: Literal["mapping", "list"] = "mapping" if isinstance(event, yaml.MappingStartEvent) else "list"
            if event.anchor:
                self.anchors[event.anchor] = None
            self.open.append((Node(kind, self.place(event)), self.here(), event.anchor))
            self.key.append(None)
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            node, _, anchor = self.open.pop()
            self.key.pop()
            if anchor:
                self.anchors[anchor] = node
            self.attach(node, event)

    def awaits_key(self) -> bool:
        return bool(self.open) and self.open[-1][0].kind == "mapping" and self.key[-1] is None

    def check_tag(self, event: Any) -> None:
        if event.tag is not None:
            self.problems.append(
                Problem(self.place(event), self.here(), f"the tag {shown(event.tag)} is not allowed; write the plain value")
            )

    def alias(self, event: Any) -> None:
        name = event.anchor
        if name not in self.anchors:
            raise self.stop(event, f"the alias *{shown_key(name)} has no anchor &{shown_key(name)} before it")
        target = self.anchors[name]
        if target is None:
            raise self.stop(event, f"the alias *{shown_key(name)} holds itself; write the value out")
        if self.awaits_key():
            raise self.stop(event, "a key should be plain text, not an alias")
        if len(self.open) + target.height > MAX_DEPTH:
            raise self.stop(event, f"is nested more than {MAX_DEPTH} levels deep; no job file needs that")
        self.nodes += target.size - 1
        self.attach(target, event)

    def scalar(self, event: Any) -> None:
        text: str = event.value
        if bad := _CONTROL.search(text):
            self.problems.append(Problem(self.place(event), self.here(), f"holds the control character {bad[0]!a}; remove it"))
            text = _CONTROL.sub("?", text)
        if self.awaits_key():
            if text == "<<" and event.implicit[0]:
                raise self.stop(event, "the merge key << is not supported; write the keys out")
            self.key[-1] = (text, self.place(event))
            return
        node = Node("scalar", self.place(event), scalar=_resolve(text) if event.implicit[0] else text, raw=text)
        if isinstance(node.scalar, float) and not abs(node.scalar) < float("inf"):
            self.problems.append(Problem(self.place(event), self.here(), f"should be a finite number, not {shown_key(text)}"))
            node.scalar = None  # reported here, once
            node.raw = _REPORTED
        if event.anchor:
            self.anchors[event.anchor] = node
        self.attach(node, event)

    def attach(self, node: Node, event: Any) -> None:
        """Put a finished node into the collection that is open."""
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise self.stop(event, f"has more than {MAX_NODES:,} values once its aliases are expanded; make the file smaller")
        if not self.open:
            self.root = node
            return
        parent, path, _ = self.open[-1]
        parent.size += node.size
        parent.height = max(parent.height, node.height + 1)
        if parent.kind == "list":
            parent.items.append(node)
            return
        key = self.key[-1]
        assert key is not None
        self.key[-1] = None
        name, place = key
        if name in parent.entries:
            first = parent.entries[name][0]
            where = f", first on line {first.line}" if first.line else ""
            self.problems.append(Problem(place, join(path, name), f"is given twice{where}; keep one of them"))
            return
        parent.entries[name] = (place, node)


_REPORTED = "\x00reported"


def reported(node: Node) -> bool:
    """Whether the parser has said already what is wrong with this value."""
    return node.raw == _REPORTED


def join(path: str, key: str) -> str:
    return f"{path}.{shown_key(key)}" if path else shown_key(key)


def _resolve(text: str) -> Any:
    """The value of an unquoted scalar."""
    if text in _WORDS:
        return _WORDS[text]
    if len(text) > 64:
        return text
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _NOT_FINITE.fullmatch(text):
        return float("inf")
    return text


def _words_for(error: yaml.MarkedYAMLError, text: str) -> str:
    """A YAML error in plain words."""
    problem = error.problem or error.context or "cannot be read"
    mark = error.problem_mark or error.context_mark
    rows = text.split("\n")
    row = rows[mark.line] if mark and mark.line < len(rows) else ""
    char = row[mark.column : mark.column + 1] if mark else ""
    opened = f" (opened on line {error.context_mark.line + 1})" if error.context_mark else ""
    if "\t" in row[: len(row) - len(row.lstrip())] or char == "\t":
        return "a tab; YAML is indented with spaces only"
    if "cannot start any token" in problem:
        return f"text cannot begin with {char!a}; put it in quotes"
    if "mapping values are not allowed" in problem:
        return "not valid YAML: a ':' that cannot stand here; check the indentation, or put text with ': ' in quotes"
    if "end of stream" in problem and "scalar" in (error.context or ""):
        return f"not valid YAML: a quote is not closed{opened}; add the closing quote"
    if "',' or" in problem:
        return f"not valid YAML: a bracket is not closed or a comma is missing{opened}"
    if "expected key" in problem or "expected ':'" in problem or "expected <block end>" in problem:
        return "not valid YAML: expected 'key: value' here; check the colon and the indentation"
    return f"not valid YAML: {problem if problem.isprintable() else shown(problem)}"
