"""The documentation is true: YAML is valid, commands parse and run, links resolve, messages are those of the code."""

from __future__ import annotations

import ast
import contextlib
import io
import itertools
import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import documented
import pytest
import yaml
from documented import ROOT, Block, Command
from reported import FIELDS

from hpc_cifar import files, runs
from hpc_cifar.cli import agent as cli_agent
from hpc_cifar.cli import main as frame
from hpc_cifar.config.experiment import Experiment
from hpc_cifar.config.load import load_cluster, load_experiment, load_sweep
from hpc_cifar.config.packaged import cluster_files, find_job, job_files
from hpc_cifar.config.reference import markdown
from hpc_cifar.config.sweep import as_sets
from hpc_cifar.errors import ConfigError, UsageError

OTHER_PROGRAMS = {"awk", "wandb", "scontrol", "tensorboard", ".", "cp", "uv", "podman", "apptainer", "enroot", "git", "cd"}
SAMPLES = {"slurm/mine.yaml", "slurm/gpu.yaml", "jobs/mine.yaml", "jobs/NAME.yaml", "my-jobs/quickstart.yaml"}

# ---- YAML --------------------------------------------------------------------------------------------------------------


def merged(base: Any, part: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(part, dict)):
        return part
    return base | {key: merged(base.get(key), value) for key, value in part.items()}


def check_yaml(block: Block, folder: Path) -> None:
    """A block is what the word behind ``yaml`` says: a profile, a sweep, a part of an experiment; else an experiment."""
    path = folder / "block.yaml"
    path.write_text(block.text)
    match block.words[1:]:
        case ():
            load_experiment(path)
        case ("profile",):
            load_cluster(path)
        case ("sweep",):
            for corner in load_sweep(path).corners():
                load_experiment(find_job("quickstart"), as_sets(corner))
        case ("wandb",):  # a sweep of W&B: its command, at the first of its points
            sweep = yaml.safe_load(block.text)
            values = [f"--{name}={one.get('value') or one['values'][0]}" for name, one in sweep["parameters"].items()]
            filled = {"${program}": [sweep["program"]], "${args}": values}
            words = documented.typed(tuple(word for part in sweep["command"] for word in filled.get(part, [part])))
            assert documented.parsed(words) == "train"
            sets = cli_agent.as_sets(words[2:], {"--name", "--data"})
            load_experiment(find_job(words[1]), [word for word in sets if word != "--set"])
        case ("part",):
            part = yaml.safe_load(block.text)
            assert set(part) <= set(Experiment.model_fields)
            path.write_text(json.dumps(merged(yaml.safe_load(find_job("quickstart").read_text()), part)))
            load_experiment(path)
        case words:
            raise AssertionError(f"{block}: {words} says nothing about a YAML block")


@pytest.mark.parametrize("block", documented.blocks("yaml"), ids=str)
def test_yaml_is_valid(block: Block, tmp_path: Path) -> None:
    check_yaml(block, tmp_path)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((), "name: mine\nepochs: 3\n"),
        (("profile",), "partitions: gpu\n"),
        (("sweep",), "method: grid\nparameters: {optimizer.rate: [1, 2]}\n"),
        (
            ("wandb",),
            "program: hpc-cifar\nparameters: {epoch: {value: 3}}\ncommand: ['${program}', train, quickstart, '${args}']\n",
        ),
        (("part",), "data: {batchsize: 3}\n"),
        (("part",), "checkpoints: {every_steps: 3}\n"),
        (("snippet",), "name: mine\n"),
    ],
)
def test_yaml_that_is_wrong_is_noticed(words: tuple[str, ...], text: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, AssertionError)):
        check_yaml(Block("page", 1, ("yaml", *words), text), tmp_path)


def test_every_block_says_what_it_is() -> None:
    known = {"yaml", "sh", "python", "text", "console"}
    blocks = [block for page in documented.pages() for block in documented.split(page)[0]]
    assert [str(block) for block in blocks if block.words[:1] not in {(word,) for word in known}] == []
    for block in blocks:
        if block.words == ("python",):
            ast.parse(block.text)


