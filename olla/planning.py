"""The stages in order: a program is captured and ordered; once it has run and was recorded, it is placed."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from olla.cache import Cache, digest
from olla.capture.average import START_SUM, start_as_soon_as_possible
from olla.capture.chain import chained, collectives, unchained
from olla.capture.costs import estimated_seconds
from olla.capture.lower import Lowered, lower
from olla.capture.program import Program
from olla.capture.reuse import reuse
from olla.capture.rewrite.weight_gradient import bytes_of_slices, compute_in_slices, fewer_slices
from olla.capture.trace import Trace, trace
from olla.errors import CaptureError, InfeasibleError, InvalidPlanError
from olla.fit.budget import Budget, bytes_of
from olla.fit.fitting import fitted
from olla.fit.frontier import Frontier, frontier
from olla.fit.spill import Bandwidth, spill_seconds
from olla.graph.check import verify, verify_placement
from olla.graph.graph import Graph
from olla.graph.lifetimes import eager_peak_bytes, live_intervals, memory_profile, peak_bytes
from olla.graph.plan import Addresses, Placement, Plan, Schedule, Workspace
from olla.ilp.improve import improved_order, improved_placement, improved_plan
from olla.order.schedule import program_order, schedule
from olla.place.place import ALIGNMENT, Interval, pack, place
from olla.run.ranks import ALONE, Ranks
from olla.run.recording import Recording
from olla.run.spill import HOST, SpillDir, measured_bandwidth
from olla.show.progress import stage
from olla.torch_private import is_collective

__all__ = [
    "ORDERING",
    "Draft",
    "Options",
    "addressed",
    "budget_of",
    "capture",
    "closest",
    "draft",
    "exceeds_budget",
    "measured",
    "ordered",
    "trade",
    "unplanned",
    "with_addresses",
    "with_estimated_addresses",
    "with_workspaces",
]

log = logging.getLogger(__name__)

ORDERING = 1 / 8  # of the time limit, where the last byte of an order does not matter, as within a budget
_PLACING = 1 / 6  # of the time limit; nearly always, a moment is enough
_FITTING = 0.09  # of the time limit, since ops are not measured yet,
_PATIENCE = 0.36  # to find what fits at all;
_FITTING_AGAIN = 0.13  # then, as often as fits took less
_FITTED = 0.29  # than that; then a plan that fits stays,
_BOUNDING = 0.1  # and only its bound is raised;
_FITTINGS = 0.47  # all fits of a step may take that,
_LATE = 0.01  # and each one after that, a moment
_FASTER = 0.99  # of the extra time: what takes less than that is worth running in another order
OUTSIDE = -1  # instead of an offset


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asked for; see :func:`olla.optimize`."""

    reorder: bool = True
    place: bool = True
    memory_budget: Budget | None = None
    spill_dir: SpillDir | None = None
    solver: str | None = None
    time_limit: float = 60.0
    progress: bool | None = None
    cache: Cache | None = None
    background: bool = False


@dataclass(frozen=True, slots=True)
class Draft:
    """A captured step and its plan."""

    traced: Trace
    lowered: Lowered
    plan: Plan
    seconds: tuple[float, ...]  # of each op: estimated, and later measured
    capture_seconds: float


def capture(program: Program, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options) -> tuple[Trace, Lowered]:
    """The step for these arguments as a graph, not planned."""
    with stage("capturing the step", options.progress):
        traced = trace(program, args, kwargs)
        start_as_soon_as_possible(traced.module.graph)
        lowered = lower(program, traced)
        _require_ranks(program, lowered)
        return traced, lower(program, traced, reuse(lowered))


def _require_ranks(program: Program, lowered: Lowered) -> None:
    """Raise :class:`CaptureError` if the step exchanges tensors with processes that do not follow the same plan."""
    for op, node in zip(lowered.graph.ops, lowered.nodes, strict=True):
        if is_collective(node.target):
            raise CaptureError(
                f"the step calls a collective ({op.name}) at {op.source or 'a line unknown'}: "
                "only gradients can be exchanged, by olla.average_gradients"
            )
        if node.target is START_SUM and program.process_group is None:
            raise CaptureError(
                "the step averages gradients with other processes: pass process_group= to olla.optimize_step, too, "
                "so that all of them follow one plan"
            )


