"""The stages in order: a program is captured and ordered; once it has run and was recorded, it is placed."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

from olla.capture.lower import Lowered, lower
from olla.capture.program import Program
from olla.capture.trace import Trace, trace
from olla.graph.check import verify
from olla.graph.graph import Graph
from olla.graph.lifetimes import live_intervals, memory_profile, peak_bytes
from olla.graph.plan import Addresses, Plan, Schedule, Workspace
from olla.order.schedule import program_order, schedule
from olla.place.place import pack, place
from olla.run.recording import Recording
from olla.show.progress import stage

__all__ = ["Draft", "Options", "capture", "draft", "with_addresses", "with_estimated_addresses", "with_workspaces"]

_PLACING = 1 / 6  # of the time limit: what a longer search for addresses gains is a small part of a percent
OUTSIDE = -1  # instead of an offset


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asked for; see :func:`olla.optimize`."""

    reorder: bool = True
    place: bool = True
    time_limit: float = 60.0
    progress: bool | None = None


@dataclass(frozen=True, slots=True)
class Draft:
    """A captured step and its plan."""

    traced: Trace
    lowered: Lowered
    plan: Plan
    capture_seconds: float


def capture(program: Program, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options) -> tuple[Trace, Lowered]:
    """The step for these arguments as a graph, not planned."""
    with stage("capturing the step", options.progress):
        traced = trace(program, args, kwargs)
        return traced, lower(program, traced)


def draft(program: Program, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options) -> Draft:
    """The step for these arguments with a plan of its order."""
    started = time.perf_counter()
    traced, lowered = capture(program, args, kwargs, options)
    capture_seconds = time.perf_counter() - started
    plan = Plan.of(lowered.graph, _ordered(lowered.graph, options))
    verify(lowered.graph, plan)
    return Draft(traced, lowered, plan, capture_seconds)


def with_estimated_addresses(drafted: Draft, options: Options) -> Draft:
    """The draft placed before it has ever run, with the workspaces that are expected."""
    graph, plan = drafted.lowered.graph, drafted.plan
    with stage("placing", options.progress):
        addresses = place(graph, plan.order, time_limit=options.time_limit * _PLACING)
    plan = plan.at(addresses)
    verify(graph, plan)
    return replace(drafted, plan=plan)


def with_workspaces(drafted: Draft, recording: Recording, options: Options, *, reorder: bool) -> Draft:
    """The draft with the workspaces that its ops really hold, in another order if that is better, and allowed."""
    graph, order = drafted.lowered.graph, drafted.plan.order
    workspaces = [0] * len(graph.ops)
    for position, (index, live) in enumerate(zip(order, memory_profile(graph, order), strict=True)):
        excess = recording.peaks.get(position, 0) - (live - graph.ops[index].workspace)
        workspaces[index] = max(workspaces[index], excess)
    ops = tuple(replace(op, workspace=size) for op, size in zip(graph.ops, workspaces, strict=True))
    graph = replace(graph, ops=ops)
    found = _ordered(graph, options)
    peak = peak_bytes(graph, order)
    if peak <= found.peak_bytes or not reorder:
        found = replace(found, order=order, peak_bytes=peak, method=drafted.plan.method)
    plan = Plan.of(graph, replace(found, seconds=found.seconds + drafted.plan.seconds))
    verify(graph, plan)
    return replace(drafted, lowered=replace(drafted.lowered, graph=graph), plan=plan)


def with_addresses(drafted: Draft, recording: Recording, options: Options, alignment: int) -> tuple[Draft, list[int]]:
    """The draft with an address for everything that was recorded, and the offset of each recorded allocation."""
    inside = [allocation for allocation in recording.allocations if allocation.end is not None]
    intervals = [(a.start, a.end, a.size) for a in inside if a.end is not None]
    with stage(f"placing {len(inside):,} allocations", options.progress):
        found, arena_bytes, bound = pack(intervals, alignment=alignment, time_limit=options.time_limit * _PLACING)
    placed = iter(found)
    offsets = [OUTSIDE if a.end is None else next(placed) for a in recording.allocations]
    graph, order = drafted.lowered.graph, drafted.plan.order
    of_life = {life: offsets[index] for index, life in recording.storages.items()}
    at = [of_life.get((life.start, life.storage), OUTSIDE) for life in live_intervals(graph, order)]
    workspaces = [
        Workspace(allocation.position, offset, allocation.size)
        for index, (allocation, offset) in enumerate(zip(recording.allocations, offsets, strict=True))
        if index not in recording.storages and offset != OUTSIDE
    ]
    addresses = Addresses(
        offsets=tuple(None if offset == OUTSIDE else offset for offset in at),
        workspaces=tuple(workspaces),
        arena_bytes=arena_bytes,
        lower_bound_bytes=bound,
    )
    plan = drafted.plan.at(addresses)
    verify(graph, plan)
    return replace(drafted, plan=plan), offsets


def _ordered(graph: Graph, options: Options) -> Schedule:
    if not options.reorder:
        return program_order(graph)
    with stage(f"ordering {len(graph.ops):,} ops", options.progress):
        return schedule(graph, time_limit=options.time_limit)