def test_nothing_was_left_to_be_filled_in() -> None:
    lines = [(page, number, line) for page in documented.pages() for number, line in documented.split(page)[1]]
    assert [found for found in lines if re.fullmatch(r"\s*(?:[A-Z]{4,}|\.\.\.)\s*", found[2])] == []


def test_the_page_on_experiment_files_is_made_of_the_models() -> None:
    page = ROOT / "docs/experiments.md"
    assert page.read_text() == markdown(), "run: hpc-cifar schema --markdown -o docs/experiments.md"
    torn = [line for line in page.read_text().splitlines() if line.startswith("|") and not line.endswith("|")]
    assert torn == [], "a row of a table is one line"


# ---- commands ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", documented.ours(), ids=str)
def test_a_command_is_one_of_the_program(command: Command) -> None:
    documented.parsed(command.words, command.named)


@pytest.mark.parametrize(
    "words", [("--verbose",), ("submitt",), ("submit", "job", "--dryrun"), ("bench", "speed"), ("status", "--every", "x")]
)
def test_a_command_that_is_none_is_noticed(words: tuple[str, ...]) -> None:
    with pytest.raises(Exception, match=r"(?i)no such|valid"):
        documented.parsed(words)


def test_every_command_is_documented() -> None:
    written = {documented.parsed(command.words, command.named) for command in documented.ours()}
    assert documented.names_of_commands() - written == set()


@pytest.mark.parametrize("path", [*job_files(), *cluster_files()], ids=lambda path: path.stem)
def test_the_head_of_a_packaged_file_has_a_command_that_parses(path: Path) -> None:
    head = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    found = re.findall(r"hpc-cifar( submit \S+(?: --[a-z-]+(?: [\w./=-]+)?)*)", head)
    assert [documented.parsed(tuple(shlex.split(words))) for words in found if path.stem in words or "NAME" in words]


def other_commands() -> list[Command]:
    kinds = [*documented.blocks("sh"), *documented.blocks("console")]
    found = [command for block in kinds for command in documented.commands(block)]
    return [command for command in found if not documented.typed(command.words)]


@pytest.mark.parametrize("command", other_commands(), ids=str)
def test_other_commands_exist(command: Command) -> None:
    program, *words = command.words
    match program:
        case "make":
            assert words[0] in targets()
        case "python":
            check_script(words[0], words[1:])
        case "pip":
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            wanted = re.findall(r"[\w-]+", " ".join(re.findall(r"\[([^\]]*)\]", " ".join(words))))
            assert words[0] in ("install", "download", "wheel") and set(wanted) <= set(extras)
            assert all(
                (ROOT / name).is_file() or name == "rest.lock" for option, name in itertools.pairwise(words) if option == "-r"
            )
        case "pytest":
            named = [word for word in words if word.startswith("tests/")]
            assert named and all((ROOT / name).exists() for name in named)
        case _:
            assert program in OTHER_PROGRAMS


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def check_script(name: str, words: list[str]) -> None:
    """The script is there and has these verbs and options, by its source and that of what it imports from its folder."""
    if name == "-c":
        return
    script = ROOT / name
    waiting, known, seen = [script], set(), set()
    while waiting:
        path = waiting.pop()
        seen.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                known |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
            if isinstance(node, ast.Import | ast.ImportFrom):
                beside = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                paths = [script.parent / f"{module}.py" for module in beside]
                waiting += [other for other in paths if other.is_file() and other not in seen]
    options = {word.partition("=")[0] for word in words if word.startswith("--")} - {"--help"}
    assert options <= known, f"{name} has no {options - known}"
    if "add_subparsers" in script.read_text():
        assert words[0] in known