def draft(
    program: Program, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options, ranks: Ranks = ALONE
) -> Draft:
    """The step for these arguments with a plan of its order, that of rank 0."""
    return ordered(unplanned(program, args, kwargs, options, ranks), options, ranks)


def unplanned(
    program: Program, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options, ranks: Ranks = ALONE
) -> Draft:
    """The step for these arguments, which is that of all ranks, in the order of its program."""
    started = time.perf_counter()
    traced, lowered = ranks.together(lambda: capture(program, args, kwargs, options))
    capture_seconds = time.perf_counter() - started
    ranks.require_same(_described(program, traced, lowered.graph))
    plan = Plan.of(lowered.graph, program_order(lowered.graph))
    return Draft(traced, lowered, plan, estimated_seconds(lowered), capture_seconds)


def ordered(drafted: Draft, options: Options, ranks: Ranks = ALONE) -> Draft:
    """The draft with a plan of its order, that of rank 0."""
    lowered = _with_best_chain(drafted.lowered, options, ranks)
    graph, seconds = lowered.graph, estimated_seconds(lowered)
    found = ranks.from_first(
        lambda: _planned(graph, seconds, options, "order", lambda: Plan.of(graph, _ordered(graph, seconds, options)))
    )
    lowered = _with_large_slices(lowered, found)
    plan = Plan.of(lowered.graph, found.schedule)
    verify(lowered.graph, plan)
    return replace(drafted, lowered=lowered, plan=plan, seconds=seconds)


def _with_best_chain(lowered: Lowered, options: Options, ranks: Ranks) -> Lowered:
    """Collectives keep the order that they have where nothing keeps them in one: that order costs no bytes."""
    if len(collectives(lowered)) < 2 or not options.reorder:
        return lowered
    free, seconds = unchained(lowered), estimated_seconds(lowered)
    options = replace(options, memory_budget=None, solver=None)
    found = ranks.from_first(
        lambda: _planned(free, seconds, options, "order", lambda: Plan.of(free, _ordered(free, seconds, options)))
    )
    return chained(lowered, found.order)


def _described(program: Program, traced: Trace, graph: Graph) -> list[str]:
    """What the plan and the tensors that are exchanged depend on, a line for each input and operator."""
    names = iter([f"{program.display_name(name)}" for name in program.state])
    lines = []
    for node in traced.module.graph.find_nodes(op="placeholder"):
        tensor = node.meta["val"]
        lines.append(
            f"{next(names, 'an input')} of {tensor.dtype}, shape {[*tensor.shape]}, strides {[*tensor.stride()]}"
        )
    lines += [f"operator {index}, {op.name}" for index, op in enumerate(graph.ops)]
    return [*lines, f"a graph with digest {graph.digest}"]


def _with_large_slices(lowered: Lowered, found: Plan) -> Lowered:
    """Gradients of weights are computed in no more slices than there is room for, since each takes time."""
    graph = lowered.graph
    memory, ops = memory_profile(graph, found.order, found.spills), list(graph.ops)
    for index, live in zip(found.order, memory, strict=True):
        node = lowered.nodes[index]
        room = max(memory) - live + ops[index].workspace
        for slices in fewer_slices(node):
            workspace = bytes_of_slices(node, slices)
            if workspace <= room:
                compute_in_slices(node, slices)
                ops[index] = replace(ops[index], workspace=workspace)
                break
    return replace(lowered, graph=replace(graph, ops=tuple(ops)))


def with_estimated_addresses(drafted: Draft, options: Options) -> Draft:
    """The draft placed before it has ever run, with the workspaces that are expected."""
    graph, plan = drafted.lowered.graph, drafted.plan
    plan = _planned(graph, drafted.seconds, options, "addresses", lambda: _placed(graph, plan, options), plan)
    return replace(drafted, plan=plan)


