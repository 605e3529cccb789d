"""Jobs that end before Python speaks, on a real Slurm: their first words are the reason.

Their modules are those of the real Lmod and the real environment-modules; conda is a stand-in.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "launch"))

from launch_site import Site

from hpc_cifar import runs

if TYPE_CHECKING:
    from slurm_site import SlurmCluster

pytestmark = pytest.mark.slow
ENDED = "the job ended before training began: "
# a stand-in: what conda's own function prints and returns
CONDA = 'conda() { echo; echo "EnvironmentNameNotFound: Could not find conda environment: $2"; return 1; } >&2'
LMOD = Path("/usr/share/lmod/lmod/init/bash")
MODULES = {  # as files of a module path
    "good/1.0": "#%Module1.0\nsetenv GOOD yes\n",
    "quits/1.0": "#%Module1.0\nexit\n",
    "broken/1.0": '#%Module1.0\nerror "no licence"\n',
}


@dataclasses.dataclass
class Jobs:
    """Runs by name, on a site of their own."""

    cluster: SlurmCluster
    site: Site
    names: dict[str, runs.Run] = dataclasses.field(default_factory=dict)
    rows: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    waited: str = ""

    def submit(self, name: str, **profile: Any) -> None:
        common = {"executor": "slurm", "partition": "low", "gpu_request": "none", "cpus_per_process": 1}
        (self.site.work / f"{name}.yaml").write_text(json.dumps(common | profile))
        job = self.site.job(processes=1, epochs=1)
        done = self.site.cli("submit", job, "--cluster", f"./{name}.yaml", "--parsable")
        self.names[name] = runs.Run(self.site.runs / done.stdout.split("\t")[0])

    def wait(self) -> None:
        ids = [run.id for run in self.names.values()]
        self.waited = self.site.cli("wait", *ids, code=None).stdout
        told = {row["run"]: row for row in json.loads(self.site.cli("list", "--json").stdout)}
        self.rows = {name: told[run.id] for name, run in self.names.items()}

    def failed(self, name: str, words: str) -> None:
        """It failed for this reason, within seconds, without training."""
        run, row = self.names[name], self.rows[name]
        assert row["state"] == "failed"
        assert words in row["reason"], f"{name}: {row['reason']}"
        assert row["reason"].startswith(ENDED) and row["reason"].endswith(f"(log: submitit/{row['job_id']}_0_log.err)")
        assert f"{run.id}: failed ({row['reason']})" in self.waited.splitlines()
        assert self.site.seen(run) == [], "the training loop was not reached"
        minutes, seconds = self.cluster.job(row["job_id"])["RunTime"].split(":")[1:]
        assert int(minutes) == 0 and int(seconds) < 45, "on a busy machine too"

    def finished(self, name: str) -> None:
        assert (self.rows[name]["state"], self.rows[name]["reason"]) == ("finished", None), name

    def log(self, name: str) -> str:
        return self.site.cli("logs", self.names[name].id).stdout


@pytest.fixture
def jobs(slurm_cluster: SlurmCluster, tmp_path: Path) -> Iterator[Jobs]:
    site = Site(tmp_path / "site")
    site.environment |= {"HPC_CIFAR_PREFLIGHT_S": "0"}
    yield Jobs(slurm_cluster, site)
    site.close()


def test_jobs_that_end_before_python_speaks(jobs: Jobs, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    jobs.submit("no-python", python="/no/such/python")
    jobs.submit("bare-python", python=str(bare / "bin" / "python"))
    jobs.submit("bad-home", environment={"PYTHONHOME": "/not/there"})
    jobs.submit("exits", setup=["echo this node has no licence >&2", "exit 3"])
    jobs.submit("conda", setup=[CONDA, "conda activate nope"])
    jobs.submit("no-file", setup=["if true; then", "  source /no/such/env.sh", "fi"])
    jobs.submit("no-modules", modules=["cuda/99"])
    jobs.submit("container", setup=["apptainer() { :; }"], container={"runtime": "apptainer", "image": "/no/such.sif"})
    jobs.submit("allowed", setup=["false", "conda activate nope"], modules=["cuda/99"], setup_may_fail=True)
    jobs.submit("allowed-bare", setup=["false"], python=str(bare / "bin" / "python"), setup_may_fail=True)
    jobs.wait()
    jobs.failed("no-python", "/no/such/python: not found")
    jobs.failed("bare-python", "No module named 'submitit'")
    jobs.failed("bad-home", "Fatal Python error: ")
    jobs.failed("bad-home", "PYTHONHOME = '/not/there'")
    jobs.failed("exits", "setup line 2 of profile exits ended the job with exit code 3: `exit 3`: this node has no licence")
    jobs.failed(
        "conda",
        "setup line 2 of profile conda failed with exit code 1: `conda activate nope`: "
        "EnvironmentNameNotFound: Could not find conda environment: nope",
    )
    jobs.failed("no-file", "setup line 2 of profile no-file failed with exit code 1: `source /no/such/env.sh`: ")
    jobs.failed("no-file", "/no/such/env.sh: No such file or directory")
    jobs.failed("no-modules", "module load cuda/99 failed with exit code 127: module: command not found")
    jobs.failed("container", "apptainer: not found" if shutil.which("apptainer") is None else "/no/such.sif")
    jobs.finished("allowed")
    assert "setup line 2 of profile allowed failed with exit code 127: `conda activate nope`; the job goes on" in jobs.log(
        "allowed"
    )
    jobs.failed("allowed-bare", "No module named 'submitit'")
    jobs.failed("allowed-bare", "(before that, setup line 1 of profile allowed-bare failed with exit code 1: `false`)")


def test_elements_of_an_array_and_links_of_a_chain(jobs: Jobs) -> None:
    site = jobs.site
    profile = "executor: slurm\npartition: low\ngpu_request: none\ncpus_per_process: 1\nsetup: ['exit 3']\n"
    (site.work / "array.yaml").write_text(profile)
    (site.work / "chain.yaml").write_text(profile + "requeue: false\nchain_links: 1\n")
    job = site.job(processes=1, epochs=1)
    site.cli("submit", job, "--cluster", "./array.yaml", "--seeds", "2", "--parsable")
    site.cli("submit", job, "--cluster", "./chain.yaml", "--parsable")
    found = runs.all_runs(site.runs)
    assert len(found) == 3
    site.cli("wait", *(run.id for run in found), code=1)
    for row in json.loads(site.cli("status", "--json").stdout):
        name = "array" if "_" in row["job_id"] else "chain"
        words = f"setup line 1 of profile {name} ended the job with exit code 3: `exit 3`"
        assert (row["state"], row["reason"]) == ("failed", f"{ENDED}{words} (log: submitit/{row['job_id']}_0_log.err)")


@pytest.fixture(params=["lmod", "environment-modules"])
def module_program(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The file that defines ``module``, as a site's ``BASH_ENV`` does; real programs."""
    if request.param == "lmod":
        if not LMOD.exists():
            pytest.skip("Lmod is not installed (Debian: lmod)")
        return str(LMOD)
    roots = (Path("/usr/lib"), Path("/opt/environment-modules/usr/lib"))
    command = next((path for root in roots for path in root.glob("*/modulecmd.tcl")), None)
    tclsh = shutil.which("tclsh")
    if command is None or tclsh is None:
        pytest.skip("environment-modules is neither installed nor in /opt/environment-modules (scripts/system_packages.sh)")
    init = tmp_path / "modules.bash"
    init.write_text(f'eval "$({tclsh} {command} bash autoinit)"\n')
    return str(init)