def test_targets_and_files_in_text_exist() -> None:
    missing = []
    for page in documented.pages():
        for number, line in documented.split(page)[1]:
            for span in re.findall(r"`([^`]+)`", line):
                place = f"{page.name}:{number}: {span}"
                if (made := re.match(r"(?:\w+=\S+ )*make ([a-z-]+)", span)) and made[1] not in targets():
                    missing.append(place)
                if re.match(r"python \S+\.py", span):
                    script, *words = span.split()[1:]
                    check_script(script, words)
                path = re.fullmatch(r"(?:hpc_cifar|jobs|slurm|docs|benchmarks|scripts|tests|my-jobs)/[\w./-]+\.\w+", span)
                if path and span not in SAMPLES and not (ROOT / span).exists() and "results" not in span:
                    missing.append(place)
                missing += [place for name in re.findall(r"HPC_CIFAR_[A-Z]+", span) if name not in variables()]
    assert missing == []


def variables() -> set[str]:
    sources = [
        *(ROOT / "hpc_cifar").rglob("*.py"),
        *(ROOT / "slurm").rglob("*.py"),
        *(ROOT / "tests/life").rglob("*.py"),
        ROOT / "Makefile",
        ROOT / "tests/conftest.py",
    ]
    return {name for path in sources for name in re.findall(r"HPC_CIFAR_[A-Z]+", path.read_text())}


# ---- commands that are run ---------------------------------------------------------------------------------------------

