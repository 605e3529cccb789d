"""README and docs as a program reads them: fenced blocks, commands, links, quoted messages."""

from __future__ import annotations

import ast
import itertools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import typer

from hpc_cifar.cli.main import app

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^ *```(.*)$")
LINK = re.compile(r"(?<!!)!?\[(?:[^\]\[]|\[[^\]]*\]\([^)]*\))*\]\(([^)\s]+)\)")
PICTURE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} (.+)$")
VARYING = "…"  # what differs from case to case, in a quoted message


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs/results").glob("*.md"))]


@dataclass(frozen=True)
class Block:
    """A fenced block; ``words`` are those behind its three backticks."""

    page: str
    line: int
    words: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def split(page: Path) -> tuple[list[Block], list[tuple[int, str]]]:
    """The blocks of a page, and the lines outside of them by number."""
    name = str(page.relative_to(ROOT))
    blocks: list[Block] = []
    prose: list[tuple[int, str]] = []
    opened: tuple[int, tuple[str, ...], list[str]] | None = None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = FENCE.match(line)
        if fence and opened is None:
            opened = number, tuple(fence[1].split()), []
        elif fence and opened is not None:
            blocks.append(Block(name, opened[0], opened[1], "\n".join(opened[2]) + "\n"))
            opened = None
        elif opened is not None:
            opened[2].append(line)
        else:
            prose.append((number, line))
    assert opened is None, f"{name}: a block is not closed"
    return blocks, prose


def blocks(language: str) -> list[Block]:
    return [block for page in pages() for block in split(page)[0] if block.words[:1] == (language,)]


# ---- links -------------------------------------------------------------------------------------------------------------


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
    return re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-")


def anchors(page: Path) -> set[str]:
    found: set[str] = set()
    for _, line in split(page)[1]:
        if heading := HEADING.match(line):
            name, number = slug(heading[1]), 1
            while name in found:
                name, number = f"{slug(heading[1])}-{number}", number + 1
            found.add(name)
    return found


def links(page: Path) -> Iterator[tuple[int, str]]:
    """Targets of the links of a page, of pictures and of pictures in links too, but for those to other hosts."""
    prose = [(number, re.sub(r"`[^`]*`", "", line)) for number, line in split(page)[1]]
    for (number, line), (_, after) in zip(prose, [*prose[1:], (0, "")], strict=True):
        for pattern in (LINK, PICTURE):
            for found in pattern.finditer(f"{line} {after}"):  # the words of a link may go on in the next line
                if found.start() < len(line) and not re.match(r"[a-z]+:", found[1]):
                    yield number, found[1]


# ---- commands ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """``named``: in a sentence, where its arguments may be left out."""

    place: str
    words: tuple[str, ...]
    named: bool = False

    def __str__(self) -> str:
        return f"{self.place}: {shlex.join(self.words)}"


def commands(block: Block) -> Iterator[Command]:
    """The commands of a sh block, those in ``$(...)`` and behind ``&&`` as well, without comments and variables before them.

    Of a console block what was typed behind ``~/folder$``, also in a container (``box``).
    """
    for number, line in enumerate(block.text.replace("\\\n", "  ").splitlines(), block.line + 1):
        if block.words[:1] == ("console",):
            typed_there = re.match(r"~\S*\$ (?:box )?(.+)", line)
            if typed_there is None or typed_there[1].startswith(("git ", "alias ", "python3.11 ", "venv/")):
                continue
            line = typed_there[1]
        outer = re.sub(r"\$\([^)]*\)", "VALUE", line)
        for text in [*re.findall(r"\$\(([^)]*)\)", line), outer]:
            every = shlex.split(text, comments=True)
            for joined, words in itertools.groupby(every, lambda word: word in ("&&", "||", "|", ";")):
                one = list(itertools.dropwhile(lambda word: re.fullmatch(r"[A-Z_]+=.*", word), words))
                if not joined and one and one[0] not in ("export", "eval"):
                    yield Command(f"{block.page}:{number}", tuple(one))


def ours() -> list[Command]:
    """Every ``hpc-cifar`` command of the pages: in blocks, and in text where it is written out."""
    found = []
    for page in pages():
        inside, prose = split(page)
        found += [one for block in inside if block.words[:1] in (("sh",), ("console",)) for one in commands(block)]
        for number, line in prose:
            for span in re.findall(r"`([^`]+)`", line):
                if re.match(r"hpc-cifar [a-z-]", span):
                    found.append(Command(f"{page.relative_to(ROOT)}:{number}", tuple(shlex.split(span)), named=True))
    return [Command(one.place, words, one.named) for one in found if (words := typed(one.words))]


def typed(words: tuple[str, ...]) -> tuple[str, ...]:
    """What follows ``hpc-cifar``, or ``-m hpc_cifar`` of Python and torchrun; nothing if it is another program."""
    if words[0] == "hpc-cifar":
        return words[1:]
    for at, word in enumerate(words):
        if word == "hpc_cifar" and words[at - 1] == "-m":
            return words[at + 1 :]
    return ()


@cache
def _program() -> typer.core.TyperGroup:
    program = typer.main.get_command(app)
    assert isinstance(program, typer.core.TyperGroup)
    return program


def parsed(words: tuple[str, ...], named: bool = False) -> str:
    """Have the real application parse a command without running it; the command's name, such as ``bench data``.

    Raises:
        Exception: there is no such command or option, a value has the wrong form, or an argument is missing.
    """
    command, rest, names = _program(), list(words), []
    if rest[0].startswith("-"):  # of the program itself
        known = {name for option in command.params for name in option.opts} | set(command.context_settings["help_option_names"])
        if rest[0] not in known:
            raise ValueError(f"no such option: {rest[0]}")
        return ""
    context = command.make_context("hpc-cifar", list(rest))
    while isinstance(command, typer.core.TyperGroup):
        name, command, rest = command.resolve_command(context, rest)
        names.append(name)
        try:
            context = command.make_context(name, list(rest), parent=context)
        except Exception as error:
            if not (named and type(error).__name__ == "MissingParameter"):
                raise
    return " ".join(names)


def names_of_commands() -> set[str]:
    """``submit``, ``bench data``, ...."""
    found = set()
    for name, command in _program().commands.items():
        inner = getattr(command, "commands", {})
        found |= {f"{name} {other}" for other in inner} or {name}
    return found


# ---- messages ----------------------------------------------------------------------------------------------------------


@cache
def literals() -> tuple[str, ...]:
    """Every text in the package's source, with :data:`VARYING` for what an f-string fills in; what the scripts say as well."""
    found = []
    for path in sorted((ROOT / "hpc_cifar").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(part.value) if isinstance(part, ast.Constant) else VARYING for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    for path in sorted((ROOT / "scripts").glob("*.sh")):
        for quoted in re.findall(r'(?:fail|say) "([^"]*)"', path.read_text(encoding="utf-8")):
            found.append(re.sub(r"\$\([^)]*\)|\$\w+", VARYING, quoted))
    return tuple(found)


def occurs(message: str) -> bool:
    """Whether the program can print a message, as far as its fixed parts go: all of them stand in one text, in that order."""
    pattern = re.compile(".*".join(re.escape(part) for part in message.split(VARYING)), re.DOTALL)
    return any(pattern.fullmatch(text) for text in literals())
