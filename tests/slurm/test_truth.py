"""What status, submit and cancel say about real jobs of a real Slurm. The training loop is the fake one of tests/launch."""

from __future__ import annotations

import json
import os
import pty
import select
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from fcntl import ioctl
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "launch"))

from launch_site import Site, eventually

from hpc_cifar.runs import Run, all_runs

if TYPE_CHECKING:
    from slurm_site import SlurmCluster

pytestmark = pytest.mark.slow
LONG = {"epochs": 100_000, "processes": 1}


def user(folder: Path) -> Site:
    made = Site(folder / "site")
    # the cluster's GPUs are fake and its dataset is a folder: what checks the nodes would refuse both
    made.environment["HPC_CIFAR_PREFLIGHT_S"] = "0"
    return made


@pytest.fixture
def site(slurm_cluster: SlurmCluster, tmp_path: Path) -> Iterator[Site]:
    made = user(tmp_path)
    yield made
    made.close()


def submit(site: Site, *options: str, tags: tuple[str, ...] = (), **job: Any) -> Run:
    done = site.cli("submit", site.job(*tags, **(LONG | job)), "--cluster", "slurm", "--parsable", *options)
    return Run(site.runs / done.stdout.split("\t")[0])


def job_of(run: Run) -> str:
    return run.jobs()[-1].job_id


def fill(cluster: SlurmCluster) -> str:
    """A job that has the whole cluster for ten minutes."""
    job = cluster.batch("--partition=high", "--nodes=3", "--exclusive", "--time=10", script="sleep 600")
    cluster.wait(job, {"RUNNING"})
    return job


def on_a_terminal(site: Site, *arguments: str, columns: int = 80, until: Callable[[str], bool] | None = None) -> str:
    """What a command prints on a terminal, to its end or until that is enough."""
    main, other = pty.openpty()
    ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {**site.environment, "TERM": "xterm"}
    for name in ("COLUMNS", "LINES"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "hpc_cifar", *arguments]
    child = subprocess.Popen(command, cwd=site.work, env=environment, stdin=other, stdout=other, stderr=other)
    os.close(other)
    text, deadline = b"", time.monotonic() + 30
    try:
        while time.monotonic() < deadline and not (until is not None and until(text.decode(errors="replace"))):
            if select.select([main], [], [], 0.2)[0]:
                try:
                    text += os.read(main, 65536)
                except OSError:  # the terminal's other end is closed
                    break
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGINT)
        child.wait(10)
        os.close(main)
    return text.decode().replace("\r\n", "\n")


def test_a_job_that_waits(slurm_cluster: SlurmCluster, site: Site) -> None:
    blocker = fill(slurm_cluster)
    run = submit(site, "--nodes", "3", "--gpus-per-node", "2", "--time", "00:30:00")
    slurm_cluster.until(lambda: seen(site, run)["estimated_start"], 20, "an estimate")
    row = seen(site, run)
    assert (row["state"], row["reason"]) in {("pending", "Resources"), ("pending", "Priority")}
    ends = time.mktime(time.strptime(slurm_cluster.job(blocker)["EndTime"], "%Y-%m-%dT%H:%M:%S"))
    assert abs(utc(row["estimated_start"]) - ends) < 120
    assert row["gpu_hours_planned"] == row["gpu_hours_left"] == 3.0
    none = ("nodes", "images_per_second", "epoch", "step", "val_accuracy", "test_accuracy", "gpu_hours", "eta_s")
    assert {name: row[name] for name in none} == dict.fromkeys(none)

    shown = on_a_terminal(site, "status")
    assert max(map(len, shown.splitlines())) <= 80
    assert f"    {row['reason']}" in shown.splitlines()
    header = shown.splitlines()[0].split()
    assert "start" in header
    assert not {"test", "validation", "step", "images/s", "nodes"} & set(header), "empty columns are left out"
    piped = site.cli("status").stdout.splitlines()
    assert len(piped) == 2 and len({line.count("\t") for line in piped}) == 1
    assert "estimated start" in on_a_terminal(site, "status", run.id)

    assert "cancelled while it was waiting" in site.cli("cancel", run.id).stdout
    assert seen(site, run)["state"] == "cancelled"
    assert slurm_cluster.state(job_of(run)) == "CANCELLED"
    assert f"{run.id} is not running: it is cancelled" in site.cli("cancel", run.id).stdout


