"""Stories that once broke a rule, each as short as it was found, and what must come of them."""

from __future__ import annotations

import dataclasses

from life.ranks import Work
from life.slurm import Site
from life.world import Happening, Story

BY_TERM = Site(requeue=False, links=2, preemptible=True, grace_s=0, user_signal=False)
CHAIN = Site(requeue=False, links=2)
# name: the story, the state that it ends with, and the rule that the behaviour before this policy breaks in it ("" if none)
STORIES: dict[str, tuple[Story, str, str]] = {
    "the signal before the time limit is lost": (
        Story(Site(limit_s=190), happenings=(Happening("signal lost", at=10),)), "finished", "",
    ),
    "a link is preempted as it finds that its run was cancelled": (
        Story(Site(links=4), Work(save_s=20), (Happening("scancel", at=20), Happening("preempt", at=50))), "cancelled", "",
    ),
    "scancel while the job saves after the warning of its time limit": (
        Story(
            Site(requeue=False, links=2, limit_s=185, warning_s=120, early_s=20), Work(start_s=3, save_s=5),
            (Happening("scancel", at=48),),
        ), "cancelled", "cancelled never returns",
    ),
    "the last rank is killed for memory while the job is cancelled": (
        Story(CHAIN, Work(step_s=5), (Happening("scancel", at=100), Happening("oom", at=101))),
        "cancelled", "cancelled never returns",
    ),
    "the node of a job without requeueing is missed while the others train": (
        Story(
            Site(requeue=False, links=2, silent_loss=True, notice_s=10), Work(nodes=2, steps=100),
            (Happening("node fails", at=40, rank=1),),
        ), "finished", "",
    ),
    "a node dies as often as the job starts": (
        Story(Site(restarts_allowed=3), Work(nodes=2), (Happening("node fails", step=17, times=20),)), "failed", "bounded",
    ),
    "the only rank is killed once": (
        Story(work=Work(ranks=1), happenings=(Happening("kill", at=100),)), "finished", "a run that can go on does",
    ),
    "a rank is killed wherever it gets": (
        Story(happenings=(Happening("kill", step=20, times=20),)), "failed", "an end says why",
    ),
    "a rank is killed for memory wherever it gets": (
        Story(happenings=(Happening("oom", step=20, times=20),)), "failed", "an end says why",
    ),
    "a chain is preempted by TERM alone, without a grace time": (
        Story(BY_TERM, happenings=(Happening("preempt", at=60),)), "finished", "a run that can go on does",
    ),
    "a chain is preempted by TERM alone, with a grace time": (
        Story(dataclasses.replace(BY_TERM, grace_s=30), happenings=(Happening("preempt", at=60),)), "finished", "",
    ),
    "a node of a chain fails its checks": (
        Story(CHAIN, happenings=(Happening("bad node", step=0, times=1),)), "finished", "a run that can go on does",
    ),
    "a file server keeps the lock of a node that died": (
        Story(Site(lease_s=90, notice_s=10), Work(nodes=2), (Happening("node fails", at=60),)), "finished",
        "a run that can go on does",
    ),
    "a rank hangs wherever it gets": (
        Story(happenings=(Happening("hang", step=20, times=20),)), "failed", "an end says why",
    ),
    "a run is cancelled while it saves in its grace time": (
        Story(work=Work(save_s=5), happenings=(Happening("preempt", at=60), Happening("cancel", at=63))), "cancelled", "",
    ),
    "seven preemptions": (
        Story(happenings=tuple(Happening("preempt", at=40 + 40 * number) for number in range(7))), "finished", "",
    ),
}  # fmt: skip