def with_workspaces(
    drafted: Draft, recording: Recording, options: Options, *, reorder: bool, ranks: Ranks = ALONE
) -> Draft:
    """The draft with the bytes that its ops really allocate, in another order if that is better, and allowed.

    With other ``ranks``, all take the order of rank 0, made for the most bytes and seconds that each op takes on any.
    """
    plan = drafted.plan
    graph = measured(drafted.lowered.graph, plan, recording)
    shared, seconds = _slowest(graph, drafted.seconds, ranks)
    what = "order after recording" if reorder else "bound after recording"
    found = ranks.from_first(
        lambda: _planned(shared, seconds, options, what, lambda: _again(shared, plan, seconds, options, reorder), plan)
    )
    plan = Plan.of(graph, _here(graph, shared, found.schedule))
    verify(graph, plan)
    return replace(drafted, lowered=replace(drafted.lowered, graph=graph), plan=plan, seconds=seconds)


def _again(graph: Graph, plan: Plan, seconds: Sequence[float], options: Options, reorder: bool) -> Plan:
    """The plan of a step that was recorded, for what its graph has turned out to be, or a better one."""
    peak, limit = peak_bytes(graph, plan.order, plan.spills), options.time_limit
    has_budget, is_over = options.memory_budget is not None, exceeds_budget(graph, peak, options)
    reorder = reorder and (is_over or not has_budget or plan.seconds < limit * _FITTED)
    found = closest(graph, seconds, options, plan.schedule, improve=reorder)
    if not reorder or not _is_better(graph, found, plan, seconds, options):
        extra = _extra_seconds(graph, plan, seconds, options)
        if is_over:
            log.warning("the step needs %s bytes, more than its budget", f"{graph.persistent_bytes + peak:,}")
        elif reorder and has_budget:  # the plan stays: more time for its bound
            spent = found.seconds + plan.seconds
            again = closest(graph, seconds, options, replace(plan.schedule, seconds=spent), improve=False)
            least = max(found.extra_seconds_lower_bound, again.extra_seconds_lower_bound)
            found = replace(found, extra_seconds_lower_bound=least, seconds=found.seconds + again.seconds)
        found = replace(
            found,
            order=plan.order,
            peak_bytes=peak,
            lower_bound_bytes=min(peak, found.lower_bound_bytes),
            method=plan.method,
            spills=plan.spills,
            extra_seconds=extra,
            extra_seconds_lower_bound=min(extra, found.extra_seconds_lower_bound),
        )
    plan = Plan.of(graph, replace(found, seconds=found.seconds + plan.seconds))
    if options.solver and options.place and reorder:
        plan = _placed(graph, plan, options).at(None)  # perhaps another order has a smaller arena
    return plan


def _here(graph: Graph, shared: Graph, found: Schedule) -> Schedule:
    """A schedule of the ``shared`` graph as one of ``graph``, whose ops are the same but for smaller workspaces."""
    smaller = max((a.workspace - b.workspace for a, b in zip(shared.ops, graph.ops, strict=True)), default=0)
    peak = peak_bytes(graph, found.order, found.spills)
    return replace(found, peak_bytes=peak, lower_bound_bytes=max(0, min(peak, found.lower_bound_bytes - smaller)))


def _slowest(graph: Graph, seconds: Sequence[float], ranks: Ranks) -> tuple[Graph, tuple[float, ...]]:
    """The graph with the largest workspaces of all ranks, and the longest times."""
    count = len(graph.ops)
    found = ranks.largest([*(op.workspace for op in graph.ops), *seconds])
    ops = tuple(replace(op, workspace=int(most)) for op, most in zip(graph.ops, found[:count], strict=True))
    return replace(graph, ops=ops), tuple(found[count:])


def _is_better(graph: Graph, found: Schedule, plan: Plan, seconds: Sequence[float], options: Options) -> bool:
    """Whether another schedule is worth recording the step again."""
    peak = peak_bytes(graph, plan.order, plan.spills)
    if options.memory_budget is None:
        return found.peak_bytes < peak
    extra = _extra_seconds(graph, plan, seconds, options)
    return exceeds_budget(graph, peak, options) or found.extra_seconds < _FASTER * extra