def seen(site: Site, run: Run) -> dict[str, Any]:
    return site.status(run)


def utc(stamp: str) -> float:
    import datetime

    return datetime.datetime.fromisoformat(stamp).timestamp()


def test_a_job_that_runs(slurm_cluster: SlurmCluster, site: Site) -> None:
    run = submit(site, "--gpus-per-node", "1", "--time", "00:30:00")
    site.running(run)
    eventually(lambda: (run.state().epoch or 0) >= 1, what="an epoch")
    row = seen(site, run)
    assert row["state"] == "running"
    assert row["nodes"] == slurm_cluster.job(job_of(run))["NodeList"]
    assert (row["images_per_second"], row["val_accuracy"], row["epochs"]) == (1000.0, 0.5, 100_000)
    assert row["eta_s"] > 1000
    assert (row["estimated_start"], row["reason"]) == (None, None)
    listed = slurm_cluster.call("squeue", "--noheader", "--format=%j|%k")
    assert listed == f"tiny|hpc-cifar run {run.id}, submission {run.jobs()[0].submission}"

    with site.start("submit", site.job(**LONG), "--cluster", "slurm", "--follow") as following:
        other = eventually(lambda: next((one for one in all_runs(site.runs) if one != run), None))
        site.running(other)
        following.send_signal(signal.SIGINT)
        out, _ = following.communicate(timeout=20)
    assert following.returncode == 130
    assert f"{other.id} goes on" in out
    assert [seen(site, one)["state"] for one in (run, other)] == ["running", "running"]

    watched = on_a_terminal(site, "status", "--watch", "--every", "0.2", until=lambda text: text.count("\x1b[J") >= 3)
    assert watched.startswith("\x1b[2J\x1b[Hrun ") and watched.count("\x1b[2J") == 1, "the screen is cleared once"
    assert watched.count("\x1b[Hrun ") >= 3 and f"\n{run.id}" in watched
    for one in (run, other):
        assert "cancelling job" in site.cli("cancel", one.id).stdout
        slurm_cluster.wait(job_of(one), {"CANCELLED", "COMPLETED"})
        assert seen(site, one)["state"] == "cancelled"
    assert slurm_cluster.call("squeue", "--noheader") == "", "none of them is back"


def test_a_requeued_job(slurm_cluster: SlurmCluster, site: Site) -> None:
    run = submit(site)
    site.running(run)
    slurm_cluster.call("scontrol", "requeuehold", job_of(run))
    slurm_cluster.wait(job_of(run), {"PENDING", "REQUEUE_HOLD"})
    row = seen(site, run)
    assert (row["state"], row["nodes"], row["eta_s"]) == ("requeued", None, None)
    assert row["reason"]
    assert "cancelled while it was waiting" in site.cli("cancel", run.id).stdout
    assert seen(site, run)["state"] == "cancelled"
    slurm_cluster.wait(job_of(run), {"CANCELLED"})


def test_a_finished_run_that_slurm_starts_again_stays_as_it_is(slurm_cluster: SlurmCluster, site: Site) -> None:
    """As Slurm does to a job that was preempted and finished in its grace time. Its log was followed to the end."""
    run = submit(site, epochs=10)
    log = site.cli("logs", "--follow", run.id).stdout
    assert log.count(f"training {run.id} from step 0") == 1
    assert seen(site, run)["state"] == "finished"
    assert slurm_cluster.wait(job_of(run)) == "COMPLETED"
    before = run.result_file.stat().st_mtime_ns
    slurm_cluster.call("scontrol", "requeue", job_of(run))
    assert slurm_cluster.job(job_of(run))["Restarts"] == "1" and seen(site, run)["state"] == "finished"
    assert slurm_cluster.wait(job_of(run)) == "COMPLETED"
    assert len(site.seen(run)) == 1 and run.result_file.stat().st_mtime_ns == before


