"""No text commands a terminal; an output that is closed or full ends no command with a traceback, and no training at all."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from reported import EVALUATED, SCORES, left_behind

from hpc_cifar import files, terminal
from hpc_cifar.cli import evaluate, several
from hpc_cifar.cli import main as frame
from hpc_cifar.cli.console import epoch_line, facts
from hpc_cifar.errors import RunError
from hpc_cifar.runs import Run

EVIL = (
    *("\x1b[31m", "\x1b]52;c;ZXZpbA==\x07", "\x1b]0;title\x1b\\", "\x07", "\r", "\x08", "\x0c", "\x7f"),
    *("\x9b31m", "\x9d52;c;x\x9c"),
    *("\u202e", "\u2066", "\u200f", "\u2028", "\u0085", "\x00", "\ufeff", "\u061c", "\x1bP1$q\x1b\\", "\udc9b", "\U000e0041"),
)  # fmt: skip
ALL = "".join(EVIL)


def harmless(text: str) -> bool:
    return not [char for char in text if char not in "\n\t" and unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")]


@pytest.mark.parametrize("evil", EVIL)
def test_what_a_terminal_would_obey_is_shown(evil: str) -> None:
    for made in (terminal.escaped, terminal.one_line, terminal.of_log):
        assert harmless(made(f"a{evil}b")) and made(f"a{evil}b")[0] == "a" and made(f"a{evil}b")[-1] == "b"
    stream = io.StringIO()
    guarded = terminal.Guarded(stream, keeps_going=True)
    print(f"a{evil}b", file=guarded)  # type: ignore[call-overload]
    guarded.writelines([f"c{evil}d"])
    assert harmless(stream.getvalue())


def test_ordinary_text_is_left_as_it_is() -> None:
    text = "Überläufer\t日本語 🙂 naïve\nvalidation accuracy 91.2 %\n"
    assert terminal.escaped(text) == text == terminal.of_log(text)
    assert terminal.of_log("\x1b[1;31mred\x1b[0m 10 %\r20 %\r\nend\n") == "red 10 %\n20 %\nend\n"
    assert terminal.one_line("a\r\nb\tc\nd") == "a b c d"


def hostile(root: Path) -> Run:
    """A finished run with such text in each of its fields that hold text."""
    run = left_behind(root)
    spoilt: dict[str, Any] = {
        "reason": f"why{ALL}\nrun2: finished",
        "host": f"n1{ALL}",
        "data": f"digits{ALL}",
        "device": f"cpu{ALL}",
    }
    run.update_state(**{**spoilt, "state": "failed"})
    files.write_json(run.result_file, {**files.read_object(run.result_file), **spoilt, "state": "failed"})
    run.add_job(executor="train", job_id=f"7{ALL}", cluster=f"c{ALL}", host=f"n1{ALL}")
    files.append_json_line(run.metrics_file, {"kind": "event", "event": f"e{ALL}", "reason": f"r{ALL}", "epoch": 1, "step": 1})
    files.append_json_line(run.path / "failures.jsonl", {"reason": f"f{ALL}", "segment": f"s{ALL}", "rank": 0})
    where = files.read_json(run.path / "provenance.json") or {}
    files.write_json(run.path / "provenance.json", {**where, "command": [f"hpc{ALL}", f"--x{ALL}"], "host": f"h{ALL}"})
    (run.path / "evaluation").mkdir(exist_ok=True)
    evaluated = EVALUATED | {"per_class": {f"cat{ALL}": SCORES, "dog": SCORES}}
    files.write_json(run.path / "evaluation" / "evaluation.json", evaluated)
    return run


COMMANDS = (
    *(["status"], ["status", "RUN"], ["status", "RUN", "--json"], ["list"], ["list", "--campaign", ALL], ["wait", "RUN"]),
    *(["cancel", "RUN"], ["logs", "RUN"], ["logs", "RUN", "-f"], ["report", "RUN", "--format", "md"], ["status", f"x{ALL}"]),
    *(["report", "RUN", "--format", "json"], ["report", "RUN", "--format", "csv"], ["resume", f"y{ALL}"]),
    ["submit", f"z{ALL}"],
    *(["validate", f"v{ALL}"], ["evaluate", f"w{ALL}"], ["sync", f"s{ALL}"], ["train", f"t{ALL}"], ["prepare", f"p{ALL}"]),
    [f"c{ALL}"],
    *(["jobs"], ["export", f"e{ALL}"], ["drill", f"d{ALL}"], ["bench", "step", f"b{ALL}"], ["init", "--partition", ALL]),
    ["logs", ALL],
    *(["submit", "quickstart-digits", "--cluster", ALL], ["submit", "quickstart-digits", "--set", f"name={ALL}"]),
    ["status", f"--{ALL}"],
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: ascii(" ".join(words))[:40])
def test_no_command_passes_on_what_a_terminal_would_obey(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HPC_CIFAR_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("HPC_CIFAR_DATA", str(tmp_path / "data"))
    run = hostile(tmp_path / "runs")
    run.submitit.mkdir(exist_ok=True)
    run.add_job(executor="local", job_id="9", host="elsewhere")
    (run.submitit / "9_0_log.out").write_bytes(ALL.encode(errors="surrogateescape") + b"\xff\x9b31m" + b"\xc2\x9b31m\nend\n")
    frame.main([run.id if word == "RUN" else word for word in command])
    said = capsys.readouterr()
    assert harmless(said.out), ascii(said.out)
    assert harmless(said.err), ascii(said.err)
    assert "unexpected" not in said.err and "Traceback" not in said.err
    if command[:1] == ["wait"]:
        assert len(said.out.splitlines()) == 1, "a reason adds no line of its own"


def test_figures_and_lines_of_people_are_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    result = {**EVALUATED, "run": f"r{ALL}", "data": f"d{ALL}", "top5_accuracy": 1.0, "loss": 1.0}
    result |= {
        "macro": SCORES,
        "per_class": {f"cat\n{ALL}": SCORES},
        "most_confused": [{"pair": [f"a{ALL}", "b"], "images": 1}],
    }
    with terminal.guarded(keeps_going=True):
        for line in evaluate.lines_of(result):
            print(line)
        facts(f"t{ALL}", [(f"n{ALL}", f"v\n{ALL}")])
        print(epoch_line({"epoch": f"1{ALL}"}, 5), several.counts([]))
    assert harmless(capsys.readouterr().out)


def test_an_error_from_anywhere_is_escaped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for error in (RunError(f"a{ALL}b"), ValueError(f"c{ALL}d"), OSError(28, f"full{ALL}", f"name{ALL}")):

        def fail(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr(frame, "app", fail)
        frame.main(["status"])
        said = capsys.readouterr().err
        assert harmless(said) and len(said.splitlines()) == 1


def test_own_sequences_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.guarded(keeps_going=False):
        terminal.draw("\r\x1b[Kline")
        terminal.console().print(f"x{ALL}", markup=False, highlight=False)
    out = capsys.readouterr().out
    assert out.startswith("\r\x1b[Kline") and harmless(out.removeprefix("\r\x1b[K"))


# ---- an output that is closed or full ------------------------------------------------------------------------------------

QUIET = (
    ["status"],
    ["list"],
    ["jobs"],
    ["schema"],
    ["--help"],
    ["--version"],
    ["validate", "quickstart"],
    ["report", "last"],
    ["logs"],
)
QUIET += (
    ["wait"],
    ["submit", "quickstart-digits", "--dry-run", "--cluster", "local"],
    ["bench", "--help"],
    ["nonsense"],
    ["cancel", "last"],
)


def typed(command: list[str], redirected: str, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HPC_CIFAR_RUNS": str(folder / "runs"), **more}
    words = ["bash", "-c", f'"$@" {redirected}', "bash", sys.executable, "-m", "hpc_cifar", *command]
    return subprocess.run(words, env=environment, cwd=folder, stderr=subprocess.PIPE, text=True, timeout=120, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("command", QUIET, ids=" ".join)
@pytest.mark.parametrize("redirected", [">&-", "> /dev/full", ">&- 2>&-", "> /dev/full 2>&1", "<&- >&- 2>&-"])
def test_commands_end_quietly(command: list[str], redirected: str, tmp_path: Path, digits_data: Path) -> None:
    left_behind(tmp_path / "runs")
    done = typed(command, redirected, tmp_path, HPC_CIFAR_DATA=str(digits_data))
    assert done.returncode in (0, 1, 2), done
    assert "Traceback" not in done.stderr and "unexpected" not in done.stderr and "Exception ignored" not in done.stderr
    if "full" in redirected and "2>&1" not in redirected and done.returncode == 1:
        assert len(done.stderr.splitlines()) <= 1
    if redirected == ">&-" and command != ["nonsense"]:
        assert done.stderr.count("\n") <= (done.returncode != 0)


@pytest.mark.slow
@pytest.mark.parametrize("redirected", [">&-", "> /dev/full", "> /dev/full 2>&1", "| head -0"])
def test_training_goes_on_whatever_becomes_of_its_output(redirected: str, tmp_path: Path, digits_data: Path) -> None:
    piped = redirected.startswith("|")
    if piped:
        redirected = "| head -0; exit ${PIPESTATUS[0]}"
    done = typed(["train", "quickstart-digits", "--max-steps", "5"], redirected, tmp_path, HPC_CIFAR_DATA=str(digits_data))
    assert done.returncode == 0, done.stderr
    [state] = [files.read_json(path) for path in (tmp_path / "runs").glob("*/state.json")]
    assert state and state["state"] == "stopped" and state["step"] == 5


def test_a_stream_that_fails_once_never_fails_again() -> None:
    full = Path("/dev/full").open("w", encoding="utf-8")  # noqa: SIM115
    guarded = terminal.Guarded(full, keeps_going=True)
    for _ in range(3):
        print("x" * 100_000, file=guarded)  # type: ignore[call-overload]
        guarded.flush()
    assert guarded.lost is not None and guarded.lost.strerror == "No space left on device"
    full.close()
    print("y", file=guarded)  # type: ignore[call-overload]


def test_a_closed_stream_gets_no_file_of_ours(tmp_path: Path) -> None:
    """The next file that is opened would have its number, and what a library prints would be in that file."""
    code = (
        "from hpc_cifar import terminal; terminal.open_missing(); import os, sys\n"
        f"f = open({str(tmp_path / 'kept')!r}, 'w'); os.write(1, b'of a library'); print('x')\n"
        "f.write('ours'); assert f.fileno() > 2"
    )
    subprocess.run(["bash", "-c", '"$@" <&- >&- 2>&-', "bash", sys.executable, "-c", code], check=True)
    assert (tmp_path / "kept").read_text() == "ours"


@pytest.mark.parametrize(
    "command", [["status"], ["list"], ["submit", "quickstart"], ["train", "quickstart"], ["jobs"], ["prepare"], ["logs"]]
)
def test_a_working_folder_that_is_gone_is_one_line(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Path.cwd()
    gone = tmp_path / "gone"
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    try:
        assert frame.main(command) == 2
    finally:
        os.chdir(before)
    said = capsys.readouterr().err
    assert (
        said == "hpc-cifar: error: the working folder cannot be used: it has been removed; change to another one, as by: cd ~\n"
    )


# ---- large logs -----------------------


PEAK = """
import sys
from hpc_cifar.cli.main import main
code = main(sys.argv[1:])
line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:"))  # ru_maxrss is that of the parent, too
print(line.split()[1], file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize("flags", [[], ["-f"], ["--raw"]])
def test_of_a_log_of_30_gb_the_end_is_read(flags: list[str], tmp_path: Path) -> None:
    run = left_behind(tmp_path / "runs")
    run.submitit.mkdir(exist_ok=True)
    run.add_job(executor="local", job_id="9", host="elsewhere")
    log = run.submitit / "9_0_log.out"
    with log.open("wb") as stream:
        stream.write(b"first\n")
        stream.seek((30 << 30) - 2_000_000)
        stream.write((b"line of text\n" * 150_000)[-1_900_000:] + b"last")
    done = subprocess.run(
        [sys.executable, "-c", PEAK, "logs", run.id, *flags],
        env={**os.environ, "HPC_CIFAR_RUNS": str(tmp_path / "runs")}, capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    *said, peak_kib = done.stderr.splitlines()
    assert done.returncode == 0 and done.stdout.rstrip("\n").endswith("last") and "first" not in done.stdout
    assert "9_0_log.out: without its first 30," in "".join(said) and "--all" in "".join(said)
    assert int(peak_kib) < 150_000


def test_pieces_of_a_log_are_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hpc_cifar.launch import control

    text = "".join(f"{number} é日 {'x' * (number % 700)}\n" for number in range(500)) + "no end"
    (tmp_path / "log").write_text(text)
    monkeypatch.setattr(control, "PIECE", 1000)
    assert "".join(control.log_pieces(tmp_path / "log")) == text
    monkeypatch.setattr(control, "MOST_SHOWN", 5000)
    begin = control.log_begin(tmp_path / "log")
    shown = "".join(control.log_pieces(tmp_path / "log", begin))
    assert text.endswith(shown) and 4000 < len(shown.encode()) <= 5000 and text[-len(shown) - 1] == "\n"


# ---- numbers ---------------------


@pytest.mark.parametrize(
    "command",
    [
        ["submit", "quickstart-digits", "--seeds", "1000000000"],
        ["submit", "quickstart-digits", "--kfold", "1000000000"],
        ["submit", "quickstart-digits", "--seeds", "9999", "--kfold", "9"],
        ["submit", "quickstart-digits", "--nodes", "9" * 30],
        ["submit", "quickstart-digits", "--array-limit", "9" * 30],
        ["submit", "quickstart-digits", "--gpus-per-node", "9" * 30],
        ["submit", "quickstart-digits", "--max-gpu-hours", "nan"],
        ["submit", "quickstart-digits", "--max-gpu-hours=nan"],
        ["submit", "quickstart-digits", "--max-gpu-hours", "inf"],
        ["status", "--every", "nan"],
        ["status", "--every", "1e300"],
        ["train", "quickstart-digits", "--max-steps", "9" * 40],
        ["bench", "data", "--rounds", "9" * 20],
        ["bench", "step", "quickstart-digits", "--steps", "9" * 20],
        ["bench", "step", "quickstart-digits", "--world-size", "²"],
        ["bench", "step", "quickstart-digits", "--world-size", "999999999"],
        ["bench", "checkpoint", "quickstart-digits", "--rounds", "9" * 20],
        ["drill", "quickstart-digits", "--seed", "9" * 40],
        ["evaluate", "last", "--image", "9" * 40],
        ["logs", "--rank", "²"],
        ["logs", "--rank", "9" * 40],
        ["submit", "quickstart-digits", "--seeds", "²"],
    ],
    ids=lambda words: " ".join(words)[:60],
)
def test_numbers_have_bounds(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert frame.main(command) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "unexpected" not in said


@pytest.mark.parametrize("text", ["²", "٣", "-1", "", " 1", "1.0", "9" * 19, "9" * 5000, "0x1", "1_0"])
def test_only_plain_digits_are_a_number(text: str) -> None:
    assert files.whole(text) is None
    assert files.whole("0042") == 42


def test_json_of_status_stays_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HPC_CIFAR_RUNS", str(tmp_path / "runs"))
    run = hostile(tmp_path / "runs")
    assert frame.main(["status", run.id, "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert row["run"] == run.id
