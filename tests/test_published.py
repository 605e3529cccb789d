"""A record script beside ours: a stand-in for it, which prints the same table, since those that are published need a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

STAND_IN = """
import os, sys, time, torch
test = torch.load(os.path.join("cifar10", "test.pt"))
train = torch.load(os.path.join("cifar10", "train.pt"))
assert train["images"].dtype == torch.uint8 and train["labels"].dtype == torch.int64
print(train["images"].long().sum().item(), test["labels"].sum().item(), len(train["classes"]), file=sys.stderr)
print("-" * 20)
print("|  run     |  epoch  |  train_acc  |  val_acc  |  tta_val_acc  |  time_seconds  |")
# one of the published scripts calls its first run so, another one has no name for it
for run in [*(["warmup"] if "record" in sys.argv[0] else []), *range(5 if "ends" in sys.argv[0] else 1000)]:
    print("compiles something | or other")
    for epoch in (0, 1):
        name = "" if epoch else run
        accuracy = 0.5 + 0.1 * epoch
        print(f"|  {name!s:>6}  |      {epoch}  |     0.7000  |   {accuracy:.4f}  |               |        {1 + epoch}.0000  |")
    share = 0 if run == "warmup" else int(run)
    print(f"|          |   eval  |     0.7000  |   0.6000  |       0.7{share:03}  |        2.5000  |")
    time.sleep(0.01)
"""

WANTS_A_GPU = """
import sys, torch
from torch import nn
text = open(sys.argv[0]).read()
assert "class CifarNet" in text
logging_columns_list = ["run   ", "epoch", "train_acc", "val_acc", "tta_val_acc", "time_seconds"]
def print_columns(columns, is_head=False):
    print("".join(f"|  {column}  " for column in columns) + "|")
class CifarNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
        self.half()
        self.calls = 0
    @torch.compile
    def forward(self, x, extra=True):
        self.kind = self.layers(x).dtype
        return self.layers(x)
def main(run, model):
    images = torch.load("cifar10/train.pt", map_location=torch.device("cuda"))["images"][:16]
    starter, ender = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    starter.record()
    logits = model.cuda()(images.half().permute(0, 3, 1, 2).cuda(), extra=False)
    logits.sum().backward()
    ender.record()
    torch.cuda.synchronize()
    seconds = starter.elapsed_time(ender) / 1000
    assert 0 < seconds < 60 and not logits.is_cuda
    assert logits.dtype == model.layers[1].weight.dtype == torch.float32 and model.kind == torch.bfloat16
    share = (torch.initial_seed() + 1) / 10
    print_columns([run, 0, 0.5, share, "", f"{seconds:.4f}"])
    print_columns(["", "eval", 0.5, share, share, f"{seconds:.4f}"])
"""


def measure(script: Path, data: Path, *options: str) -> subprocess.CompletedProcess[str]:
    benchmark = Path(__file__).resolve().parents[1] / "benchmarks" / "published.py"
    command = [sys.executable, str(benchmark), str(script), "--dataset", "digits", *options]
    environment = {**os.environ, "HPC_CIFAR_DATA": str(data)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


@pytest.mark.slow
def test_a_published_script_is_measured_on_the_images_of_the_store(tmp_path: Path, digits_data: Path) -> None:
    script, figures = tmp_path / "record.py", tmp_path / "published-gpu.json"
    script.write_text(STAND_IN)
    done = measure(script, digits_data, "--runs", "3", "--json", str(figures))
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    assert found["scripts"]["record"]["runs"] == [  # not the run that compiles; it is ended after three
        {"test_accuracy": 0.6, "tta_accuracy": accuracy, "train_seconds": 2.0, "total_seconds": 2.5}
        for accuracy in (0.7, 0.7001, 0.7002)
    ]
    manifest = json.loads((digits_data / "digits" / "manifest.json").read_text())
    assert f" {len(manifest['classes'])}\n" in done.stdout, "the images that the stand-in counted"
    assert "| `record` | 3 | 60.00% ± 0.00% | 70.01% ± 0.01% | 2.00 s ± 0.00 s | 2.50 s ± 0.00 s | - |" in done.stdout
    other = tmp_path / "other.py"
    other.write_text(STAND_IN)
    assert measure(other, digits_data, "--runs", "1", "--json", str(figures)).returncode == 0
    scripts = json.loads(figures.read_text())["scripts"]
    assert set(scripts) == {"record", "other"}, "figures of one machine are kept"
    assert [run["tta_accuracy"] for run in scripts["other"]["runs"]] == [0.7001], "the first one compiles, whatever its name"


@pytest.mark.slow
def test_a_published_script_that_wants_a_gpu_is_run_on_a_cpu(tmp_path: Path, digits_data: Path) -> None:
    """Its tensors, precision and clocks are changed below it; every run counts, and each has a seed."""
    script, figures = tmp_path / "wants.py", tmp_path / "published-2-cores.json"
    script.write_text(WANTS_A_GPU)
    done = measure(script, digits_data, "--on-cpu", "--runs", "3", "--json", str(figures))
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads(figures.read_text())["scripts"]["wants on the CPU"]
    assert [run["tta_accuracy"] for run in found["runs"]] == [0.1, 0.2, 0.3]
    assert "float32 weights" in found["on_cpu"] and "| `wants` on the CPU | 3 |" in done.stdout


@pytest.mark.slow
def test_a_published_script_that_ends_too_early_has_failed(tmp_path: Path, digits_data: Path) -> None:
    script, figures = tmp_path / "ends.py", tmp_path / "published-gpu.json"
    script.write_text(STAND_IN)
    done = measure(script, digits_data, "--runs", "9", "--json", str(figures))
    assert done.returncode == 1 and "ended after 4 of 9 runs" in done.stderr
    assert len(json.loads(figures.read_text())["scripts"]["ends"]["runs"]) == 4, "what was measured is kept"
    missing = measure(tmp_path / "none.py", digits_data)
    assert missing.returncode == 1 and "no such file" in missing.stderr