def test_submit_waits_for_the_end(slurm_cluster: SlurmCluster, site: Site) -> None:
    good = submit(site, "--wait", epochs=1)
    assert seen(site, good)["state"] == "finished"
    bad = site.cli(
        "submit", site.job("raise=0", **(LONG | {"epochs": 1})), "--cluster", "slurm", "--parsable", "--wait", code=1
    )
    assert seen(site, Run(site.runs / bad.stdout.split("\t")[0]))["state"] == "failed"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--partition", "nope"), "Slurm would refuse the job: invalid partition specified: nope"),
        (("--nodes", "4"), "Slurm would refuse the job: allocation failure: Requested node configuration is not available"),
        (("--gpus-per-node", "5"), "Requested node configuration is not available"),
        (("--constraint", "h100"), "Slurm would refuse the job: allocation failure: Invalid feature specification"),
        (("--partition", "high", "--time", "00:06:00"), "(PartitionTimeLimit): it asks for 6 minutes, and partition high has"),
        (("--partition", "high", "--nodes", "3"), "Requested node configuration is not available"),
    ],
)
def test_what_slurm_would_refuse_leaves_no_trace(
    slurm_cluster: SlurmCluster, site: Site, options: tuple[str, ...], words: str
) -> None:
    slurm_cluster.call("scontrol", "update", "PartitionName=high", "MaxTime=5", "MaxNodes=2")
    try:
        arguments = ("submit", site.job(time="00:05:00"), "--cluster", "slurm", *options)
        refused = site.cli(*arguments, code=1)
        dry = site.cli(*arguments, "--dry-run", code=1)
    finally:
        slurm_cluster.call("scontrol", "update", "PartitionName=high", "MaxTime=UNLIMITED", "MaxNodes=UNLIMITED")
    assert words in refused.stderr and refused.stderr.count("\n") == 1
    assert words in dry.stderr and "#!/bin/bash" in dry.stdout
    assert not site.runs.exists()
    assert slurm_cluster.call("squeue", "--noheader", "--states=all", "--name=tiny", "--format=%T").count("PENDING") == 0


def test_an_earlier_run_tells_how_long_the_next_will_be(slurm_cluster: SlurmCluster, site: Site) -> None:
    first = submit(site, epochs=2)
    site.cli("wait", first.id)
    # 2 epochs of 900 images in the one second that the fake loop says it took; the signal leaves 480 s of ten minutes
    text = site.cli("submit", site.job(epochs=1000, processes=1), "--cluster", "slurm", "--dry-run").stdout
    assert f"length      about 8:20 in 2 jobs of at most 10:00 (1,800 images/s as {first.id} had)" in text
    options = ("--cluster", "slurm", "--json", "--time", "00:05:00")
    [row] = json.loads(site.cli("submit", site.job(epochs=1000, processes=1), *options).stdout)
    assert (row["estimated_seconds"], row["estimated_jobs"]) == (500.0, 3)  # each trains for 5 minutes less the signal's 120 s
    assert abs(utc(row["estimated_start"]) - time.time()) < 60
    other = site.cli("submit", site.job(epochs=1000, processes=2), "--cluster", "slurm", "--dry-run").stdout
    assert "length" not in other, "twice as many processes have another rate"


def test_slurm_does_not_answer(slurm_cluster: SlurmCluster, site: Site) -> None:
    run = submit(site)
    site.running(run)
    controller = json.loads((slurm_cluster.folder / "daemons.json").read_text())["slurmctld"][0]
    os.kill(controller, signal.SIGSTOP)
    try:
        row = seen(site, run)
    finally:
        os.kill(controller, signal.SIGCONT)
    assert (row["state"], row["reason"]) == ("running", "Slurm does not answer; this is what the run last wrote")
    slurm_cluster.until(lambda: seen(site, run)["reason"] is None, 20, "Slurm answers again")


ODD = 'it\'s $(touch INJECTED) "q" `touch INJECTED` ünï; touch INJECTED # not'