def _extra_seconds(graph: Graph, plan: Plan, seconds: Sequence[float], options: Options) -> float:
    """What recomputing and spilling take, as far as is known now."""
    repeated = sum(seconds[op] for op in plan.recomputed)
    if not plan.spills or options.spill_dir is None:
        return repeated
    return repeated + spill_seconds(graph, plan.spills, measured_bandwidth(options.spill_dir))


def measured(graph: Graph, plan: Plan, recording: Recording) -> Graph:
    """The graph with the sizes and workspaces that were recorded when it ran as planned."""
    sizes = {storage: recording.allocations[index].size for index, (_, storage) in recording.storages.items()}
    storages = tuple(replace(s, size=sizes.get(index, s.size)) for index, s in enumerate(graph.storages))
    graph = replace(graph, storages=storages, ops=tuple(replace(op, workspace=0) for op in graph.ops))
    workspaces = [0] * len(graph.ops)
    profile = memory_profile(graph, plan.order, plan.spills)
    for position, (index, live) in enumerate(zip(plan.order, profile, strict=True)):
        workspaces[index] = max(workspaces[index], recording.peaks.get(position, 0) - live)
    return replace(graph, ops=tuple(replace(o, workspace=w) for o, w in zip(graph.ops, workspaces, strict=True)))


def with_addresses(drafted: Draft, recording: Recording, options: Options, alignment: int) -> tuple[Draft, list[int]]:
    """The draft with an address for everything that was recorded, and the offset of each recorded allocation."""
    plan, offsets = addressed(drafted.lowered.graph, drafted.plan, recording, options, alignment)
    return replace(drafted, plan=plan), offsets


def addressed(
    graph: Graph, plan: Plan, recording: Recording, options: Options, alignment: int
) -> tuple[Plan, list[int]]:
    """The plan with an address for everything that was recorded, and the offset of each recorded allocation.

    Sizes and workspaces of the graph are those that were recorded; see :func:`measured`.
    """
    inside = [allocation for allocation in recording.allocations if allocation.end is not None]
    intervals = [(a.start, a.end, a.size) for a in inside if a.end is not None]
    found = _packed(intervals, alignment, options)
    placed = iter(found.offsets)
    offsets = [OUTSIDE if a.end is None else next(placed) for a in recording.allocations]
    of_life = {life: offsets[index] for index, life in recording.storages.items()}
    lives = live_intervals(graph, plan.order, plan.spills)
    at = [of_life.get((life.start, life.storage), OUTSIDE) for life in lives]
    # What no op returns: a workspace, of more than one op if it is kept in between.
    workspaces = [
        Workspace(step, offset, allocation.size)
        for index, (allocation, offset) in enumerate(zip(recording.allocations, offsets, strict=True))
        if index not in recording.storages and offset != OUTSIDE
        for step in range(max(0, allocation.position), min(allocation.last_position + 1, len(plan.order)))
    ]
    addresses = Addresses(
        offsets=tuple(None if offset == OUTSIDE else offset for offset in at),
        workspaces=tuple(workspaces),
        arena_bytes=found.arena_bytes,
        lower_bound_bytes=found.lower_bound_bytes,
    )
    plan = plan.at(addresses)
    verify(graph, plan)
    return plan, offsets


def _packed(intervals: Sequence[Interval], alignment: int, options: Options) -> Placement:
    """A placement of (start, end, bytes): one that is kept, or what the planners find."""
    key = {"what": "placement", "of": digest([intervals, alignment]), "solver": options.solver}

    def read(data: dict[str, Any]) -> Placement:
        found = Placement.from_dict(data)
        verify_placement(intervals, found, alignment=alignment)
        return found

    kept = options.cache.find(key, options.time_limit, read) if options.cache else None
    if kept is not None:
        return kept
    with stage(f"placing {len(intervals):,} allocations", options.progress):
        found = pack(intervals, alignment=alignment, time_limit=options.time_limit * _PLACING)
    if options.solver:
        with stage(f"placing with {options.solver}", options.progress):
            found = improved_placement(
                intervals, found, alignment=alignment, solver=options.solver, time_limit=options.time_limit
            )
    if options.cache:
        options.cache.keep(key, None if found.status == "optimal" else options.time_limit, found.to_dict())
    return found


