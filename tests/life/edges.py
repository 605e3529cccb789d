"""The two ends of a segment that the policy is no part of: the lines behind srun, and the controller of this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpc_cifar.launch import ending, policy
from hpc_cifar.launch.policy import Event

if TYPE_CHECKING:
    from life.ranks import Segment
    from life.world import World

AGAIN_LOCALLY = 144
MOST_IDLE = 5  # of the controller on this machine


def script_goes_on(world: World, segment: Segment, code: int) -> bool:
    """The lines behind srun, see ``launch/script.py``: whether they send the job back; they count what they do."""
    run, site = segment.run, world.site
    records = world.records(segment.job)
    if records.outcome(segment.name) is not None or world.failure(segment):
        return False
    event = Event.OUT_OF_MEMORY if segment.lost_how == "oom" else Event.KILLED
    most = min(site.restarts_allowed, policy.FEWER_RESTARTS.get(event, site.restarts_allowed))
    faults = ending.faults(records.interruptions(), records.saved_step())
    before, goes_on = faults[event], faults[event] < most and faults.total() < site.restarts_allowed
    records.note(
        {"segment": segment.name, "event": event.value, "step": records.saved_step(), "rank": None, "reason": f"srun {code}"}
    )
    world.met.add(f"the script: {event.value}")
    if not goes_on:
        run.gave_up = f"{event.value}, {before + 1} times"
    return goes_on


def controller(world: World, segment: Segment, codes: list[int]) -> None:
    """See ``launch/controller.py``."""
    job, run, records = segment.job, segment.run, world.records(segment.job)
    job.segment = None
    state = ""
    if records.cancelled():
        state = "cancelled"
    elif AGAIN_LOCALLY in codes and job.ends_as == "TERMINATED":
        state = "stopped"
    elif AGAIN_LOCALLY in codes and run.idle < MOST_IDLE:
        run.idle += 1
        job.restarts += 1
        job.state = "PENDING"
        world.clock.after(1, world.slurm.try_start, job)
        return
    elif records.outcome(segment.name) is not None and run.store.state()[0] == "failed":
        pass  # a rank has said why
    elif AGAIN_LOCALLY in codes:
        state, run.gave_up = "failed", "the controller: no step between restarts"
    elif any(codes):
        state, run.gave_up = "failed", "a rank was lost on this machine"
    job.state = "ENDED"
    if state and not run.finished:
        records.set_state(state, run.gave_up)
