"""The command line: one Typer application, one place where errors become a line and an exit code.

Nothing heavy is imported here or at the top of a command's module, so that ``hpc-cifar --help`` starts at once.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from .. import __version__, lifetime, owner, terminal
from ..errors import HpcCifarError, Interrupted, UsageError
from . import agent, bench, configure, control, data, doctor, drill, evaluate, init, report, submit, sync, train

# what these have begun, they finish, whether or not anybody still reads what they print
ACTING = frozenset(("train", "submit", "resume", "cancel", "prepare", "evaluate", "export", "sync", "drill", "bench", "init"))
HELP = """Train CIFAR-10-sized experiments on a Slurm cluster or on this machine.

One YAML file is one experiment; it becomes a resumable, distributed training run.
"""
EXAMPLES = """Examples:

\b
  hpc-cifar prepare cifar10                        find or download the data, once
  hpc-cifar submit quickstart --cluster local -f   train here and watch
  hpc-cifar submit deep300 --dry-run               plan, budget and sbatch script
  hpc-cifar status                                 what runs, what has finished
  hpc-cifar logs last -f                           the latest run's log
  hpc-cifar resume last                            continue from its checkpoint
  hpc-cifar report last                            one page: figures, curves, mistakes
  hpc-cifar sync last                              to Weights & Biases, afterwards
  torchrun --nproc-per-node 2 -m hpc_cifar train deep300 --max-steps 20
"""

app = typer.Typer(
    name="hpc-cifar",
    help=HELP,
    epilog=EXAMPLES,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help starts a tenth of a second earlier and reads well in a log
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

# Both of Click's lives, on its own and inside Typer, share this base class.
_ClickException: type[Exception] = next(
    base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException" and issubclass(base, Exception)
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hpc-cifar {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


app.command()(data.prepare)
app.command()(configure.validate)
app.command()(configure.schema)
app.command()(configure.jobs)
app.command()(init.init)
app.command()(doctor.doctor)
app.command()(submit.submit)
app.command(cls=agent.WithFields)(train.train)
app.command()(control.status)
app.command("list")(control.list_runs)
app.command()(control.logs)
app.command()(control.wait)
app.command()(control.cancel)
app.command()(control.resume)
app.command()(evaluate.evaluate)
app.command()(evaluate.export)
app.command()(sync.sync)
app.command()(report.report)
app.command()(drill.drill)
app.add_typer(bench.app, name="bench", short_help=bench.app.info.help)
for _one in (*app.registered_commands, *bench.app.registered_commands):
    # in lists of commands; else Click cuts what is longer than a line
    _one.short_help = " ".join((_one.callback.__doc__ or "").partition("\n\n")[0].split())


def _error(text: str) -> None:
    first, *rest = text.rstrip("\n").split("\n")
    print(f"hpc-cifar: error: {first}", *rest, sep="\n", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with terminal.guarded(keeps_going=bool(arguments) and arguments[0] in ACTING) as out:
        code = _run(arguments)
        with contextlib.suppress(BrokenPipeError):
            out.flush()
        return _with_output(code, out.lost, arguments)


def _with_output(code: int, lost: OSError | None, arguments: list[str]) -> int:
    """The exit code of a command some of whose output is lost: 1, unless it was there for more than that."""
    gone = isinstance(lost, BrokenPipeError)  # the reader has all that it wanted
    if lost is None or code or arguments[:1] == ["train"] or (gone and arguments[0] in ACTING):
        return code
    if not gone:
        _error(f"standard output: {lost.strerror or lost}; some of what the command printed is lost")
    return 1


def _run(arguments: list[str]) -> int:
    try:
        _check_folder()
        code = app(args=arguments or ["--help"], prog_name="hpc-cifar", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except HpcCifarError as error:
        _error(str(error))
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort, Interrupted) as error:
        with contextlib.suppress(OSError):  # the terminal may have gone with a HUP
            print("hpc-cifar: interrupted", file=sys.stderr)
        return error.exit_code if isinstance(error, Interrupted) else 130
    except BrokenPipeError:  # the reader has gone (``| head``)
        return 1
    except _ClickException as error:
        said = error.format_message() if hasattr(error, "format_message") else str(error)
        # the words of the checker inside Typer, for a text where a number is needed
        said = re.sub(r"Input should be a valid (\w+), unable to parse .*", r"should be a valid \1", said)
        said = re.sub(r" ?\(Possible options: (.*)\)", lambda found: f". Did you mean {_either(found[1])}?", said)
        _error(f"{said} (see: hpc-cifar {_command(arguments)}--help)")
        return int(getattr(error, "exit_code", 2))
    except Exception as error:
        if isinstance(error, OSError) and error.filename and error.strerror and not os.environ.get("HPC_CIFAR_DEBUG"):
            _error(f"{terminal.one_line(os.fsdecode(error.filename))}: {error.strerror}")  # such as a full disk
        else:
            _unexpected(error)
        return 1


def _unexpected(error: Exception) -> None:
    if os.environ.get("HPC_CIFAR_DEBUG"):
        traceback.print_exc()
        return
    text = str(error).strip().splitlines() or [""]
    _error(f"unexpected {type(error).__name__}: {text[0][:500]} (HPC_CIFAR_DEBUG=1 shows the traceback)")


def _either(names: str) -> str:
    return " or ".join(f"'{name}'" for name in names.split(", "))


def _command(arguments: list[str]) -> str:
    names = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    names |= {group.name or "" for group in app.registered_groups}
    return f"{arguments[0]} " if arguments and arguments[0] in names else ""


def _check_folder() -> None:
    """
    Raises:
        UsageError: the working folder has been removed; half of all paths mean nothing then.
    """
    try:
        Path.cwd()
    except OSError as error:
        words = "it has been removed" if isinstance(error, FileNotFoundError) else str(error.strerror)
        raise UsageError(f"the working folder cannot be used: {words}; change to another one, as by: cd ~") from None


def run() -> None:
    """Entry point of the ``hpc-cifar`` command."""
    owner.narrow_umask()
    lifetime.collect_rarely()
    code = main()
    lifetime.leave_soon(code)
    sys.exit(code)