def trade(lowered: Lowered, points: int, options: Options) -> Frontier:
    """What smaller and smaller budgets cost, with times that are estimated: the curve that is kept, or a new one."""
    graph, seconds = lowered.graph, estimated_seconds(lowered)

    def search() -> Frontier:
        start = _ordered(graph, seconds, options)
        with stage(f"fitting {points} budgets", options.progress):
            bandwidth, limit = _bandwidth(options), options.time_limit
            return frontier(graph, start, seconds, bandwidth=bandwidth, points=points, time_limit=limit)

    if options.cache is None:
        return search()
    times = digest([seconds, _bandwidth(options)])
    key = {**_key(graph, options, "frontier", None, None), "points": points}

    def read(data: dict[str, Any]) -> Frontier:
        plans = data.get("plans")
        if not isinstance(plans, list) or not plans:
            raise InvalidPlanError("it holds no plans")
        found = [_kept(plan, graph, seconds, options, is_same=data.get("times") == times) for plan in plans]
        if any(after.peak_bytes >= before.peak_bytes for before, after in pairwise(found)):
            raise InvalidPlanError("the peaks of its plans do not fall")
        return Frontier.of(graph, [plan.schedule for plan in found], seconds)

    kept = options.cache.find(key, options.time_limit, read)
    if kept is not None:
        return kept
    found = search()
    plans = [Plan.of(graph, schedule).to_dict() for schedule in found.schedules]
    options.cache.keep(key, options.time_limit, {"times": times, "plans": plans})
    return found


def _key(
    graph: Graph, options: Options, what: str, start: Plan | None, budget_bytes: int | None
) -> dict[str, str | int | None]:
    """All that decides what is planned for ``graph``, from ``start``, but the points of a curve."""
    spill_dir = options.spill_dir
    return {
        "what": what,
        "of": digest([graph.digest, None if start is None else [start.order, start.spills]]),
        "reorder": options.reorder,
        "budget_bytes": budget_bytes,
        "spill_dir": spill_dir if spill_dir in (None, HOST) else os.path.abspath(spill_dir),
        "solver": options.solver,
    }


def _kept(data: Any, graph: Graph, seconds: Sequence[float], options: Options, *, is_same: bool) -> Plan:
    """The plan that a file holds, checked; what it takes is computed anew unless it was found for the same seconds."""
    plan = Plan.from_dict(data)
    verify(graph, plan)
    if is_same:
        return plan
    extra = _extra_seconds(graph, plan, seconds, options)
    return replace(plan, extra_seconds=extra, extra_seconds_lower_bound=0.0)


def _planned(
    graph: Graph,
    seconds: Sequence[float],
    options: Options,
    what: str,
    search: Callable[[], Plan],
    start: Plan | None = None,
) -> Plan:
    """The plan that is kept for ``graph``, the options and the order it starts from, or what ``search`` finds; checked.

    Seconds of ops differ from run to run, so they are not in the key: what was found for others keeps to its budget,
    too, and what its repeats and spills take is computed anew. The bound of that holds for the same seconds only.
    """
    if options.cache is None:
        plan = search()
        verify(graph, plan)
        return plan
    budget = None if options.memory_budget is None else budget_of(graph, options)
    times = None if budget is None else digest([seconds, _bandwidth(options)])
    key = _key(graph, options, what, start, budget)

    def is_within(plan: Plan) -> bool:
        return budget is None or plan.persistent_bytes + plan.peak_bytes <= budget

    def read(data: dict[str, Any]) -> Plan:
        plan = _kept(data.get("plan"), graph, seconds, options, is_same=data.get("times") == times)
        if not is_within(plan):
            raise InvalidPlanError("the plan exceeds its budget")
        return plan

    kept = options.cache.find(key, options.time_limit, read)
    if kept is not None:
        return kept
    plan = search()
    verify(graph, plan)
    if is_within(plan):  # else a search with more time, or in another order, may find one that is
        limit = None if _is_best(plan, options) else options.time_limit
        options.cache.keep(key, limit, {"times": times, "plan": plan.to_dict()})
    return plan