def test_no_free_text_of_a_profile_is_run(slurm_cluster: SlurmCluster, site: Site) -> None:
    """Every text that may hold anything, through a real job. ``apptainer`` is a stand-in that runs its command as it is."""
    tools = site.folder / "my tools; touch INJECTED"
    tools.mkdir()
    note = 'echo "$@" > "$(dirname "$0")/called"\nprintenv ODD >> "$(dirname "$0")/called"'
    standin = note + '\nwhile [ "$1" != "/images/a b;c.sif" ]; do shift; done\nshift\nexec "$@"'
    for name, body in (("python", f'exec {shlex.quote(sys.executable)} "$@"'), ("apptainer", standin)):
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    profile = {
        "description": ODD,
        "environment": {"ODD": ODD},
        "setup": [f"export PATH={shlex.quote(str(tools))}:$PATH"],
        "sbatch_extra": {"comment": ODD, "wckey": "a b"},
        "srun_args": [f"--comment={ODD}", "--job-name=a; touch INJECTED"],
        "python": str(tools / "python"),
        "container": {
            "runtime": "apptainer",
            "image": "/images/a b;c.sif",
            "binds": ["/tmp/a b;touch INJECTED:/c"],
            "args": [f"--env=X={ODD}"],
        },
    }
    (site.work / "odd.yaml").write_text(json.dumps(profile))
    done = site.cli("submit", site.job(epochs=1, processes=1), "--cluster", "./odd.yaml", "--parsable")
    run = Run(site.runs / done.stdout.split("\t")[0])
    site.cli("wait", run.id)
    words, odd = (tools / "called").read_text().splitlines()
    assert odd == ODD
    assert words.startswith(
        f"exec --bind {run.path}:{run.path} --bind {site.data}:{site.data} --bind /tmp/a b;touch INJECTED:/c "
    )
    assert f" --env=X={ODD} /images/a b;c.sif {tools}/python -u -m submitit" in words
    assert site.seen(run)[0]["file"].startswith(str(run.code)), "the snapshot is what ran"
    comment = slurm_cluster.call("squeue", "--noheader", "--states=all", f"--jobs={job_of(run)}", "--format=%k")
    assert comment == ODD
    assert list(site.folder.rglob("INJECTED")) == []


def test_accounting_knows_what_squeue_has_forgotten(accounting_cluster: SlurmCluster, tmp_path: Path) -> None:
    site = user(tmp_path)
    no_restart = ("--set", "resources.fault_restarts=0")  # it ends with the first kill; the restarts are in test_faults.py
    killed, gone = (submit(site, *no_restart, tags=("die=0",)) for _ in range(2))  # at once: no rank writes a last word
    fine = submit(site)
    site.running(fine)
    row = seen(site, fine)
    assert (row["state"], row["images_per_second"]) == ("running", 1000.0)
    site.cli("cancel", fine.id)
    accounting_cluster.until(lambda: not accounting_cluster.call("squeue", "--noheader"), 30, "all have ended")
    forget(accounting_cluster)
    assert accounting_cluster.call("squeue", "--noheader", "--states=all") == ""
    (gone.path / "jobs.jsonl").write_text(json.dumps({"executor": "slurm", "job_id": "4000000"}) + "\n")
    told = {row["run"]: (row["state"], row["reason"]) for row in json.loads(site.cli("status", "--json").stdout)}
    assert told[killed.id][0] == "failed" and told[killed.id][1].startswith("rank 0 on n")
    assert "was killed by signal 9 (SIGKILL), usually for memory: raise the memory of the job" in told[killed.id][1]
    assert told[gone.id] == ("failed", "processes ended without a result")
    assert told[fine.id][0] == "cancelled"
    assert f"{gone.id} is not running: it is failed" in site.cli("cancel", gone.id).stdout, "nobody knows its job"


def forget(cluster: SlurmCluster) -> None:
    """The controller loses its memory of ended jobs, as it does by itself after MinJobAge; the accounts keep them."""
    testbed = cluster.as_testbed()
    testbed.daemons.stop(["slurmctld"])
    for path in (cluster.folder / "state").glob("job_state*"):
        path.unlink()
    # -i: newer ones refuse to start without a file that they had before
    testbed.daemons.start("slurmctld", ["slurmctld", "-i", "-D", "-f", str(testbed.conf)], environment=testbed.environment())
    cluster.until(testbed.ready, 30, "the controller is back")
