#!/usr/bin/env bash
# Runs inside the image; scripts/container.sh mounts it there.
#   check.sh stranger   as the least that a cluster may give: a user of whom nothing is known, without HOME and network
#   check.sh guest      as Apptainer gives it
set -euo pipefail
say() { echo "check: $* ($SECONDS s)"; }
logged() { "$@" >log 2>&1 || { cat log; exit 1; }; }
fail() { echo "check: $*" >&2; exit 1; }

# -- what this test is worth: the conditions hold ----------------------------------------------------------------------
if touch /opt/venv/x 2>/dev/null; then fail "the image can be written"; fi
if [ "${1:-}" = stranger ]; then
  if getent passwd "$(id -u)" >/dev/null; then fail "this user has a passwd entry"; fi
  [ -z "${HOME:-}" ] || fail "HOME is $HOME"
  grep -qE '^[^ ]+ / [^ ]+ ro[, ]' /proc/mounts || fail "the image is not mounted read-only"
  [ "$(ls /sys/class/net)" = lo ] || fail "there is a network"
  say "user $(id -u), no passwd entry, no HOME, no network, read-only"
else
  say "user $(id -un), home $HOME, read-only"
fi

cd "$(mktemp -d)"
hpc-cifar --version
python3 - <<'PYTHON'
import importlib, importlib.metadata, tempfile, os
from pathlib import Path

for module, name in {
    "torch": "torch", "torchvision": "torchvision", "triton": "triton", "ffcv": "ffcv", "nvidia.dali": "nvidia-dali-cuda130",
    "submitit": "submitit", "wandb": "wandb", "timm": "timm", "optuna": "optuna", "plotly": "plotly",
    "matplotlib.pyplot": "matplotlib",
}.items():
    importlib.import_module(module)
    print(" ", name, importlib.metadata.version(name))
assert Path.home().is_dir() and os.access(Path.home(), os.W_OK), Path.home()
PYTHON
say "imports"

# -- compilers: Triton's launcher is a C extension, torch.compile writes C++ --------------------------------------------
include=$(python3 -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
echo '#include <Python.h>' | gcc -shared -fPIC -x c -I "$include" -o extension.so -
python3 - <<'PYTHON'
import torch

compiled = torch.compile(lambda x: torch.relu(x * 2 + 1).sum())
x = torch.randn(64, 64)
torch.testing.assert_close(compiled(x), torch.relu(x * 2 + 1).sum())
PYTHON
say "torch.compile"

# -- data and training --------------------------------------------------------------------------------------------------
export HPC_CIFAR_DATA=$PWD/data HPC_CIFAR_RUNS=$PWD/runs
hpc-cifar prepare digits | tail -n 1
for pipeline in resident ffcv dali reference; do
  logged hpc-cifar train quickstart-digits --max-steps 2 --name "$pipeline" --set "data.pipeline=$pipeline"
  grep "^pipeline: $pipeline " log || { cat log; fail "it did not train by $pipeline"; }
done
say "two steps by each data pipeline"
logged torchrun --standalone --nproc-per-node 2 -m hpc_cifar train quickstart-digits --max-steps 5 --name two
hpc-cifar list
say "five steps in two processes"
