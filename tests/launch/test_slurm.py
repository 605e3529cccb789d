"""The request to Slurm and what is made of its answers. Commands are stand-ins; tests/slurm has a real cluster."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launch_site import EXPERIMENT, Site, command, guarded, run_with, unmarked

from hpc_cifar import runs
from hpc_cifar.config.cluster import Cluster
from hpc_cifar.config.experiment import Experiment
from hpc_cifar.errors import LaunchError, UsageError
from hpc_cifar.launch import first_words, interruptions, script, slurm, status, submit
from hpc_cifar.launch.script import AFTER_SRUN
from hpc_cifar.runs import Run

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
        unmarked(text_of(SITE))
        == f"""#!/bin/bash

# Parameters
#SBATCH --account=proj-1
#SBATCH --comment='hpc-cifar run deep-1, submission MARK'
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
hpc_cifar_code=/runs/deep-1/code
. "$hpc_cifar_code/../submitit/guard.sh" big 1 '140 143' || exit 1
hpc_cifar_module cuda/12.4
hpc_cifar_first=$LINENO
source /opt/env.sh
export NCCL_DEBUG='it'"'"'s $(here)'
export PYTHONPATH=/runs/deep-1/code${{PYTHONPATH:+:$PYTHONPATH}}
export PYTHONSAFEPATH=1
hpc_cifar_unguard
set +e
hpc_cifar_job=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID}}
hpc_cifar_pickle=$hpc_cifar_code/../submitit/${{hpc_cifar_job:-$SLURM_JOB_ID}}_submitted.pkl
[ -e "$hpc_cifar_pickle" ] || cp "$hpc_cifar_code/../submitit/.MARK.pkl" "$hpc_cifar_pickle" 2> /dev/null

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /runs/deep-1/submitit/%j_%t_log.out --error /runs/deep-1/submitit/%j_%t_log.err \
--cpus-per-task=3 --export=ALL --kill-on-bad-exit=1 --open-mode=append --mpi=none \
sh -c 'trap "" USR2 TERM; exec "$@"' sh {python} -u -m submitit.core._submit /runs/deep-1/submitit