def _is_best(plan: Plan, options: Options) -> bool:
    """Whether no search can find a better plan, however long it takes."""
    is_dense = plan.arena_bytes == plan.arena_lower_bound_bytes
    is_free = not plan.recomputed and not plan.spills
    return options.solver is None and plan.status == "optimal" and is_dense and is_free


def _ordered(
    graph: Graph, seconds: Sequence[float], options: Options, known: Schedule | None = None, improve: bool = True
) -> Schedule:
    """The order that the options ask for; within a budget, ``known`` is where the search begins, too."""
    limit = options.time_limit
    if not options.reorder:
        found = program_order(graph)
    else:
        with stage(f"ordering {len(graph.ops):,} ops", options.progress):
            found = schedule(graph, time_limit=limit if options.memory_budget is None else limit * ORDERING)
        if options.solver is not None:
            with stage(f"ordering with {options.solver}", options.progress):
                found = improved_order(graph, found, solver=options.solver, time_limit=limit)
    if options.memory_budget is None:
        return found
    budget, persistent = budget_of(graph, options), graph.persistent_bytes
    with stage("fitting the budget", options.progress):
        try:
            limit, patience = _fitting_seconds(limit, known, improve)
            room, bandwidth = max(0, budget - persistent), _bandwidth(options)
            return fitted(
                graph,
                found,
                seconds,
                room,
                bandwidth=bandwidth,
                known=known,
                improve=improve,
                time_limit=limit,
                patience=patience,
            )
        except InfeasibleError as error:
            raise InfeasibleError(
                f"the step does not fit into {budget:,} bytes, of which {persistent:,} live across steps: {error}; "
                f"the smallest budget is {persistent + error.best_bytes:,} bytes",
                lower_bound_bytes=persistent + error.lower_bound_bytes,
                best_bytes=persistent + error.best_bytes,
            ) from error


def _fitting_seconds(limit: float, known: Schedule | None, improve: bool) -> tuple[float, float]:
    """What a fit may take, and while nothing fits, by the time limit, and what was spent on the same step before."""
    if known is None:
        return limit * _FITTING, limit * _PATIENCE
    share, left = _FITTING_AGAIN if improve else _BOUNDING, limit * _FITTINGS - known.seconds
    return max(limit * _LATE, min(limit * share, left)), left


def _bandwidth(options: Options) -> Bandwidth | None:
    return None if options.spill_dir is None else measured_bandwidth(options.spill_dir)


def budget_of(graph: Graph, options: Options) -> int:
    """What the step may hold at once, with what lives across steps."""
    assert options.memory_budget is not None
    return bytes_of(options.memory_budget, graph.persistent_bytes + eager_peak_bytes(graph))


def exceeds_budget(graph: Graph, peak: int, options: Options) -> bool:
    """Whether a step with this peak holds more than it may at once."""
    return options.memory_budget is not None and graph.persistent_bytes + peak > budget_of(graph, options)


def closest(
    graph: Graph, seconds: Sequence[float], options: Options, known: Schedule | None = None, *, improve: bool = True
) -> Schedule:
    """What keeps to the budget, if there is one, or comes closest to it: training that has begun goes on."""
    started = time.perf_counter()
    try:
        return _ordered(graph, seconds, options, known, improve)
    except InfeasibleError as error:
        log.warning("%s, and is kept instead", error)
        spent, options = time.perf_counter() - started, replace(options, memory_budget=error.best_bytes)
        known = known and replace(known, seconds=known.seconds + spent)
        found = _ordered(graph, seconds, options, known, improve)
        return replace(found, seconds=found.seconds + spent)


def _placed(graph: Graph, plan: Plan, options: Options) -> Plan:
    """The plan with addresses for the workspaces of the graph; a solver may find another order, too."""
    with stage("placing", options.progress):
        plan = plan.at(place(graph, plan.order, plan.spills, time_limit=options.time_limit * _PLACING))
    if options.solver is None or not options.reorder or plan.spills:
        return plan
    with stage(f"ordering and placing with {options.solver}", options.progress):
        return improved_plan(graph, plan, alignment=ALIGNMENT, solver=options.solver, time_limit=options.time_limit)
