"""Bad nodes on a real cluster: each node is a mount namespace, so that something can be wrong on one node alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from slurm_site import PROFILE, Site, SlurmCluster

from hpc_cifar import files

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


class NodesSite(Site):
    """A user whose copy of the data can be hidden from single nodes."""

    def __init__(self, cluster: SlurmCluster, folder: Path, data: Path) -> None:
        self.data, self.scratch = folder / "data", folder / "scratch"
        shutil.copytree(data, self.data)
        self.scratch.mkdir()
        super().__init__(cluster, folder, self.data)
        self.hasten()

    def with_profile(self, profile: str, *options: str) -> tuple[str, str]:
        """Submit one epoch with these lines added to the profile; run and job id."""
        self.profile("testbed", PROFILE + profile.replace("SCRATCH", str(self.scratch)))
        return self.submit("--set", "epochs=1", *options)

    def processes(self, run: str, node: str) -> list[int]:
        """Ranks of a run on a node."""
        namespace = Path(f"/proc/{self.cluster.slurmd(node)}/ns/mnt").readlink()
        found = []
        for entry in Path("/proc").iterdir():
            try:
                here = entry.name.isdigit() and (entry / "ns/mnt").readlink() == namespace
                command = (entry / "cmdline").read_text(errors="replace").split("\0") if here else []
                if "submitit.core._submit" in command and f"/{run}/" in command[-2]:
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def cover(self, node: str, path: Path, *options: str) -> None:
        """Put an empty file system over ``path`` on one node."""
        self.cluster.mount(node, "-t", "tmpfs", *options, "over", str(path))

    def failures(self, run: str, name: str = "failures") -> list[dict[str, Any]]:
        path = self.runs / run / f"{name}.jsonl"
        self.cluster.until(path.exists, 10, f"{path.name} of {run}")
        return [json.loads(line) for line in path.read_text().splitlines()]

    def interruptions(self, run: str) -> list[dict[str, Any]]:
        return self.failures(run, "interruptions")

    def log(self, run: str, rank: int = 0) -> str:
        return "".join(path.read_text() for path in (self.runs / run / "submitit").glob(f"*_{rank}_log.out"))

    def requeued(self, job: str, excluding: set[str]) -> None:
        def excluded() -> set[str]:
            return set(self.cluster.call("scontrol", "show", "hostnames", self.cluster.job(job)["ExcNodeList"]).split())

        self.cluster.until(lambda: self.cluster.job(job)["Restarts"] == "1", 60, f"a requeue of {job}\n{self.logs()}")
        self.cluster.until(lambda: excluded() == excluding, 5, f"{job} excludes {excluding}")


@pytest.fixture
def site(slurm_cluster: SlurmCluster, tmp_path: Path, digits_data: Path) -> Iterator[NodesSite]:
    made = NodesSite(slurm_cluster, tmp_path, digits_data)
    yield made
    slurm_cluster.show_again()


# what is covered on which node, lines of the profile, options of submit
BAD = {
    "full scratch": ("n1", "scratch", "scratch: SCRATCH\nnodelist: n1\npreflight: false\n", ("--nodes", "1")),
    "rank 0 elsewhere": ("n1", "data", "", ()),  # rank 0 is there, so that another rank has to act
    "rank 0 alone": ("n1", "data", "exclude: n3\n", ("--nodes", "1")),
    "a link": ("n1", "data", "requeue: false\nchain_links: 2\nexclude: n3\n", ("--nodes", "1")),  # one that waits goes on
    "no other choice": ("n2", "data", "exclude: n3\n", ()),  # too few nodes are left, so the job comes back to the bad one
}


@pytest.fixture(scope="module")
def bad(
    slurm_cluster_session: SlurmCluster, digits_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[NodesSite, str, str]]]:
    """Runs that each meet a bad node, at the same time since most of it is waiting; site, run and job of each."""
    made = {}

    def user(name: str) -> NodesSite:
        folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
        return NodesSite(SlurmCluster(slurm_cluster_session.folder, folder), folder, digits_data)

    silent = user("no answer")
    made["no answer"] = (silent, *silent.with_profile("preflight_timeout_s: 20\n"))
    stopped: list[int] = []  # before they reach the others
    deadline = time.monotonic() + 30
    while not stopped and time.monotonic() < deadline:
        for pid in silent.processes(made["no answer"][1], "n2"):
            os.kill(pid, signal.SIGSTOP)
            stopped.append(pid)
    assert stopped
    for name, (node, part, profile, options) in BAD.items():
        site = user(name)
        site.cover(node, getattr(site, part), *(["-o", "size=64k"] if part == "scratch" else []))
        made[name] = (site, *site.with_profile(profile, *options))
    for name, (site, run, _) in made.items():
        site.call("wait", run, code=int(name == "no other choice"))
    yield made
    for site, _, _ in made.values():
        site.cluster.show_again()


def test_good_nodes_train_from_a_copy_on_each(site: NodesSite) -> None:
    for node in ("n1", "n2", "n3"):
        site.cover(node, site.scratch)  # a disk of its own
    run, job = site.with_profile(f"scratch: {site.scratch}\n", "--set", "resources.processes_per_node=2")
    site.call("wait", run)
    site.cluster.wait(job)  # the run is finished before the last rank has left
    place = f"{re.escape(str(site.scratch))}/hpc-cifar-0/"
    logs = "".join(site.log(run, rank) for rank in range(4))
    copied = re.findall(rf"^staging: copied [\d.]+ MiB of digits to {place}\S+ on (n\d)", logs, re.MULTILINE)
    shared = re.findall(rf"^staging: uses the copy of digits in {place}\S+ on (n\d)", logs, re.MULTILINE)
    assert sorted(copied) == sorted(shared) and len(set(copied)) == 2, "once a node, for both of its ranks"
    line = next(line for line in site.log(run).splitlines() if line.startswith("preflight: "))
    assert "good in" in line
    assert float(line.split()[-2]) > 0
    assert list(site.scratch.iterdir()) == []
    [event] = [row for row in site.rows(run, "event") if row["event"] == "staged"]
    assert event["local"] and event["seconds"] > 0
    for node in ("n1", "n2", "n3"):
        listing = ["nsenter", f"--mount=/proc/{site.cluster.slurmd(node)}/ns/mnt", "ls", "-A", str(site.scratch)]
        assert subprocess.run(listing, capture_output=True, text=True, check=True).stdout == ""


Bad = dict[str, tuple[NodesSite, str, str]]


def test_a_full_scratch_costs_the_copy_and_not_the_run_and_preflight_can_be_left_out(bad: Bad) -> None:
    site, run, _ = bad["full scratch"]
    assert site.result(run)["state"] == "finished"
    assert "preflight:" not in site.log(run)
    assert f"warning: digits is not staged to {site.scratch} (no room: " in site.log(run)


def test_a_node_without_the_data_is_named_and_left(bad: Bad) -> None:
    site, run, job = bad["rank 0 elsewhere"]
    site.requeued(job, excluding={"n1"})
    assert site.result(run)["state"] == "finished"
    [row] = site.interruptions(run)
    assert row["nodes"] == ["n1"] and row["event"] == "bad node"
    assert row["reason"].startswith(f"preflight failed: n1: data: {site.data}/digits: dataset 'digits' is not prepared")
    assert row["reason"] in site.log(run)
    assert f"job {job} requeued, excluding n1" in site.log(run, 1)
    assert "preflight: n2, n3 good in" in site.log(run)
    assert site.cluster.job(job)["NodeList"] == "n[2-3]"


def test_the_profiles_own_exclusion_is_kept_and_rank_0_may_be_the_bad_one(bad: Bad) -> None:
    site, run, job = bad["rank 0 alone"]
    site.requeued(job, excluding={"n1", "n3"})
    assert site.result(run)["state"] == "finished"
    assert site.cluster.job(job)["NodeList"] == "n2"


def test_a_link_that_waits_goes_on_elsewhere(bad: Bad) -> None:
    site, run, job = bad["a link"]
    assert site.result(run)["state"] == "finished"
    [row] = site.interruptions(run)
    assert row["event"] == "bad node" and row["nodes"] == ["n1"] and row["segment"] == f"{job}.0"
    links = [row["job_id"] for row in files.read_json_lines(site.runs / run / "jobs.jsonl")]
    assert links[0] == job and len(links) == 3
    assert site.cluster.job(links[0])["NodeList"] == "n1" and site.cluster.job(links[0])["Restarts"] == "0"
    assert site.cluster.job(links[1])["NodeList"] == "n2"
    for link in links[1:]:
        assert f"job {link} goes on, excluding n[1,3]" in site.log(run).replace("n3,n1", "n[1,3]").replace("n1,n3", "n[1,3]")


def test_a_second_failure_ends_the_run(bad: Bad) -> None:
    site, run, job = bad["no other choice"]
    first, second = site.interruptions(run)
    assert first["reason"].startswith("preflight failed: n2: data: ")
    ended = "bad node: 2 times without a checkpoint in between, so it is not restarted: see the nodes that are named"
    assert second["reason"].startswith(first["reason"]) and ended in second["reason"]
    [failure] = site.failures(run)
    assert site.state(run)["state"] == "failed"
    assert site.state(run)["reason"] == second["reason"] == failure["reason"]
    assert f"job {job} requeued, excluding nothing: there are too few other nodes" in site.log(run)
    site.cluster.until(lambda: site.cluster.state(job) == "FAILED", 30, "the job has failed")
    assert site.cluster.job(job)["Restarts"] == "1"


def test_a_node_that_does_not_answer_is_named(bad: Bad) -> None:
    """Its processes were frozen before they reached the others."""
    site, run, job = bad["no answer"]
    site.requeued(job, excluding={"n2"})
    assert "n2: no answer within 20 s" in site.interruptions(run)[0]["reason"]
    assert site.result(run)["state"] == "finished"
    assert site.cluster.job(job)["NodeList"] == "n[1,3]"
