"""The request to Slurm and what is made of its answers. Commands are stand-ins; tests/slurm has a real cluster."""

from __future__ import annotations

import shlex
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launch_site import Site

from hpc_cifar import runs
from hpc_cifar.config.cluster import Cluster
from hpc_cifar.config.experiment import Experiment
from hpc_cifar.errors import LaunchError, UsageError
from hpc_cifar.launch import script, slurm, status, submit

EXPERIMENT = Experiment.model_validate(
    {
        "name": "deep",
        "epochs": 3,
        "model": {"family": "sequential", "layers": ["flatten", {"dense": {"units": 10}}]},
        "data": {"batch_size": 64},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "resources": {"nodes": 2, "gpus_per_node": 4, "time": "00:20:30", "memory_gib_per_node": 1.5, "cpus_per_process": 3},
    }
)
SITE = {
    "name": "big",
    "partition": "gpu",
    "account": "proj-1",
    "qos": "high",
    "constraint": "a100&nvlink",
    "exclude": "n[1-3]",
    "gpu_type": "a100",
    "exclusive": True,
    "modules": ["cuda/12.4"],
    "setup": ["source /opt/env.sh"],
    "environment": {"NCCL_DEBUG": "it's $(here)"},
    "sbatch_extra": {"reservation": "week"},
    "srun_args": ["--mpi=none"],
}


def text_of(cluster: dict[str, Any], run: Path = Path("/runs/deep-1"), experiment: Experiment = EXPERIMENT) -> str:
    made = Cluster.model_validate(cluster)
    return script.executor(experiment, made, submit.plan_for(experiment, made, 1000), run).script()


def test_the_script_is_exactly_this() -> None:
    python = shlex.quote(sys.executable)
    assert (
        text_of(SITE)
        == f"""#!/bin/bash

# Parameters
#SBATCH --account=proj-1
#SBATCH --comment='hpc-cifar run deep-1'
#SBATCH --constraint='a100&nvlink'
#SBATCH --cpus-per-task=3
#SBATCH --error=/runs/deep-1/submitit/%j_0_log.err
#SBATCH --exclude='n[1-3]'
#SBATCH --exclusive
#SBATCH --gpus-per-node=a100:4
#SBATCH --job-name=deep
#SBATCH --mem=1536M
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output=/runs/deep-1/submitit/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --qos=high
#SBATCH --requeue
#SBATCH --reservation=week
#SBATCH --signal=USR2@120
#SBATCH --time=21

# setup
module load cuda/12.4
source /opt/env.sh
export NCCL_DEBUG='it'"'"'s $(here)'
export PYTHONPATH=/runs/deep-1/code${{PYTHONPATH:+:$PYTHONPATH}}
export PYTHONSAFEPATH=1

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /runs/deep-1/submitit/%j_%t_log.out --error /runs/deep-1/submitit/%j_%t_log.err \
--cpus-per-task=3 --export=ALL --kill-on-bad-exit=1 --open-mode=append --mpi=none \
sh -c 'trap "" USR2 TERM; exec "$@"' sh {python} -u -m submitit.core._submit /runs/deep-1/submitit
"""
    )


def test_gres_and_no_requeue_and_a_short_limit() -> None:
    text = text_of({"name": "x", "gpu_request": "gres", "requeue": False, "max_time": "00:02:00"})
    assert "#SBATCH --gres=gpu:4\n" in text
    assert "gpus-per-node" not in text
    assert "#SBATCH --no-requeue\n" in text
    assert "#SBATCH --time=2\n" in text
    assert "#SBATCH --signal=USR2@60\n" in text  # not before half of the time


def test_scratch_is_expanded_on_the_nodes_and_not_by_the_script() -> None:
    text = text_of({"name": "x", "scratch": "${TMPDIR}/it's $(touch x)", "preflight": False})
    assert """export HPC_CIFAR_SCRATCH='${TMPDIR}/it'"'"'s $(touch x)'\n""" in text
    assert "export HPC_CIFAR_PREFLIGHT_S=0\n" in text
    assert "export HPC_CIFAR_PREFLIGHT_S=90\n" in text_of({"name": "x", "preflight_timeout_s": 90})