def test_modules(module_program: str, jobs: Jobs, tmp_path: Path) -> None:
    for name, text in MODULES.items():
        path = tmp_path / "modulefiles" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    (tmp_path / "modulefiles" / ".modulerc").write_text("#%Module1.0\nmodule-alias other good/1.0\n")
    jobs.site.environment |= {"BASH_ENV": module_program, "MODULEPATH": str(tmp_path / "modulefiles")}
    check = '[ "$GOOD" = yes ]'
    jobs.submit("missing", modules=["good/1.0", "cuda/99"])
    jobs.submit("quits", modules=["quits/1.0"])  # for which Lmod returns 0
    jobs.submit("broken", modules=["broken"])
    jobs.submit("in-setup", setup=["module load cuda/99"])
    jobs.submit("twice", modules=["good", "good/1.0", "other"], setup=[check, "module load other"])
    jobs.submit("allowed", modules=["cuda/99", "good"], setup=[check], setup_may_fail=True)
    jobs.wait()
    lmod = module_program == str(LMOD)
    unknown = (
        'Lmod has detected the following error: The following module(s) are unknown: "cuda/99"'
        if lmod
        else "ERROR: Unable to locate a modulefile for 'cuda/99'"
    )
    jobs.failed("missing", f"{ENDED}module load cuda/99 failed with exit code 1: {unknown} (log: ")
    quits = "0 and loaded nothing (log: " if lmod else "1: ERROR: Module evaluation aborted (log: "
    jobs.failed("quits", f"{ENDED}module load quits/1.0 failed with exit code {quits}")
    jobs.failed("broken", f"{ENDED}module load broken failed with exit code 1: ")
    jobs.failed("broken", "no licence")
    jobs.failed(
        "in-setup", f"{ENDED}setup line 1 of profile in-setup failed with exit code 1: `module load cuda/99`: {unknown}"
    )
    jobs.finished("twice")
    jobs.finished("allowed")
    assert "module load cuda/99 failed with exit code 1; the job goes on, since setup_may_fail is set" in jobs.log("allowed")
