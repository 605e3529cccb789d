"""Play cases on a site and gather findings.

``python tests/fuzz/fuzz_play.py --cases 3000 --package FOLDER --out findings.json`` tries the package in FOLDER;
``--only NUMBER`` plays one case again and shows what it printed; ``--commands`` plays them as processes of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import fuzz_damage  # noqa: E402
from fuzz_cases import Case, case  # noqa: E402
from fuzz_judge import Finding, Outcome, judge  # noqa: E402
from fuzz_site import CAMPAIGN, Fuzzed  # noqa: E402

LIGHT_S, HEAVY_S, COMMAND_S = 5.0, 40.0, 90.0
MEMORY_MIB = 1024
SHOWN = 200_000


def peak_mib(pid: int) -> int:
    """The most memory that a process has held; 0 of one that has ended."""
    with contextlib.suppress(OSError):
        if found := re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text()):
            return int(found[1]) // 1024
    return 0


class Worker:
    """One ``fuzz_worker``; begun anew where it has died."""

    def __init__(self, site: Fuzzed, kind: str) -> None:
        self.site, self.kind = site, kind
        self.process: subprocess.Popen[str] | None = None

    def _started(self) -> subprocess.Popen[str]:
        if self.process is None or self.process.poll() is not None:
            here = Path(__file__).with_name("fuzz_worker.py")
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(
                [sys.executable, str(here), self.kind], stdin=pipe, stdout=pipe, text=True, env=self.site.environment
            )
            assert self.process.stdout is not None
            self.process.stdout.readline()
        return self.process

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        print(json.dumps(order), file=process.stdin, flush=True)
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the {self.kind} worker has ended: {process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        if self.process is not None:
            assert self.process.stdin is not None and self.process.stdout is not None
            self.process.stdin.close()
            self.process.wait(60)
            self.process.stdout.close()


@dataclass
class Played:
    """A case with what was done to the file, and what was wrong."""

    case: Case
    damage: str
    words: str
    outcome: Outcome
    findings: list[Finding] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {
            "case": self.case.number,
            "file": str(self.case.file),
            "damage": f"{self.damage}: {self.words}",
            "command": " ".join(self.case.argv),
            "findings": [asdict(one) for one in self.findings],
        }


class Player:
    """Damages, runs a command, puts everything back, judges."""

    def __init__(self, site: Fuzzed, seed: int = 0) -> None:
        self.site, self.seed = site, seed
        self.workers = {kind: Worker(site, kind) for kind in ("light", "heavy")}
        self.out, self.err = site.here.parent / "out", site.here.parent / "err"
        self.before: dict[tuple[str, ...], Outcome] = {}
        self.stamps: dict[str, tuple[int, ...]] = {}

    def make(self, data: Path | None = None, *, weights: bool = False) -> None:
        self.site.make(self.succeed, data, weights=weights)
        self.stamps = dict(self._look())
        listed = self.run(Case(0, Path(), None, ("list", "--campaign", CAMPAIGN), None, ""), False)
        if listed.code != 0 or listed.err or "damaged" in listed.out:
            raise RuntimeError(f"the site is not as a user's: {listed.out}\n{listed.err}")

    def succeed(self, argv: list[str]) -> None:
        """Run a command in the heavy worker, where it starts at once."""
        outcome = self.run(Case(0, Path(), None, tuple(argv), None, ""), False)
        if outcome.code != 0:
            raise RuntimeError(f"{argv}: {outcome.code}\n{outcome.out}\n{outcome.err}")

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()

    # ---- the site

    def _look(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every file of the site, with what changes when it is written, and every folder."""
        pending = [str(self.site.here)]
        while pending:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        if entry.name != "code":
                            pending.append(entry.path)
                            yield entry.path, ()
                        continue
                    facts = entry.stat(follow_symlinks=False)
                    yield entry.path, (facts.st_ino, facts.st_size, facts.st_ctime_ns, facts.st_mode)

    def fix(self) -> None:
        """Put back what was damaged, and what the command changed."""
        now = dict(self._look())
        for path in now.keys() - self.stamps.keys():
            if now[path]:
                Path(path).unlink(missing_ok=True)
            else:
                shutil.rmtree(path, ignore_errors=True)
        for path, stamp in self.stamps.items():
            if stamp and now.get(path) != stamp:
                here = Path(path)
                fuzz_damage.restore(self.site.pristine / here.relative_to(self.site.here), here)
                facts = here.lstat()
                self.stamps[path] = (facts.st_ino, facts.st_size, facts.st_ctime_ns, facts.st_mode)
        self.site.told.write_text("")

    # ---- commands

    def run(self, one: Case, as_process: bool) -> Outcome:
        limit_s = COMMAND_S if as_process else HEAVY_S if one.heavy else LIGHT_S
        later = (one.later, str(self.site.here / one.file)) if one.later is not None else None
        if as_process:
            facts = self._process(one.argv, limit_s, later, one.heavy)
        else:
            facts = self.workers["heavy" if one.heavy else "light"].ask(
                {
                    "argv": one.argv,
                    "environment": self.site.environment,
                    "folder": str(self.site.work),
                    "limit_s": limit_s,
                    "memory_mib": MEMORY_MIB,
                    "out": str(self.out),
                    "err": str(self.err),
                    "later": later,
                }
            )
        texts = []
        for path in (self.out, self.err):
            with path.open("rb") as stream:
                texts.append(stream.read(20 * 2**20).decode(errors="replace"))
        words = tuple(self.site.told.read_text(errors="replace").splitlines())
        names = ("code", "signal", "hung", "seconds", "grown_mib")
        return Outcome(**{name: facts[name] for name in names}, out=texts[0], err=texts[1], cancelled=words)

    def _process(self, argv: Sequence[str], limit_s: float, later: tuple[float, str] | None, heavy: bool) -> dict[str, Any]:
        began = time.monotonic()
        with self.out.open("wb") as out, self.err.open("wb") as err:
            child = subprocess.Popen(
                [sys.executable, "-m", "hpc_cifar", *argv],
                cwd=self.site.work,
                env=self.site.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        if later:
            time.sleep(later[0] * 10)
            with contextlib.suppress(OSError):
                Path(later[1]).unlink()
        watched, most = os.pidfd_open(child.pid), 0
        # ru_maxrss would be that of this process, which the child was a copy of
        while not select.select([watched], [], [], 0.05)[0] and time.monotonic() - began < limit_s:
            most = max(most, peak_mib(child.pid))
        hung = not select.select([watched], [], [], 0)[0]
        os.close(watched)
        if hung:
            child.kill()
        _, status = os.waitpid(child.pid, 0)
        ended = os.waitstatus_to_exitcode(status)
        child.returncode = ended
        return {
            "code": ended if ended >= 0 else None,
            "signal": None if ended >= 0 or hung else -ended,
            "hung": hung,
            "seconds": round(time.monotonic() - began, 3),
            "grown_mib": max(0, most - (900 if heavy else 150)),
        }

    def undamaged(self, one: Case, as_process: bool) -> Outcome:
        if one.argv not in self.before:
            calm = Case(one.number, one.file, one.run, one.argv, None, one.seed)
            self.before[one.argv] = self.run(calm, as_process)
            self.fix()
        return self.before[one.argv]

    def play(self, number: int, as_process: bool = False) -> Played:
        one = case(self.site, number, self.seed)
        before = self.undamaged(one, as_process)
        damage, words = "deleted", f"after {one.later or 0:.3f} s"
        if one.later is None:
            damage, words = fuzz_damage.apply(self.site.here / one.file, one.random)
        try:
            outcome = self.run(one, as_process)
        finally:
            self.fix()
        return Played(one, damage, words, outcome, judge(one, damage, outcome, before))


def _general(words: str) -> str:
    """Words without what differs from case to case."""
    words = re.sub(r"/\S+", "PATH", words)
    words = re.sub(r"(fin|swept)-\w|running|cancelled|failed|requeued|element|stopped", "RUN", words)
    words = re.sub(r"\d[\d,._]*", "N", words)
    return re.sub(r"'[^']*'|\"[^\"]*\"", "'...'", words)[:140]


def distinct(played: Sequence[Played]) -> list[dict[str, Any]]:
    """Findings of one kind, file, command and words are one, with an example and how often it came."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for one in played:
        for finding in one.findings:
            words = finding.words
            if finding.kind.startswith(("a figure", "lines of", "a wrong", "an impossible")):
                words = re.sub(r"(: ).* is .*", "", words) if "in report" not in words else "report"
            file = re.sub(r"\d{4,}\w*-\w+|\d{8}", "N", one.case.file.name)
            key = (finding.kind, file, one.case.argv[0], _general(words))
            row = found.setdefault(
                key,
                {
                    "kind": finding.kind,
                    "file": file,
                    "command": one.case.argv[0],
                    "words": finding.words[:300],
                    "count": 0,
                    "damages": {},
                    "example": one.as_dict() | {"findings": None},
                },
            )
            row["count"] += 1
            row["damages"][one.damage] = row["damages"].get(one.damage, 0) + 1
            row["example"].pop("findings", None)
    return sorted(found.values(), key=lambda row: (row["kind"], -row["count"]))


def play_all(player: Player, numbers: Sequence[int], as_process: bool, until: float = float("inf")) -> list[Played]:
    done = []
    for number in numbers:
        if time.monotonic() > until:
            break
        done.append(player.play(number, as_process))
        if done[-1].findings and os.environ.get("HPC_CIFAR_FUZZ_SHOW"):
            print(json.dumps(done[-1].as_dict()), flush=True)
    return done


def summary(played: Sequence[Played], seconds: float, most_mib: int = 0) -> dict[str, Any]:
    kinds: dict[str, int] = {}
    for one in played:
        for finding in one.findings:
            kinds[finding.kind] = kinds.get(finding.kind, 0) + 1
    return {
        "cases": len(played),
        "cases_with_findings": sum(bool(one.findings) for one in played),
        "seconds": round(seconds, 1),
        "slowest_s": max((one.outcome.seconds for one in played), default=0.0),
        "most_grown_mib": max((one.outcome.grown_mib for one in played), default=0),
        "kinds": dict(sorted(kinds.items(), key=lambda pair: -pair[1])),
        "distinct": distinct(played),
    }


def hardware() -> str:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{len(os.sched_getaffinity(0))} cores of {model[1] if model else platform.machine()}, one used"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--package", type=Path, default=Path(__file__).resolve().parents[2])
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    parser.add_argument("--commands", action="store_true")
    parser.add_argument("--minutes", type=float, default=600.0)
    parser.add_argument("--site", type=Path, help="kept, and used again where it is there")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder = options.site or Path(tempfile.mkdtemp(prefix="hpc-cifar-fuzz-"))
    site = Fuzzed(folder, options.package)
    try:
        player = Player(site, options.seed)
        try:
            began = time.monotonic()
            player.make(weights=True)
            print(f"site: {time.monotonic() - began:.1f} s", file=sys.stderr)
            began = time.monotonic()
            if options.only is not None:
                one = player.play(options.only, options.commands)
                print(
                    json.dumps(one.as_dict(), indent=1), one.outcome.out[:5000], one.outcome.err[:5000], one.outcome, sep="\n"
                )
                return
            numbers = range(options.first, options.first + options.cases)
            played = play_all(player, numbers, options.commands, began + 60 * options.minutes)
            result = summary(played, time.monotonic() - began)
        finally:
            player.close()
    finally:
        site.close()
        if not options.site:
            shutil.rmtree(folder, ignore_errors=True)
    text = json.dumps(result, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    print(json.dumps({**result, "distinct": len(result["distinct"])}, indent=1))
    print(f"{hardware()}; rss {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} MiB", file=sys.stderr)


if __name__ == "__main__":
    main()