def test_a_cluster_without_gpus_is_adapted_to() -> None:
    cluster = Cluster.model_validate({"name": "cpu", "gpu_request": "none", "gpus_per_node_available": 0})
    plan = submit.plan_for(EXPERIMENT, cluster, 1000)
    assert plan.gpu_hours == 0
    assert plan.placement.world_size == 8
    assert "cpu has no GPUs" in plan.notes[0]
    small = Cluster.model_validate({"name": "small", "gpus_per_node_available": 2})
    with pytest.raises(UsageError, match="nodes of small have 2"):
        submit.plan_for(EXPERIMENT, small, 1000)


def test_the_script_does_what_it_says_in_a_shell(tmp_path: Path) -> None:
    run = tmp_path / "with space" / "deep-1"
    text = text_of({**SITE, "modules": [], "setup": []}, run)
    printing = text.replace("srun ", 'printf \'%s\\n\' "$NCCL_DEBUG" "$PYTHONPATH"; exit\nsrun ', 1)
    done = subprocess.run(["bash", "-c", printing], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"}, check=True)
    assert done.stdout == f"it's $(here)\n{run}/code\n"


@pytest.mark.parametrize("name", ["a\nb", "a'b", "a%j", "$(touch x)", "a`x`", 'a"b', "a\\b", "a\u2028b"])
def test_no_path_breaks_out_of_the_script(name: str) -> None:
    with pytest.raises(UsageError, match="Slurm cannot write to a path"):
        text_of({"name": "x"}, Path("/runs") / name / "deep-1")


@pytest.mark.parametrize("field", ["partition", "account", "qos", "constraint", "exclude"])
@pytest.mark.parametrize("value", ["gpu\n#SBATCH --uid=0", "gpu\ntouch /tmp/x", "a b", "$(id)", "'", "-w"])
def test_no_option_breaks_out_of_its_line(site: Site, field: str, value: str) -> None:
    from hpc_cifar.config.cluster import with_overrides

    with pytest.raises(UsageError, match=f"--{field}"):
        with_overrides(Cluster(name="x"), **{field: value})


def test_dry_run_on_a_machine_without_slurm(site: Site, tmp_path: Path) -> None:
    site.environment["PATH"] = str(tmp_path / "empty")
    done = site.cli("submit", site.job(), "--dry-run", "--time", "02:00:00", "--partition", "gpu", "--nodes", "3")
    assert "plan of tiny on slurm" in done.stdout
    assert "6 (3 nodes x 2, CPU only)" in done.stdout
    assert "#SBATCH --time=120\n" in done.stdout
    assert "#SBATCH --partition=gpu\n" in done.stdout
    assert not site.runs.exists()
    refused = site.cli("submit", site.job(), "--cluster", "slurm", code=1)
    assert refused.stderr == (
        "hpc-cifar: error: no sbatch on this machine: use --cluster local to run here, or --dry-run to see the script\n"
    )
    assert not site.runs.exists()
    over = site.cli("submit", site.job(), "--dry-run", "--gpus-per-node", "4", "--max-gpu-hours", "0.5", code=2)
    assert "may use 0.67 GPU-hours" in over.stderr
    wrong = site.cli("submit", site.job(), "--dry-run", "--time", "forever", code=2)
    assert wrong.stderr.startswith("hpc-cifar: error: --time: ")


def command(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_a_refusal_is_one_line_and_the_run_says_so(site: Site) -> None:
    words = "sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed: Invalid partition"
    tested = "sbatch: Job 1 to start at 2030-01-01T00:00:00 using 2 processors on nodes n1 in partition x"
    refusing = f"printf '%s\\n' {shlex.quote(words)} >&2; exit 1"
    command(site.folder / "bin", "sbatch", f'if [ "$1" = --test-only ]; then echo "{tested}" >&2; else {refusing}; fi')
    site.environment["PATH"] = f"{site.folder / 'bin'}:/usr/bin:/bin"
    refused = site.cli("submit", site.job(), "--cluster", "slurm", code=1)
    said = "sbatch refused the job: invalid partition specified: x; Batch job submission failed: Invalid partition"
    assert refused.stderr == f"hpc-cifar: error: {said}\n"
    (run,) = runs.all_runs(site.runs)
    assert site.status(run)["state"] == "failed"
    assert site.status(run)["reason"] == said
    command(site.folder / "bin", "sbatch", refusing)
    refused = site.cli("submit", site.job(), "--cluster", "slurm", code=1)
    assert refused.stderr == f"hpc-cifar: error: {said.replace('sbatch refused', 'Slurm would refuse')}\n"
    assert runs.all_runs(site.runs) == [run], "what is refused beforehand leaves nothing"


def test_what_sbatch_gets_is_what_the_dry_run_shows(site: Site) -> None:
    command(
        site.folder / "bin", "sbatch", f'cp "$1" {site.folder}/got.sh; env > {site.folder}/env; echo Submitted batch job 77'
    )
    site.environment |= {"PATH": f"{site.folder / 'bin'}:/usr/bin:/bin", "SLURM_JOB_ID": "5", "SLURM_CONF": "/etc/s.conf"}
    arguments = ("submit", site.job(), "--cluster", "slurm", "--qos", "high")
    shown = site.cli(*arguments, "--dry-run").stdout
    run_id, job_id = site.cli(*arguments, "--parsable").stdout.split()
    assert job_id == "77"
    shown_id = shown.partition("hpc-cifar run ")[2].partition("'")[0]
    assert shown[shown.index("#!/bin/bash") :].strip().replace(shown_id, run_id) == (site.folder / "got.sh").read_text().strip()
    environment = (site.folder / "env").read_text().splitlines()
    assert "SLURM_CONF=/etc/s.conf" in environment
    assert not [line for line in environment if line.startswith("SLURM_JOB_ID=")]
    assert (site.runs / run_id / "submitit" / "77_submitted.pkl").is_file()


@pytest.fixture
def slurm_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make squeue, sacct and scontrol answer; None means that the command fails."""

    def say(squeue: str | None = "", sacct: str | None = None, scontrol: str | None = None) -> None:
        for name, text in (("squeue", squeue), ("sacct", sacct), ("scontrol", scontrol)):
            calls = f"echo {name} >> {tmp_path}/calls; "
            command(tmp_path / "bin", name, calls + ("exit 1" if text is None else f"printf '%s\\n' {shlex.quote(text)}"))
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")

    return say


def run_with(root: Path, job_id: str = "7", state: dict[str, Any] | None = None) -> runs.Run:
    run = runs.create(root, runs.new_run_id("deep"), EXPERIMENT, {"batch_size": 64}, {})
    run.add_job(executor="slurm", job_id=job_id)
    if state is not None:
        run.write_state(**state)
    return run


RUNNING = {"state": "running", "step": 5}


@pytest.mark.parametrize(
    ("squeue", "sacct", "state", "expected"),
    [
        ("7|PENDING|Resources", None, {"state": "pending"}, ("pending", "Resources")),
        ("7|RUNNING|None", None, {"state": "pending"}, ("running", None)),
        ("7|PENDING|BeginTime", None, {"state": "requeued", "step": 5}, ("requeued", "BeginTime")),
        ("7|PENDING|None", None, {"state": "failed", "step": 5, "reason": "peer"}, ("requeued", None)),
        ("7|RUNNING|None", None, {"state": "failed", "step": 5, "reason": "peer"}, ("running", None)),
        ("7|NODE_FAIL|None", None, RUNNING, ("failed", "Slurm: NODE_FAIL")),
        ("7|TIMEOUT|None", None, RUNNING, ("failed", "the time limit was reached before a checkpoint was saved")),
        ("7|CANCELLED|None", None, RUNNING, ("cancelled", "cancelled with scancel")),
        ("7|COMPLETED|None", None, RUNNING, ("failed", "processes ended without a result")),
        ("7|FAILED|None", None, {"state": "failed", "reason": "why"}, ("failed", "why")),
        ("8|RUNNING|None", "7|OUT_OF_MEMORY|None", RUNNING, ("failed", "Slurm: OUT_OF_MEMORY")),
        ("8|RUNNING|None", "7|CANCELLED by 0|None", RUNNING, ("cancelled", "cancelled with scancel")),
        ("", None, RUNNING, ("failed", "processes ended without a result")),
        ("", None, {"state": "pending"}, ("failed", status.NEVER_STARTED)),
        ("", None, {"state": "stopped", "reason": "terminated"}, ("stopped", "terminated")),
        (None, None, RUNNING, ("running", "Slurm does not answer; this is what the run last wrote")),
    ],
)
def test_states(
    tmp_path: Path, slurm_says: Any, squeue: str | None, sacct: str | None, state: dict[str, Any], expected: tuple[str, Any]
) -> None:
    slurm_says(squeue, sacct)
    seen = status.status(run_with(tmp_path / "runs", state=state))
    assert (seen.state, seen.reason) == expected


def test_one_call_serves_many_runs_and_finished_ones_need_none(tmp_path: Path, slurm_says: Any) -> None:
    slurm_says("1|RUNNING|None\n2|PENDING|Priority\n3|RUNNING|None")
    made = [run_with(tmp_path / "runs", str(number)) for number in (1, 2, 3)]
    assert [row.state for row in status.statuses(made)] == ["running", "pending", "running"]
    assert (tmp_path / "calls").read_text() == "squeue\n"


def test_scontrol_answers_where_squeue_does_not(tmp_path: Path, slurm_says: Any) -> None:
    slurm_says(None, None, "JobId=7 JobName=deep JobState=PENDING Reason=Priority Dependency=(null)")
    assert slurm.query(["7"]) == slurm.Answer({"7": slurm.JobState("PENDING", "Priority")}, True)


def test_cancel_marks_first(tmp_path: Path, slurm_says: Any) -> None:
    from hpc_cifar.launch import control

    slurm_says("7|PENDING|Priority")
    run = run_with(tmp_path / "runs", state={"state": "pending"})
    command(tmp_path / "bin", "scancel", f'test -e {run.cancel_marker} && echo "$@" > {tmp_path}/cancelled')
    assert "cancelled while it was waiting (job 7)" in control.cancel(run)
    assert (tmp_path / "cancelled").read_text() == "7\n"
    assert status.status(run).state == "cancelled"
    other = run_with(tmp_path / "runs", state={"state": "running"})
    command(tmp_path / "bin", "scancel", "echo 'scancel: error: Kill job error on job id 7: Access denied' >&2; exit 1")
    with pytest.raises(LaunchError, match="scancel failed: Kill job error on job id 7: Access denied"):
        control.cancel(other)


def test_one_forgotten_job_hides_no_other_problem_of_scancel(tmp_path: Path, slurm_says: Any) -> None:
    slurm_says("7|RUNNING|None")
    lines = ["Kill job error on job id 6: Invalid job id specified", "Kill job error on job id 7: Access denied"]
    command(tmp_path / "bin", "scancel", f"printf 'scancel: error: %s\\n' {shlex.join(lines)} >&2; exit 1")
    with pytest.raises(LaunchError, match="scancel failed: Kill job error on job id 7: Access denied"):
        slurm.cancel(["6", "7"])
    command(tmp_path / "bin", "scancel", f"echo 'scancel: error: {lines[0]}' >&2; exit 1")
    slurm.cancel(["6"])


def test_cancel_names_the_jobs_of_the_last_submission_only(tmp_path: Path, slurm_says: Any) -> None:
    """Numbers of long ago may be other jobs' by now, or another cluster's."""
    from hpc_cifar.launch import control, several

    slurm_says("8|RUNNING|None\n18|RUNNING|None")
    command(tmp_path / "bin", "scancel", f'echo "$@" >> {tmp_path}/cancelled')
    one, two = (run_with(tmp_path / "runs", old, {"state": "running"}) for old in ("7", "17"))
    for run, first in ((one, "8"), (two, "18")):
        run.add_job(executor="slurm", job_id=first)
        run.add_job(executor="slurm", job_id=f"{first}9", follows=first)
    control.cancel(one)
    list(several.cancel_all([one, two]))
    assert (tmp_path / "cancelled").read_text() == "8 89\n8 89 18 189\n"


def test_a_job_that_another_cluster_of_the_federation_took_is_not_here(tmp_path: Path, slurm_says: Any) -> None:
    slurm_says("7|REVOKED|None", "7|RUNNING|None")
    assert slurm.query(["7"]).jobs["7"].state == "RUNNING"


def sbatch_environment(site: Site, text: str, **variables: str) -> set[str]:
    """Names of the SBATCH_ variables that reach sbatch."""
    command(site.folder / "bin", "sbatch", "env | grep -o ^SBATCH_[A-Z_]*; true")
    kept = {"PATH": f"{site.folder / 'bin'}:/usr/bin:/bin", **variables}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in kept.items():
            patch.setenv(name, value)
        with script.clean_environment(text):
            return set(slurm.ask(["sbatch"]).out.split())


def test_variables_of_the_user_do_not_overrule_the_script(site: Site) -> None:
    variables = {f"SBATCH_{name}": "x" for name in ("ACCOUNT", "PARTITION", "TIMELIMIT", "SIGNAL", "NO_REQUEUE", "WAIT")}
    text = text_of({"name": "x", "partition": "gpu"})
    assert sbatch_environment(site, text, **variables) == {"SBATCH_ACCOUNT"}, "a default that the profile leaves open"
    assert sbatch_environment(site, text_of(SITE), **variables) == set()


def test_a_refused_link_costs_only_the_links_behind_it(site: Site) -> None:
    count = f"n=$(($(cat {site.folder}/n 2>/dev/null || echo 0) + 1)); echo $n > {site.folder}/n"
    tested = 'if [ "$1" = --test-only ]; then echo "sbatch: Job 1 to start at 2030-01-01T00:00:00" >&2; exit; fi'
    limit = "if [ $n = 3 ]; then echo 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2; exit 1; fi"
    command(site.folder / "bin", "sbatch", f"{tested}\n{count}\n{limit}\necho Submitted batch job $n")
    command(site.folder / "bin", "squeue", "echo '1|PENDING|Priority'; echo '2|PENDING|Dependency'")
    site.environment["PATH"] = f"{site.folder / 'bin'}:/usr/bin:/bin"
    (site.work / "chain.yaml").write_text("executor: slurm\nrequeue: false\nchain_links: 5\n")
    arguments = ("submit", site.job(), "--cluster", "./chain.yaml")
    done = site.cli(*arguments, "--parsable")
    run, job = done.stdout.split()
    assert job == "1"
    assert "is queued, but only 1 of the 5 jobs that continue it: sbatch refused the job: QOSMaxSubmit" in done.stderr
    assert site.status(runs.Run(site.runs / run))["state"] == "pending"
    shown = site.cli(*arguments, "--dry-run").stdout
    assert "a run that needs more goes on in up to 5 more, which wait behind it from the start" in shown
    over = site.cli(*arguments, "--gpus-per-node", "2", "--max-gpu-hours", "1", "--dry-run", code=2).stderr
    assert "the 6 jobs of this run may use 2.00 GPU-hours (6 jobs x 2 GPUs x 0.17 h)" in over


class Rank0:
    cluster, global_rank, job_id, raw_job_id = "slurm", 0, "9_4", "9"


def test_a_hung_element_requeues_itself_and_a_cancelled_one_nothing(
    tmp_path: Path, slurm_says: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hpc_cifar.launch import job

    def hang(state: str) -> tuple[str, str]:
        slurm_says(state)
        command(tmp_path / "bin", "scontrol", f'echo "$@" >> {tmp_path}/asked')
        run = run_with(tmp_path / "runs", "9_4", {"state": "running", "step": 5})
        (tmp_path / "asked").unlink(missing_ok=True)
        assert job.restart_hung(run, Rank0(), "hung after step 5") == 1
        asked = tmp_path / "asked"
        return str(run.state()["state"]), asked.read_text() if asked.exists() else ""

    monkeypatch.setenv("SLURM_JOB_ID", "9")
    assert hang("RUNNING") == ("requeued", "requeue 9_4\n"), "never the plain number, which is the whole array"
    assert hang("COMPLETING") == ("running", "")
    assert hang("CANCELLED") == ("cancelled", "")


def test_a_job_that_lost_a_silent_rank_goes_back_to_the_queue(
    tmp_path: Path, slurm_says: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hpc_cifar.errors import LostRank
    from hpc_cifar.launch import job

    monkeypatch.setenv("SLURM_JOB_ID", "9")
    monkeypatch.setattr(job, "LAST_WORD_S", 0.1)
    slurm_says("RUNNING")
    command(tmp_path / "bin", "scontrol", f'echo "$@" >> {tmp_path}/asked')
    run = run_with(tmp_path / "runs", "9_4", {"state": "running", "step": 5})
    for restart in range(job.MAX_HANGS + 1):  # again and again at one step: it is no accident
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        assert job.restart_after_loss(run, Rank0(), LostRank("connection closed by peer")) is (restart < job.MAX_HANGS)
    assert (tmp_path / "asked").read_text() == "requeue 9_4\n" * job.MAX_HANGS
    talking = run_with(tmp_path / "runs", "9_4", {"state": "running", "step": 5})
    job.record_failure(talking, ValueError("mine"), rank=1, segment=job.segment())
    assert not job.restart_after_loss(talking, Rank0(), LostRank("connection closed by peer")), "it could say why"
    assert talking.state()["reason"] == "ValueError: mine"


def test_hours_left_are_those_of_the_present_job(tmp_path: Path, slurm_says: Any) -> None:
    import time

    plan = {"batch_size": 64, "gpu_hours": 8.0, "placement": {"nodes": 2, "gpus_per_node": 4}}
    run = runs.create(tmp_path / "runs", runs.new_run_id("deep"), EXPERIMENT, plan, {})
    run.add_job(executor="slurm", job_id="7")
    run.write_state(state="running", step=5, gpu_hours=20.0)  # of the jobs before it too
    begun = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() - 1800))
    slurm_says(f"7|RUNNING|None|{begun}|n1")
    assert status.status(run).gpu_hours_left == pytest.approx(4.0, abs=0.05)
    slurm_says("7|PENDING|BeginTime|N/A|")
    assert (status.status(run).gpu_hours, status.status(run).gpu_hours_left) == (20.0, 8.0)


def test_a_slurm_that_does_not_answer_is_not_a_job_that_is_queued(site: Site) -> None:
    command(site.folder / "bin", "squeue", "echo 'squeue: error: Unable to contact slurm controller' >&2; exit 1")
    site.environment["PATH"] = f"{site.folder / 'bin'}:/usr/bin:/bin"
    run = runs.create(site.runs, runs.new_run_id("tiny"), EXPERIMENT, {}, {})
    run.add_job(executor="slurm", job_id="7")
    run.write_state(state="failed", reason="why")
    refused = site.cli("resume", run.id, code=1).stderr
    assert "Slurm does not answer, so nobody can say whether job 7 is still queued" in refused
