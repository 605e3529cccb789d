"""Random stories, what must be true at the end of each, and the shortest one that breaks a rule."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator

from life.ranks import Work
from life.slurm import Site
from life.world import Happening, OneRun, Story, World

from hpc_cifar.launch import policy
from hpc_cifar.launch.policy import Event

Play = Callable[[Story], World]
AT_ANY_TIME = ("preempt", "preempt", "preempt", "cancel", "scancel", "node fails", "kill", "oom", "hang", "fail", "usr", "term",
               "requeue", "controller down", "signal lost", "prune")  # fmt: skip
AT_A_STEP = ("kill", "oom", "hang", "bad node", "fail", "node fails")
FACTS = {Event.HUNG: "hang", Event.OUT_OF_MEMORY: "oom", Event.NODE_BAD: "bad node"}


def drawn(random: random.Random) -> Story:
    """A story; the same state of ``random`` gives the same one."""
    pick, chance = random.choice, random.random
    slurm = chance() < 0.92
    forbidden = slurm and chance() < 0.3
    ranks = pick((1, 2, 2, 3))
    step_s, start_s = pick((0.2, 1, 5, 40)), pick((3, 10, 40))
    warning_s, early_s = pick((10, 60, 120)), pick((0, 20, 60))
    site = Site(
        slurm=slurm,
        requeue=not forbidden,
        scontrol=slurm and chance() < 0.92,
        preemptible=chance() < 0.4,
        links=pick((1, 2, 4)) if slurm and (forbidden or chance() < 0.1) and chance() < 0.9 else 0,
        array=slurm and chance() < 0.15,
        grace_s=pick((0, 0, 6, 30, 120)),
        user_signal=chance() < 0.6,
        limit_s=warning_s + early_s + start_s + step_s * pick((2, 10, 100, 1000, 1000)),
        warning_s=warning_s,
        early_s=early_s,
        hold_s=pick((1, 5, 120)),
        notice_s=pick((10, 60, 300)),
        lease_s=pick((0, 0, 90, 300, 2000)),
        silent_loss=chance() < 0.3,
        starts_again=chance() < 0.3,
        answer_s=pick((0, 0.1, 2)),
        store_s=pick((0, 0, 0, 0.5, 5)) if chance() < 0.5 else 0,
        restarts_allowed=pick((5, 5, 5, 5, 0, 1, 3)),
    )
    work = Work(
        ranks=ranks,
        nodes=pick((1, ranks)),
        python_s=pick((1, 2, 10)),
        start_s=start_s,
        step_s=step_s,
        steps=pick((60, 200, 400)),
        save_every=pick((10, 50, 1000)),
        save_s=pick((0.1, 1, 20)),
    )
    happenings = []
    length = work.steps * work.step_s
    for _ in range(random.randint(1, 8)):
        seconds = round(chance() ** 2 * min(1.5 * length + 100, 6000), 1)
        what = pick(AT_ANY_TIME)
        down_s = pick((20.0, 120.0, 600.0)) if what == "controller down" else 0
        happenings.append(Happening(what, at=seconds, rank=random.randrange(ranks), seconds=down_s))
    if chance() < 0.4:
        what = pick(AT_A_STEP)
        step = 0 if what == "bad node" else random.randrange(work.steps) if chance() < 0.8 else work.steps
        happenings.append(Happening(what, step=step, times=pick((1, 2, 3, 6, 20)), rank=random.randrange(ranks)))
    return Story(site, work, tuple(happenings))


# ---- what must be true -----------------------------------------------------------------------------------------------------


def judge(world: World) -> dict[str, str]:
    """Rules that the story has broken, by name, with words."""
    for run in () if world.endless else world.runs:
        for rule, words in ended_well(world, run):
            world.breaks(rule, words)
    return world.wrong


def ended_well(world: World, run: OneRun) -> Iterator[tuple[str, str]]:
    """Of a run of which no job does anything any more."""
    state, reason = run.store.state()
    if run.finished:
        if state != "finished":
            yield "an end is an end", f"it has finished, and its state is {state} ({reason})"
        return
    if run.marked or run.scancelled or run.not_told:
        if run.cancelled_by_slurm and state == "failed" and not run.failed_in:
            yield "cancelled never returns", f"it was cancelled, and its state is {state} ({reason})"
        return
    if run.pruned or (state == "failed" and run.failed_in):
        return
    if state == "failed" and not reason:
        yield "an end says why", "it has failed"
    if state == "failed" and "could not be requeued" in reason:
        if not (run.unheard or not world.site.requeue or not world.site.scontrol) or (run.unused and not run.unheard):
            yield "a run that can go on does", f"failed: {reason}"
        return
    if state == "failed" and rightly_failed(world, run):
        if not run.gave_up and not any(remedy in reason for remedy in policy.REMEDIES.values()):
            yield "an end says why", f"the reason has no remedy: {reason}"
        return
    site = world.site
    no_way = (not site.requeue and not site.links) or (not site.scontrol and not site.links)  # and nobody to ask
    if no_way:
        return
    held = any(job.held for job in run.jobs)
    if held and site.scontrol and not run.unheard:
        yield "a run that can go on does", "its job is held in the queue"
    elif not held and not run.gave_up and not run.unheard and not left_alone(world, run):
        yield "a run that can go on does", f"no job is left, and its state is {state} ({reason})"


def left_alone(world: World, run: OneRun) -> bool:
    """Whether there was no way on: the last link has ended, and jobs may not go back to the queue."""
    can = world.site.requeue and world.site.scontrol
    return not can and not any(job.alive for job in run.jobs) and run.jobs[-1].ends_as != "" and not run.unused


def rightly_failed(world: World, run: OneRun) -> bool:
    """Whether there were too many faults without a checkpoint in between, of the kind that the run says."""
    most = world.site.restarts_allowed
    fewer = {"hang": 2, "oom": 1, "bad node": 1}
    rows = run.store.records("").interruptions()
    if not rows:  # the behaviour before, which kept none, and allowed less
        most = min(most, 3)
    said = [FACTS.get(Event(row.event), "") for row in rows if row.step == rows[-1].step]
    allowed = [min(most, fewer.get(kind, most)) for kind in (*said, *(run.every_fault if not said else ()))]
    return bool(allowed) and sum(run.every_fault.values()) > min(allowed)


# ---- one story -------------------------------------------------------------------------------------------------------------


def play(story: Story) -> World:
    """With the real policy and executor, over records in memory."""
    world = World(story)
    world.play()
    judge(world)
    return world


def told(story: Story, rule: str, make: Callable[..., World] = World) -> str:
    """The story in lines."""
    world = make(story, aloud=True)
    world.play()
    judge(world)
    lines = world.lines or []
    end = next((index for index, line in enumerate(lines) if f"BROKEN: {rule}" in line), len(lines))
    return "\n".join([f"{rule}: {world.wrong.get(rule)}", f"  {story}", *(f"  {line}" for line in lines[: end + 1])])


def shorter(story: Story) -> Iterator[Story]:
    """Stories that are simpler in one thing."""
    for index, one in enumerate(story.happenings):
        others = story.happenings[:index], story.happenings[index + 1 :]
        yield dataclasses.replace(story, happenings=(*others[0], *others[1]))
        changes: list[dict[str, float]] = [{"times": one.times - 1}] if one.times > 1 else []
        changes += [{"rank": 0}] if one.rank else []
        if one.step is None:
            changes += [{"at": at} for at in (one.at // 100 * 100, one.at // 10 * 10, one.at // 1) if at != one.at]
        for change in changes:
            yield dataclasses.replace(story, happenings=(*others[0], dataclasses.replace(one, **change), *others[1]))  # type: ignore[arg-type]
    for name, plain in (("site", Site()), ("work", Work())):
        mine = getattr(story, name)
        for each in dataclasses.fields(plain):
            if getattr(mine, each.name) != getattr(plain, each.name):
                changed = dataclasses.replace(mine, **{each.name: getattr(plain, each.name)})
                yield dataclasses.replace(story, **{name: changed})


def shortest(story: Story, rule: str, play: Play = play, most: int = 2000) -> Story:
    """The simplest story found that still breaks the rule."""
    tried = 0
    while True:
        for simpler in shorter(story):
            tried += 1
            if rule in play(simpler).wrong:
                story = simpler
                break
        else:
            return story
        if tried > most:
            return story
