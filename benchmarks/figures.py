"""Every figure of the docs, from the JSON in docs/results: tables between marks in the pages, and plots.

    python benchmarks/figures.py              write them (make figures)
    python benchmarks/figures.py --check      write nothing; fail where a page or a plot is not what its JSON gives

A page holds ``<!-- figures: NAME -->`` and ``<!-- end of figures -->``; what stands between them is made here. Nothing else in
these pages may state a measured figure (tests/test_figures.py). What has not been measured says so, with the command.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import data
import histories_table
import plots
import policy_picture
import published
import restart
import step
import systems
import systems_table

from hpc_cifar import files
from hpc_cifar.config.load import load_experiment
from hpc_cifar.train import stall

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/performance.md", "docs/systems.md")
WITH_REGIONS = (*PAGES, "docs/resume.md")  # also a page that may state figures of its own
MACHINES = ("gpu", "2-cores")  # the ends of the names of files
REGION = re.compile(r"(<!-- figures: (?P<name>[a-z-]+) -->\n).*?(<!-- end of figures -->\n)", re.DOTALL)

Json = dict[str, Any]


def measured(results: Path, kind: str) -> list[tuple[str, Json]]:
    """(name of the file, its content) for each machine that has one."""
    found = []
    for machine in MACHINES:
        path = results / f"{kind}-{machine}.json"
        if path.exists():
            content: Json = files.read_json(path) or {}
            found.append((path.name, content | that_count(content.get("systems"))))
    return found


def that_count(trainings: Json | None) -> Json:
    """Of trained systems those with figures, each with its rows that count; and how the other runs ended."""
    if trainings is None:
        return {}
    entries = {name: entry | {"measured": systems_table.counted(entry)} for name, entry in trainings.items()}
    unfinished = {name: {"measured": [], "unfinished": entry.get("unfinished", [])} for name, entry in trainings.items()}
    return {"systems": {name: entry for name, entry in entries.items() if entry["measured"]}, "unfinished": unfinished}


def facts(name: str, result: Json) -> str:
    """What a reader must know of figures: the data, n, hardware, versions, and the file."""
    versions = result["versions"]
    parts = [result.get("data"), f"n = {result['n']}" if "n" in result else None, plots.hardware(result, whole=True)]
    parts += [f"{package} {versions[package]}" for package in ("torch", "ffcv", "python") if package in versions]
    parts += [f"{package} {version}" for package, version in versions.items() if package.startswith("nvidia-dali")]
    return f"{'; '.join(part for part in parts if part)} (`docs/results/{name}`)."


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"


def beside(rates: dict[str, list[float]], name: str, other: str) -> float | None:
    """Median over the rounds of the ratio: what slows the machine slows both."""
    if other not in rates:
        return None
    return statistics.median(a / b for a, b in zip(rates[name], rates[other], strict=True))


def data_lines(name: str, result: Json) -> list[str]:
    rates = result["images_per_second"]
    bases = (data.BASE, "stock FFCV", "stock DALI")
    lines = [
        f"{facts(name, result)} Batch {result['batch_size']}; images/s: median (least to most); ratios: median.",
        "",
        f"| pipeline | images/s | {' | '.join(f'beside {base}' for base in bases)} |",
        "|---" * (2 + len(bases)) + "|",
    ]
    for pipeline, values in rates.items():
        ratios = [beside(rates, pipeline, base) for base in bases]
        cells = ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        lines.append(f"| {pipeline} | {spread(values)} | {' | '.join(cells)} |")
    kept = [
        f"`{one}` {beside(rates, one, other):.1f} times {other} (at least {least:g})"
        for (one, other), least in data.PROMISES.items()
        if one in rates and other in rates
    ]
    return [*lines, *promised(kept)]


def promised(kept: list[str]) -> list[str]:
    """A paragraph behind a table, if there is something to say."""
    return ["", f"What was promised for two cores: {'; '.join(kept)}."] if kept else []


def step_lines(name: str, result: Json) -> list[str]:
    lines = [facts(name, result), "", *step.table(result)[1:]]
    kept = [
        f"`{one}` {result['rungs'][one]['beside_plain']:.2f} times plain (at least {least:g})"
        for one, least in step.PROMISES.items()
        if result["device"] == "cpu" and one in result["rungs"]
    ]
    return [*lines, *promised(kept)]


def restart_lines(name: str, result: Json) -> list[str]:
    lines = [facts(name, result)]
    for line in restart.table(result):
        lines += [line] if line.startswith("|") else ["", f"{line.split(',')[0]}:", ""]
    return lines


def checkpoint_lines(name: str, result: Json) -> list[str]:
    about, *lines = stall.table(result)
    return [f"{facts(name, result)} {about}", *lines]


def kernel_lines(name: str, result: Json) -> list[str]:
    rows = [
        f"| {what} | {statistics.median(times):.4f} ({min(times):.4f} to {max(times):.4f}) |"
        for what, times in result["milliseconds"].items()
    ]
    share = (
        f"An epoch at {result['share_of_copy']:.0%} of the rate of a copy ({result['copy_bytes_per_second'] / 1e12:.2f} TB/s)."
    )
    return [f"{facts(name, result)} {share}", "", "| work | ms, median (least to most) |", "|---|---|", *rows]


def tracking_lines(name: str, result: Json) -> list[str]:
    changes = " ".join(["", *(f"--set {change}" for change in result["set"])])
    lines = [
        f"{facts(name, result)} `{result['job']}{changes}`, trained by {result['threads']} "
        f"thread{'s' * (result['threads'] > 1)}; seconds from the first step to the last epoch's end, processor seconds of the "
        "rank alone from its start to its end, memory of all that runs beside it; ratios: median.",
        "",
        "| W&B | seconds | beside disabled | processor seconds | beside disabled | MiB beside it, at most |",
        "|---" * 6 + "|",
    ]
    for kind, values in result["seconds"].items():
        processor = result["processor"][kind]
        ratios = [result[f"{of}_ratio"].get(kind, 1) for of in ("seconds", "processor")]
        lines.append(
            f"| {kind} | {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f}) | {ratios[0]:.3f} "
            f"| {statistics.median(processor):.2f} ({min(processor):.2f} to {max(processor):.2f}) | {ratios[1]:.3f} "
            f"| {result['beside_mib'][kind]} |"
        )
    return lines


def scaling_lines(name: str, result: Json) -> list[str]:
    size, rate = result["gradient_bytes"], result["link"]["bytes_per_second"] / 1e9
    model = f" Modelled ones are one process with its share and a ring all-reduce of {size:,} bytes over {rate:g} GB/s."
    modelled = any(point["modelled"] for point in result["points"])
    lines = [
        f"{facts(name, result)} {result['job']}, global batch {result['batch_size']:,}, {result['steps']} steps, every process "
        f"with as many cores.{model if modelled else ''}",
        "",
        "| processes | images/s | ms a step | efficiency | |",
        "|---" * 5 + "|",
    ]
    for point in result["points"]:
        lines.append(
            f"| {point['processes']} | {spread(point['images_per_second'])} | {point['milliseconds']:.1f} "
            f"| {point['efficiency']:.0%} | {'modelled' if point['modelled'] else 'measured'} |"
        )
    return lines


def trained(name: str, result: Json) -> list[str]:
    """Claimed / measured of every system in a file, and how many keep their claim; then what waits, and what failed."""
    entries: Json = result["systems"]
    rows = [(entry, row) for entry in entries.values() for row in entry["measured"]]
    machines = {plots.hardware({"hardware": entry["hardware"]} | row, whole=True): None for entry, row in rows}
    known = [row.get("versions") or entry["versions"] for entry, row in rows]
    packages = [
        f"{package} {version}"
        for package in ("torch", "ffcv", "python", "nvidia-dali-cuda130")
        for version in dict.fromkeys(versions[package] for versions in known if package in versions)
    ]
    words = [*{row["data"]: None for _, row in rows}, *machines, *{row.get("precision"): None for _, row in rows}, *packages]
    waiting = [job for job in systems.with_claim() if job not in entries and job not in systems.from_scratch()]
    missing = [job for job in systems.HOURS if job not in entries]
    return [
        systems_table.summary(entries),
        "",
        f"{'; '.join(word for word in words if word)} (`docs/results/{name}`).",
        "",
        *systems_table.lines(entries, link="results"),
        *(systems_table.waits(job, load_experiment(systems.job_file(job)), name) for job in waiting),
        *systems_table.failures(result["unfinished"]),
        *(["", f"Not measured yet, but by `make systems`: {', '.join(f'`{job}`' for job in missing)}."] if missing else []),
    ]


def mean(runs: list[Json], figure: str) -> str:
    """Mean and standard deviation over the seeds, as per cent."""
    values = [run[figure] for run in runs if run.get(figure) is not None]
    if not values:
        return "-"
    return f"{statistics.mean(values):.2%}" + (f" ± {statistics.stdev(values):.2%}" if len(values) > 1 else "")


def recipe_lines(name: str, result: Json) -> list[str]:
    lines = ["| job | n | test accuracy | with augmentation | time | training alone | data | hardware |", "|---" * 8 + "|"]
    for job, entry in result["systems"].items():
        runs = entry["measured"]
        time = f"{statistics.mean(run['seconds'] for run in runs):,.0f} s"
        if restarts := sum(run.get("restarts") or 0 for run in runs):
            time += f" ({restarts} restart{'s' * (restarts > 1)})"
        processes = runs[0].get("processes")
        where = plots.hardware(entry, whole=True) + (f", {processes} process{'es' * (processes > 1)}" if processes else "")
        where += f", {precision}" if (precision := runs[0].get("precision")) else ""
        row = [
            f"`{job}`",
            str(len(runs)),
            mean(runs, "test_accuracy"),
            mean(runs, "tta_accuracy"),
            time,
            f"{statistics.mean(clock):,.1f} s"
            if None not in (clock := [run.get("warm_train_seconds") for run in runs])
            else "-",
            runs[0]["data"],
            where,
        ]
        lines.append(f"| {' | '.join(row)} |")
    about = "Mean and standard deviation over n seeds; time of training, validation and test, without start-up; training alone"
    about += ": the median epoch times the number of epochs"
    if any(run.get("tta_accuracy") is not None for entry in result["systems"].values() for run in entry["measured"]):
        about += "; with augmentation: averaged over ten mirrored and shifted views of each test image"
    return [*lines, "", f"{about}; `docs/results/{name}`."]


def transfer_lines(name: str, result: Json) -> list[str]:
    lines = [
        f"{facts(name, result | {'data': result['pretrained']['data'], 'n': 1})} {result['images']:,} images for each.",
        "",
        "| network | epochs | time | test accuracy |",
        "|---" * 4 + "|",
    ]
    backbone = result["pretrained"]["job"]
    rows = [
        (f"`{backbone}`, pretrained and frozen", result["pretrained"]),
        (f"`{backbone}`, random and frozen", result["random weights"]),
    ]
    rows += [(f"`{row['job']}`, from scratch", row) for row in result["from scratch"]]
    for network, row in rows:
        lines.append(f"| {network} | {row['epochs']} | {row['seconds']:,.0f} s | {row['test_accuracy']:.2%} |")
    return lines


def published_lines(name: str, result: Json) -> list[str]:
    return [facts(name, result), "", *published.table(result)]


@dataclasses.dataclass(frozen=True)
class Region:
    """What stands between two marks: files, the lines of one of them, how to measure it, the caption of a plot."""

    kinds: tuple[str, ...]
    lines: Callable[[str, Json], list[str]]
    command: str
    caption: str = ""
    machine: str = "2-cores"  # on which it is measured first


TRAININGS = "benchmarks/systems.py quickstart speed-cpu --seeds 3"
REGIONS = {
    "data": Region(("data",), data_lines, "benchmarks/data.py", "Images per second of each pipeline"),
    "step": Region(("step",), step_lines, "benchmarks/step.py", "Images per second of each rung"),
    "restart": Region(("restart",), restart_lines, "benchmarks/restart.py", "Seconds to the first step, by stage"),
    "restart-cold": Region(("restart-cold",), restart_lines, "benchmarks/restart.py --cold"),
    "checkpoint": Region(("checkpoint",), checkpoint_lines, "-m hpc_cifar bench checkpoint"),
    "kernel": Region(("kernel",), kernel_lines, "benchmarks/kernel.py", machine="gpu"),
    "tracking": Region(("tracking", "tracking-endless", "tracking-hanging"), tracking_lines, "benchmarks/tracking.py"),
    "scaling": Region(("scaling",), scaling_lines, "-m hpc_cifar bench step", "Images per second by processes"),
    "systems": Region(
        ("systems",), trained, "benchmarks/systems.py --background", "Accuracy of each system, claimed and measured"
    ),
    "recipes": Region(("recipes",), recipe_lines, TRAININGS),
    "ladder": Region(("recipes", "systems"), recipe_lines, TRAININGS, "Test accuracy against training time"),
    "published": Region(("published",), published_lines, "benchmarks/published.py published/airbench94_muon.py", machine="gpu"),
    "transfer": Region(("transfer",), transfer_lines, "benchmarks/transfer.py"),
}


def region(name: str, results: Path) -> str:
    """What stands between the marks."""
    if name == "policy":
        return "![What follows an interruption: states, events and actions](results/policy.svg)\n"
    if name == "histories":
        return "\n".join(histories_table.lines(files.read_json(results / "histories.json") or {})) + "\n"
    chosen = REGIONS[name]
    found = [one for kind in chosen.kinds for one in measured(results, kind)]
    lines = [line for file, result in found for line in (*chosen.lines(file, result), "")][:-1]
    if not found:
        file = f"docs/results/{chosen.kinds[0]}-{chosen.machine}.json"
        lines = [f"Not measured yet: `python {chosen.command} --json {file}`."]
    elif chosen.caption:
        lines += ["", f"![{chosen.caption}](results/{name}.svg)"]
    if found and not any(file.endswith("-gpu.json") for file, _ in found):
        lines += ["", "Nothing of this has been measured on a GPU yet."]
    return "\n".join(lines) + "\n"


def everything(root: Path) -> dict[Path, bytes]:
    """All that is made of the JSON in ``root``, by where it belongs."""
    results = root / "docs" / "results"
    made = {
        root / name: REGION.sub(
            lambda found: f"{found[1]}{region(found['name'], results)}{found[3]}", (root / name).read_text()
        ).encode()
        for name in WITH_REGIONS
    }
    made[results / "policy.svg"] = policy_picture.picture().encode()
    for name, drawn in plots.drawn(lambda kind: measured(results, kind)).items():
        made[results / f"{name}.svg"] = drawn
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where something differs")
    options = parser.parse_args()
    differ = {path: made for path, made in everything(options.root).items() if not path.exists() or path.read_bytes() != made}
    for path, made in differ.items():
        print(f"{path.relative_to(options.root)}: {'is not what its JSON gives: make figures' if options.check else 'written'}")
        if not options.check:
            path.write_bytes(made)
    return int(options.check and bool(differ))


if __name__ == "__main__":
    sys.exit(main())
