"""Keys, tokens and passwords in text: blanked before the text is kept or shown; and the names that variables with them have.

All of it takes time in proportion to the text. What a name of a secret is given is blanked, whatever it looks like, and what
looks like a key of a known service, wherever it stands; code that only reads a secret stays.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections.abc import Sequence

BLANK = "***"
SHORTEST = 8  # of a value of this process's environment that is blanked everywhere

_WORDS = frozenset(
    {"password", "passwd", "passphrase", "passcode", "passwort", "secret", "credential", "apikey", "authorization"}
)
_ENDS: tuple[str, ...] = (
    "password",
    "passwd",
    "passphrase",
    "secret",
    "apikey",
    "accesskey",
    "secretkey",
    "privatekey",
    "authkey",
    "authtoken",
)
_ENDS += ("apitoken", "accesstoken", "credentials")
_PAIRS = {("api", "key"), ("access", "key"), ("private", "key"), ("secret", "key"), ("auth", "key"), ("account", "key")}
_PAIRS |= {
    ("signing", "key"),
    ("encryption", "key"),
    ("ssh", "key"),
    ("license", "key"),
    ("connection", "string"),
    ("storage", "key"),
}
_LAST = frozenset({"token", "jwt", "pat", "bearer", "webhook", "dsn", "cookie", "auth"})  # as the last word of a name
_ABOUT = frozenset(
    {"file", "files", "path", "dir", "folder", "len", "length", "count", "size", "policy", "prompt", "name", "names"}
)
_ABOUT |= {"type", "field", "fields", "regex", "pattern", "sock", "socket", "env", "var", "variable", "words", "method"}
_OF_LANGUAGE = frozenset(
    {"pad", "eos", "bos", "unk", "mask", "cls", "sep", "next", "special", "start", "end", "stop", "word", "num"}
)
_FOR_SORTING = frozenset(
    {"sort", "primary", "foreign", "public", "cache", "group", "partition", "order", "index", "unique", "dict"}
)
_NO_KEYS = ("monkey", "hotkey", "turkey", "wckey")  # the last one is Slurm's name for a workload
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_PART = re.compile(r"[A-Za-z]+")

_NAME = re.compile(
    r"(?<![\w-])(?P<name>-{0,2}+[A-Za-z_][\w-]*+)[\\\"'\])]{0,4}+[ \t]{0,20}+"
    r"(?:(?::[ \t]*+[A-Za-z_][\w\[\], .|\"']{0,80}?[ \t]*+)?=(?!=)|=>|:(?!:)|,(?=[ \t]*+[\"']))"
    r"[ \t]{0,80}+(?:[\\(\[{][ \t]*+\r?\n[+\- ]?[ \t]*+)?"
)
_FLAG = re.compile(r"(?<![\w-])--?(?P<name>[A-Za-z][\w-]*+)[ \t]++(?=[^\s-])")
_QUOTED = re.compile(
    r"(?P<open>[rbfuRBFU]{0,2}\\{0,2}(?P<quote>\"\"\"|'''|[\"']))(?P<text>(?:(?<=\"\"\")(?:(?!\"\"\").)*+|(?<=''')(?:(?!''').)*+"
    r"|(?:(?!(?P=quote))[^\\\n]|\\[^\n])*+))",
    re.S,
)
_PLAIN = re.compile(r"[^\s\"',;]++")
_REST = re.compile(r"[^\n\"']*+")
_CODE = re.compile(
    r"(?:None|True|False|null|true|false|str|bytes|int|bool|object|Any|Optional|self\.|args\.|os\.|\$\{?[A-Z_]|\$\()"
)
_CALL = re.compile(r"[A-Za-z_][\w.]*+[(\[]")
_SIMPLE = re.compile(r"[a-z_ .]{0,32}|[A-Z][a-z]*|.{0,5}")
_STOPS = frozenset(("a", "an", "and", "as", "for", "if", "in", "is", "of", "on", "or", "that", "the", "to", "with"))

_PEM = r"[A-Z ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
_LINE_OF_KEY = re.compile(  # a line of base64, as in the middle of a key
    r"(?m)(^[+\- ]?[ \t]*+)(?=[a-z0-9+/]*+[A-Z])(?=[A-Z0-9+/]*+[a-z])(?=[A-Za-z+/]*+[0-9])[A-Za-z0-9+/]{60,}={0,2}[ \t]*+\r?$"
)
_ASIS = [  # patterns that need no name: (pattern, what stays)
    (re.compile(rf"-----BEGIN {_PEM}.*?(?:-----END {_PEM}|\Z)", re.S), "*** private key ***"),
    (re.compile(r"(://)[^/\s:@\"'<>]*+:[^/\s@\"'<>]*+@"), r"\1***@"),
    (re.compile(r"(?i)(\bhttps?://)[^/\s@\"'<>]++@"), r"\1***@"),
    (re.compile(r"(?i)(\blogin[ \t]+\S{1,200}[ \t\r\n+\-]{1,9}password[ \t]+)\S+"), r"\1***"),
    (re.compile(r"(?im)(^[+\- ]?[ \t]*password[ \t]+)\S+(?=[ \t]*\r?$)"), r"\1***"),
    (re.compile(r"(?i)(\bmachine[ \t]+\S{1,200}[ \t]+password[ \t]+)\S+"), r"\1***"),
    (re.compile(r"(?i)(\bset(?:env|x)[ \t]+\w{0,80}(?:key|token|secret|passw(?:or)?d|pass)[ \t]+)[^\s$]\S*"), r"\1***"),
    (re.compile(r"(?i)(\bwandb[ \t]+login[ \t]+(?:--[\w-]+[ \t]+)*)[^\s-][^\s\"']{19,}"), r"\1***"),
    (re.compile(r"((?<=\s)(?:-u|--user)[ =][\"']?[^\s:\"']{1,200}:)[^\s\"']+"), r"\1***"),
    (re.compile(r"\beyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{5,}(?:\.[A-Za-z0-9_-]*)?"), BLANK),
    (re.compile(r"\b(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{12,}"), BLANK),
    (_LINE_OF_KEY, r"\1***"),
]  # fmt: skip
_BEARER = re.compile(r"(?i)(\b(?:bearer|basic)[ \t]+)([A-Za-z0-9._~+/=-]{6,})")
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])((?:hf|api_org|gh[pousr]|github_pat|wandb_v\d+|npm|dckr_pat|dckr_oat|[srp]k_(?:live|test)|rk_live|dop_v1|gsk|r8"
    r"|shp[a-z]{2}|lin_api|tfp|secret)_|gl(?:pat|dt|rt|cbt|ptt|oas|ft|imt|agent|soat)-|sk-|xox[a-z](?:\.xox[a-z])?-|xapp-|AIza|ya29\."
    r"|pypi-|nvapi-|tvly-|dapi|SG\.|hvs\.|AGE-SECRET-KEY-|ATATT3|figd_|local-)([A-Za-z0-9_.=-]{12,})"
)


def parts(name: str) -> list[str]:
    """The words of an identifier, in lower case: ``api``, ``key`` of ``apiKey`` or ``API_KEY_2``."""
    return [word.lower() for word in _PART.findall(_HUMP.sub("_", name).replace("_", " "))]


@functools.lru_cache(maxsize=4096)
def names_a_secret(name: str) -> bool:
    """Whether a variable, field or option of this name holds a key, token or password for certain."""
    words = parts(name[-200:])
    if not words or words[-1] in _ABOUT:
        return False
    single = [word if word.endswith("ss") else word.removesuffix("s") for word in words]
    if any(word in _WORDS for word in single) or any(pair in _PAIRS for pair in itertools.pairwise(single)):
        return True
    if words[-1].endswith(_ENDS) or (words[-1] == "pwd" and len(words) > 1) or words[-1] in ("pgpassword", "passwd"):
        return True
    return words[-1] in _LAST and not (len(words) > 1 and words[-2] in _OF_LANGUAGE) and words != ["auth"]


@functools.lru_cache(maxsize=4096)
def may_name_a_secret(name: str) -> bool:
    """Whether a variable of this name usually holds one, so that it has no place in a file that others read."""
    words = parts(name[-200:])
    if names_a_secret(name):
        return True
    last = words[-1] if words else ""
    before = words[-2] if len(words) > 1 else ""
    is_key = last.endswith(("key", "keys")) and last not in _NO_KEYS
    return (is_key and before not in _FOR_SORTING) or (
        last in ("pass", "pw", "token", "tokens", "pin", "cookies") and len(words) > 1
    )


def holds_a_secret(text: str) -> bool:
    """Whether there is one in a line of shell or an option; what is only named by a variable is not in it."""
    plain = re.sub(r"\$\{?\w+\}?|\$\([^)]*\)", "$X", text)
    return redact(plain, known=()) != plain or any(
        may_name_a_secret(found["name"]) and _literal(plain[found.end() :]) for found in _NAME.finditer(plain)
    )


def _literal(text: str) -> bool:
    found = _PLAIN.match(text.lstrip("\"'"))
    return found is not None and not found[0].startswith(("$", "`", "/", "~", "."))


def redact_words(words: Sequence[str]) -> list[str]:
    """A command line, word by word: also of an option and its value in the next word."""
    told = []
    for number, word in enumerate(words):
        before = words[number - 1] if number else ""
        hidden = before.startswith("-") and "=" not in before and names_a_secret(before) and not word.startswith("-")
        told.append(BLANK if hidden else redact(word))
    return told


def redact_beginning(text: str, limit: int) -> tuple[str, bool]:
    """The first ``limit`` characters at most, redacted, and whether that is not all; the cut leaves no half of a secret."""
    if len(text) <= limit:
        return redact(text), False
    kept = text[:limit]
    end = kept.rfind("\n")
    if end < 0:  # one long line: up to its last blank
        end = max(kept.rfind(" "), kept.rfind("\t"), 0)
    return (redact(kept[:end]) if end else f"({len(text):,} characters without a blank)"), True


def redact(text: str, known: Sequence[str] | None = None) -> str:
    """``text`` with anything that looks like a key, token or password blanked.

    Args:
        known: secrets that are blanked wherever they stand; those in this process's environment if None.
    """
    for value in of_environment() if known is None else known:
        text = text.replace(value, BLANK)
    for pattern, replacement in _ASIS:
        text = pattern.sub(replacement, text)
    text = _BEARER.sub(lambda found: found[0] if re.fullmatch("[a-z]+[.]?", found[2]) else found[1] + BLANK, text)
    text = _TOKEN.sub(_token, text)
    return _assigned(_assigned(text, _NAME), _FLAG)


def of_environment() -> list[str]:
    """Values of the variables of this process that are named like secrets, longest first."""
    found = {value for name, value in os.environ.items() if len(value) >= SHORTEST and names_a_secret(name) and value[0] != "/"}
    return sorted(found, key=len, reverse=True)


def _token(found: re.Match[str]) -> str:
    rest = found[2]
    plain = not any(char.isdigit() or char.isupper() for char in rest)
    return found[0] if plain and (len(rest) < 20 or "_" in rest or "-" in rest) else BLANK


def _assigned(text: str, pattern: re.Pattern[str]) -> str:
    """Blank the values that names of secrets are given."""
    told, done = [], 0
    at = 0
    while (found := pattern.search(text, at)) is not None:
        at = found.end()
        name = found["name"]
        certain = names_a_secret(name)
        if not certain and not may_name_a_secret(name):
            continue
        quoted = _QUOTED.match(text, at)
        if quoted is not None:
            value, begin, end = quoted["text"], quoted.end("open"), quoted.end()
        else:
            plain = (_REST if parts(name) == ["authorization"] else _PLAIN).match(text, at)
            if plain is None:
                continue
            value, begin, end = plain[0], plain.start(), plain.end()
        if value and _hidden(value, certain, quoted is not None, pattern is _FLAG):
            told += [text[done:begin], BLANK]
            done = at = end
    told.append(text[done:])
    return "".join(told)


def _hidden(value: str, certain: bool, quoted: bool, flag: bool) -> bool:
    if value.startswith(BLANK):
        return value.strip("*)]}") != ""
    if flag and value.lower().strip(".,)") in _STOPS:
        return False
    if not quoted:
        return certain and not _CODE.match(value) and not _CALL.match(value) and not re.fullmatch(r"[\d.]{1,5}", value)
    return certain or not _SIMPLE.fullmatch(value)