code=$?
early='|140|143|233|234|235|236|' kills='|137|139|135|134|'
most_early=40 most_kills=5 most_memory=1
{AFTER_SRUN.read_text()}"""
    )


AGAIN = "requeue Incomplete"


def segment_of(element: dict[str, str]) -> str:
    job = f"{element['SLURM_ARRAY_JOB_ID']}_{element['SLURM_ARRAY_TASK_ID']}" if "SLURM_ARRAY_JOB_ID" in element else "7"
    return f"{job}.{element.get('SLURM_RESTART_COUNT', 0)}"


def row_of(event: str, step: int = 0) -> str:
    """As a rank writes it."""
    return json.dumps({"time": "x", "segment": "7.0", "event": event, "step": step, "rank": 0, "reason": "it"}) + "\n"


@pytest.mark.parametrize(
    ("code", "before", "element", "again"),
    [
        (140, {}, {}, f"{AGAIN} 7"),
        (143, {}, {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}, f"{AGAIN} 5_2"),
        (233, {}, {}, f"{AGAIN} 7"),
        (143, {"cancelled": ""}, {}, ""),
        (143, {"failures.jsonl": '{"segment": "7.0", "reason": "no GPU"}'}, {}, ""),
        (143, {"failures.jsonl": '{"segment": "7.0", "reason": "no GPU"}'}, {"SLURM_RESTART_COUNT": "1"}, f"{AGAIN} 7"),
        (233, {"interruptions.jsonl": row_of("early exit") * 39}, {}, f"{AGAIN} 7"),
        (233, {"interruptions.jsonl": row_of("early exit") * 40}, {}, ""),
        (0, {}, {}, ""),
        (1, {}, {}, ""),
        (137, {}, {}, f"{AGAIN} 7"),
        (139, {"interruptions.jsonl": row_of("killed rank") * 4}, {}, f"{AGAIN} 7"),
        (139, {"interruptions.jsonl": row_of("killed rank") * 5}, {}, ""),
        (139, {"interruptions.jsonl": row_of("killed rank", 70) * 5}, {}, f"{AGAIN} 7"),
        (139, {"interruptions.jsonl": row_of("killed rank", 70) * 5, "checkpoints": "step-00000070"}, {}, ""),
        (139, {"interruptions.jsonl": row_of("killed rank") * 3 + row_of("hang") * 2}, {}, ""),
        (139, {"interruptions.jsonl": row_of("killed rank") * 4 + row_of("preempted") * 9}, {}, f"{AGAIN} 7"),
        (143, {"interruptions.jsonl": row_of("killed rank") * 9}, {}, f"{AGAIN} 7"),
        (137, {"endings/7.0.json": '{\n  "done": true\n}\n'}, {}, ""),
        (137, {"endings/7.0.json": '{"event": "lost rank"}\n'}, {}, f"{AGAIN} 7"),
        (137, {"submitit/7_0_log.err": "srun: error: n1: task 0: Out Of Memory\n"}, {}, f"{AGAIN} 7"),
        (
            139,
            {
                "submitit/7_0_log.err": "hpc-cifar: start 0 of job 7 on n1\nsrun: error: n1: task 0: Out Of Memory\n"
                "hpc-cifar: start 1 of job 7 on n1\nsrun: error: n1: task 0: Segmentation fault\n",
                "interruptions.jsonl": row_of("out of memory"),
            },
            {},
            f"{AGAIN} 7",
        ),
        (139, {"result.json": '{\n  "state": "finished"\n}\n'}, {}, ""),
        (137, {"failures.jsonl": '{"segment": "7.0", "reason": "hung", "hang": true}\n'}, {}, f"{AGAIN} 7"),
        (
            137,
            {
                "submitit/7_0_log.err": "srun: error: n1: task 0: Out Of Memory\n",
                "interruptions.jsonl": row_of("out of memory"),
            },
            {},
            "",
        ),
    ],
)
def test_a_job_whose_tasks_did_not_begin_begins_again(
    code: int, before: dict[str, str], element: dict[str, str], again: str, tmp_path: Path
) -> None:
    programs = {"srun": f"exit {code}", "scontrol": f'echo "$@" > {tmp_path}/asked'}
    for name, line in programs.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)
    run = tmp_path / "runs of one" / "deep-1"
    (run / "submitit").mkdir(parents=True)
    guarded(run / "code")
    for name, text in before.items():
        (run / name).parent.mkdir(exist_ok=True)
        if name == "checkpoints":
            (run / name).mkdir()
            (run / name / "latest").symlink_to(text)
        else:
            (run / name).write_text(text)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", **element}
    script_text = text_of({"name": "x", "setup": ["set -e"]}, run)
    done = subprocess.run(["bash", "-c", script_text], env=environment, check=False)
    assert done.returncode == code
    asked = tmp_path / "asked"
    assert (asked.read_text().strip() if asked.exists() else "") == again
    if code not in (0, 1) and not {"cancelled", "endings/7.0.json", "failures.jsonl", "result.json"} & set(before):
        row = interruptions.rows(Run(run))[-1]
        assert (row.segment, row.step) == (segment_of(element), 70 if "checkpoints" in before else 0)
        assert f"srun ended with exit code {code}" in row.reason


def test_a_job_that_may_not_requeue_ends_with_srun() -> None:
    assert "scontrol" not in text_of({"name": "x", "requeue": False})


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
    guarded(run / "code")
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


@pytest.mark.slow
def test_what_sbatch_gets_is_what_the_dry_run_shows(site: Site) -> None:
    command(
        site.folder / "bin", "sbatch", f'cp "$1" {site.folder}/got.sh; env > {site.folder}/env; echo Submitted batch job 77'
    )
    site.environment |= {"PATH": f"{site.folder / 'bin'}:/usr/bin:/bin", "SLURM_JOB_ID": "5", "SLURM_CONF": "/etc/s.conf"}
    arguments = ("submit", site.job(), "--cluster", "slurm", "--qos", "high")
    shown = site.cli(*arguments, "--dry-run").stdout
    run_id, job_id = site.cli(*arguments, "--parsable").stdout.split()
    assert job_id == "77"
    shown_id = shown.partition("hpc-cifar run ")[2].partition(",")[0]
    text = shown[shown.index("#!/bin/bash") :].strip().replace(shown_id, run_id)
    assert unmarked(text) == unmarked((site.folder / "got.sh").read_text()).strip()
    environment = (site.folder / "env").read_text().splitlines()
    assert "SLURM_CONF=/etc/s.conf" in environment
    assert not [line for line in environment if line.startswith("SLURM_JOB_ID=")]
    assert (site.runs / run_id / "submitit" / "77_submitted.pkl").is_file()


RUNNING = {"state": "running", "step": 5}


@pytest.mark.parametrize(
    ("squeue", "sacct", "state", "expected"),
    [
        ("7|PENDING|Resources", None, {"state": "pending"}, ("pending", "Resources")),
        ("7|RUNNING|None", None, {"state": "pending"}, ("running", None)),
        ("7|PENDING|BeginTime", None, {"state": "requeued", "step": 5}, ("requeued", "BeginTime")),
        ("7|EXPEDITING|None", None, {"state": "requeued", "step": 5}, ("requeued", None)),  # of 25.11 and later
        ("7|PENDING|None", None, {"state": "failed", "step": 5, "reason": "peer"}, ("requeued", None)),
        ("7|RUNNING|None", None, {"state": "failed", "step": 5, "reason": "peer"}, ("running", None)),
        ("7|NODE_FAIL|None", None, RUNNING, ("failed", "Slurm: NODE_FAIL")),
        ("7|TIMEOUT|None", None, RUNNING, ("failed", "the time limit was reached before a checkpoint was saved")),
        ("7|CANCELLED|None", None, RUNNING, ("cancelled", "cancelled with scancel")),
        ("7|COMPLETED|None", None, RUNNING, ("failed", "processes ended without a result")),
        ("7|FAILED|None", None, {"state": "failed", "reason": "why"}, ("failed", "why")),
        ("8|RUNNING|None", "7|OUT_OF_MEMORY|None", RUNNING, ("failed", first_words.FOR_MEMORY)),
        ("8|RUNNING|None", "7|CANCELLED by 0|None", RUNNING, ("cancelled", "cancelled with scancel")),
        ("", None, RUNNING, ("failed", "processes ended without a result")),
        ("", None, {"state": "pending"}, ("failed", status.NEVER_STARTED)),
        ("", None, {"state": "stopped", "reason": "terminated"}, ("stopped", "terminated")),
        # its ranks were killed as they asked Slurm what the TERM had been
        ("7|CANCELLED|None", None, {"state": "stopped", "reason": "terminated"}, ("cancelled", "cancelled with scancel")),
        ("", "7|CANCELLED by 0|None", {"state": "stopped", "reason": "terminated"}, ("cancelled", "cancelled with scancel")),
        ("7|PREEMPTED|None", None, {"state": "stopped", "reason": "terminated"}, ("stopped", "terminated")),
        ("7|CANCELLED|None", None, {"state": "stopped", "reason": "--max-steps 5"}, ("stopped", "--max-steps 5")),
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