ARRAY = 8
JOBS = ("deep300", "ann-1", "ann-3", "quickstart", "quickstart-digits")


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder as the pages have it by then: job files, a profile, a sweep, a campaign of finished runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HPC_CIFAR_CLUSTER", "mine")
    monkeypatch.setenv("HPC_CIFAR_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("HPC_CIFAR_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("PATH", str(tmp_path))  # no Slurm
    for name in ("jobs", "slurm", "docs"):
        (tmp_path / name).mkdir()
    for name in JOBS:
        shutil.copy(find_job(name), tmp_path / "jobs")
    shutil.copy(find_job("quickstart"), tmp_path / "best.yaml")
    shutil.copy(ROOT / "slurm/profiles/gpu8.yaml", tmp_path / "slurm/mine.yaml")
    [sweep] = [block for block in documented.blocks("yaml") if block.words[1:] == ("sweep",) and "tracking" in block.page]
    (tmp_path / "sweep.yaml").write_text(sweep.text)
    for number in range(ARRAY):
        tracking = {"group": "table2" if number % 2 else "rates"}
        experiment = Experiment.model_validate({**FIELDS, "seed": number, "tracking": tracking})
        run = runs.create(
            tmp_path / "runs", f"fields-s{number}", experiment, {"batch_size": 64, "train_images": 128}, {"git": None}
        )
        run.add_job(executor="slurm", job_id=f"1234_{number}", tasks=1, gpus=0)
        run.submitit.mkdir()
        for rank in range(2):
            (run.submitit / f"1234_{number}_{rank}_log.out").write_text("epoch 1\n")
        row = {"kind": "epoch", "epoch": 1, "step": 2, "time": 1.0, "train_loss": 1.0, "val_loss": 1.0, "val_accuracy": 0.5}
        files.append_json_line(run.metrics_file, row)
        run.update_state(state="finished", epoch=1, epochs=1, step=2, seconds=3.0)
        files.write_json(run.result_file, {"state": "finished", "test_accuracy": 0.5, "epochs": 1, "seconds": 3.0, "steps": 2})
    return tmp_path


RUN = {"validate", "schema", "jobs", "status", "list", "logs", "wait", "cancel", "resume", "report", "submit"}
NOT_HERE = {"--wandb", "--evaluate"}  # need a server, or a trained network
SUBMITS = {"--follow", "-f", "--wait", "--json", "--parsable"}


def can_run(command: Command) -> bool:
    placeholders = any(re.search(r"\b[A-Z]{3,}\b|\.\.\.", word) for word in command.words)
    return command.words[0] in RUN and not command.named and not placeholders and not NOT_HERE & set(command.words)


def as_run(words: tuple[str, ...]) -> list[str]:
    """With shell patterns resolved; a ``submit`` is made a dry run, of what is submitted already it has nothing to wait for."""
    resolved = [path for word in words for path in (sorted(map(str, Path().glob(word))) if "*" in word else [word])]
    if words[0] != "submit":
        return resolved
    kept = [word for word in resolved if word not in SUBMITS]
    return [*kept, *([] if "--dry-run" in kept else ["--dry-run"])]


def test_commands_run(desk: Path) -> None:
    """In the order of the pages, each in this one folder; what another command would have made is there."""
    done: dict[tuple[str, ...], int] = {}
    problems = []
    for command in documented.ours():
        if not can_run(command) or command.words in done:
            continue
        for made in (*desk.glob("my-jobs/*"), desk / "slurm/gpu8.yaml", *desk.glob("runs.csv")):
            made.unlink(missing_ok=True)
        if "my-jobs/quickstart.yaml" in command.words:
            (desk / "my-jobs").mkdir(exist_ok=True)
            shutil.copy(find_job("quickstart"), desk / "my-jobs")
        if "best.yaml" in command.words and command.words[0] == "report":
            (desk / "best.yaml").unlink()
        code, said = run(as_run(command.words))
        done[command.words] = code
        if code != 0:
            problems.append(f"{command}: {code}\n{said}")
    assert problems == []
    assert {words[0] for words in done} == RUN and len(done) > 30


def run(words: list[str]) -> tuple[int, str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        return frame.main(words), out.getvalue()


def test_a_command_that_fails_is_noticed(desk: Path) -> None:
    code, said = run(["submit", "jobs/deep300.yaml", "--dry-run", "--max-gpu-hours", "1"])
    assert code == UsageError.exit_code and "GPU-hours" in said


# ---- links -------------------------------------------------------------------------------------------------------------


def test_links_resolve() -> None:
    broken = []
    for page in documented.pages():
        for number, target in documented.links(page):
            name, _, anchor = target.partition("#")
            path = (page.parent / name).resolve() if name else page
            if not path.exists() or (anchor and anchor not in documented.anchors(path)):
                broken.append(f"{page.relative_to(ROOT)}:{number}: {target}")
    assert broken == []


def test_every_page_is_reachable_from_the_readme() -> None:
    def reached(page: Path) -> Iterator[Path]:
        for _, target in documented.links(page):
            path = (page.parent / target.partition("#")[0]).resolve()
            if path.suffix == ".md" and path.is_file():
                yield path

    first = set(reached(ROOT / "README.md"))
    assert {page for page in documented.pages() if page.parent == ROOT / "docs"} <= first


@pytest.mark.parametrize(
    ("heading", "anchor"),
    [("W&B", "wb"), ("`data.augment`", "dataaugment"), ("1. Install", "1-install"), ("A b-c_d", "a-b-c_d")],
)
def test_anchors_are_those_of_github(heading: str, anchor: str) -> None:
    assert documented.slug(heading) == anchor


# ---- troubleshooting ---------------------------------------------------------------------------------------------------


def messages() -> list[str]:
    lines = documented.split(ROOT / "docs/troubleshooting.md")[1]
    return [found[1] for _, line in lines if (found := re.fullmatch(r"- `(.+)`", line))]


@pytest.mark.parametrize("message", messages())
def test_a_message_is_one_of_the_program(message: str) -> None:
    assert len(re.findall(r"\w", message)) >= 8, "too little of it is fixed"
    assert documented.occurs(message)


def test_a_message_that_is_none_is_noticed() -> None:
    assert len(messages()) > 60
    assert not documented.occurs(messages()[-1].replace("is not in", "is not on"))
    assert not documented.occurs("the store is damaged (…); run: make clean")


# ---- architecture ------------------------------------------------------------------------------------------------------


def test_the_page_on_architecture_says_once_what_a_module_is_for() -> None:
    rows = re.findall(r"^\| (.+?) \|", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`([\w/]+\.py)`", row)]
    assert [name for name in named if named.count(name) > 1] == [] and len(named) > 100


def test_the_page_on_architecture_has_every_module() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    table = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    modules = [path.relative_to(ROOT / "hpc_cifar") for path in (ROOT / "hpc_cifar").rglob("*.py") if path.name[0] != "_"]
    listed = [path for path in modules if f"`{path}`" in table or f"`{path.name}`" in table or path.parent.name == "cli"]
    assert sorted(set(modules) - set(listed)) == []
