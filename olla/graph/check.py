"""The independent checker: it recomputes what a plan claims, and trusts nothing.

It shares no code with the planners, nor with ``lifetimes.py``: it runs the order on paper, one
step at a time, keeping track of which storages exist and what they contain.
"""

from __future__ import annotations

from bisect import bisect, bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from olla.errors import InvalidPlanError
from olla.graph.graph import Graph
from olla.graph.plan import Placement, Plan, Spill

__all__ = ["Violation", "ViolationKind", "check", "verify", "verify_placement"]


class ViolationKind(Enum):
    """What can be wrong with a plan."""

    WRONG_GRAPH = "the plan was made for another graph"
    UNKNOWN_OP = "the order names an op that does not exist"
    MISSING_OP = "an op never runs"
    UNDECLARED_REPEAT = "an op runs again without being declared as recomputed, or the reverse"
    REPEATED_EFFECT = "an op that changes persistent state, or draws random numbers, runs twice"
    ABSENT_STORAGE = "an op touches a storage that is not in memory"
    WRONG_SPILL = "a storage is spilled where there is nothing to spill, or nobody waits for its return"
    STALE_STORAGE = "an op touches a storage whose contents are older or newer than in program order"
    WRONG_PEAK = "the peak is not what the order needs"
    WRONG_BASELINE = "the baseline is not what program order needs"
    WRONG_PERSISTENT = "the persistent bytes are not those of the graph"
    BOUND_ABOVE_PEAK = "the lower bound exceeds the peak that is reached"
    WRONG_OFFSETS = "there is not one offset for each life of each storage"
    WRONG_WORKSPACES = "a workspace has no place in the arena"
    OUTSIDE_ARENA = "a storage or a workspace leaves the arena"
    OVERLAP = "storages or workspaces that are alive together share bytes"
    WRONG_ARENA = "the arena is larger than its highest address, or smaller than claimed possible"


@dataclass(frozen=True, slots=True)
class Violation:
    """One thing that is wrong with a plan, and where."""

    kind: ViolationKind
    detail: str

    def __str__(self) -> str:
        return f"{self.kind.value}: {self.detail}"


@dataclass(slots=True)
class _Life:
    storage: int
    start: int
    end: int  # half-open


def check(graph: Graph, plan: Plan) -> tuple[Violation, ...]:
    """Everything that is wrong with ``plan`` as a plan for ``graph``; empty if it is sound."""
    if plan.graph_digest != graph.digest:
        return (Violation(ViolationKind.WRONG_GRAPH, "the digests differ; plan this graph again"),)
    unknown = [op for op in plan.order if not 0 <= op < len(graph.ops)]
    if unknown:
        return (Violation(ViolationKind.UNKNOWN_OP, f"op {unknown[0]} of {len(graph.ops)}"),)
    wrong = tuple(_spills(graph, plan))
    if wrong:
        return wrong
    return (*_completeness(graph, plan), *_contents(graph, plan), *_bytes(graph, plan), *_addresses(graph, plan))


def verify(graph: Graph, plan: Plan) -> None:
    """Raise unless :func:`check` finds nothing.

    Raises
    ------
    InvalidPlanError
        With the first violations spelled out.
    """
    violations = check(graph, plan)
    if violations:
        shown = "; ".join(str(violation) for violation in violations[:3])
        raise InvalidPlanError(f"{len(violations)} violation(s): {shown}")


def verify_placement(intervals: Sequence[tuple[int, int, int]], placement: Placement, *, alignment: int = 1) -> None:
    """Raise unless ``placement`` is one of the (start, end, bytes), half-open, and as large as it says.

    Raises
    ------
    InvalidPlanError
        With what is wrong first.
    """
    if len(placement.offsets) != len(intervals):
        raise InvalidPlanError(f"{len(placement.offsets)} offsets for {len(intervals)} buffers")
    for index, offset in enumerate(placement.offsets):
        if offset < 0 or offset % alignment:
            raise InvalidPlanError(
                f"buffer {index} is at {offset:,}, which is not a multiple of {alignment} in the arena"
            )
    # In order of time, what ends before what begins; who is there, in order of addresses.
    changes = [(end, False, index) for index, (_, end, _) in enumerate(intervals)]
    changes += [(start, True, index) for index, (start, _, _) in enumerate(intervals)]
    there: list[tuple[int, int, int]] = []  # low, high, buffer
    live = most = top = 0
    for _, begins, index in sorted(changes):
        size, low = intervals[index][2], placement.offsets[index]
        block = low, low + size, index
        if not size:
            continue
        live += size if begins else -size
        most, top = max(most, live), max(top, low + size)
        if not begins:
            del there[bisect_left(there, block)]
            continue
        place = bisect(there, block)
        for other in there[max(0, place - 1) : place + 1]:
            if other[0] < block[1] and low < other[1]:
                raise InvalidPlanError(f"buffers {other[2]} and {index} are there together and share bytes")
        there.insert(place, block)
    if (placement.arena_bytes, placement.lower_bound_bytes) != (top, most):
        claimed = f"{placement.arena_bytes:,} bytes, and at least {placement.lower_bound_bytes:,}, claimed"
        raise InvalidPlanError(f"{claimed}, but {top:,} and {most:,} needed")


def _spills(graph: Graph, plan: Plan) -> Iterator[Violation]:
    """Every spill is inside of a life, and apart from other spills of it."""
    free = _lives(graph, plan.order)
    for storage, away, back in sorted(plan.spills):
        for life in free:
            last = life.end if storage in graph.outputs and life.end == len(plan.order) else life.end - 1
            if life.storage == storage and life.start < away < back <= last:
                life.start = back  # spills are sorted: others of this life come later
                break
        else:
            where = f"storage {storage} from step {away} to {back} of {len(plan.order)}"
            yield Violation(ViolationKind.WRONG_SPILL, where)


def _completeness(graph: Graph, plan: Plan) -> Iterator[Violation]:
    runs = [0] * len(graph.ops)
    for op in plan.order:
        runs[op] += 1
    for op, count in enumerate(runs):
        where = _op(graph, op)
        if count == 0:
            yield Violation(ViolationKind.MISSING_OP, where)
            continue
        declared = plan.recomputed.count(op)
        if count - 1 != declared:
            yield Violation(
                ViolationKind.UNDECLARED_REPEAT, f"{where} runs {count} times, {declared} recomputations are declared"
            )
        once = graph.ops[op].writes_once
        if count > 1 and any(graph.storages[s].persistent and s not in once for s in graph.ops[op].writes):
            yield Violation(ViolationKind.REPEATED_EFFECT, where)


def _contents(graph: Graph, plan: Plan) -> Iterator[Violation]:
    """Every op finds in each storage the contents that it would find in program order.

    The contents are counted: a storage just created is at version 1, a persistent one starts at
    version 0, and each op that writes it in place takes it to the next version.
    """
    expected = _versions_in_program_order(graph)
    version = {index: 0 for index, storage in enumerate(graph.storages) if storage.persistent}
    away = {(spill.storage, step) for spill in plan.spills for step in range(spill.start, spill.end)}
    seen: set[int] = set()
    for step, index in enumerate(plan.order):
        op = graph.ops[index]
        writes = [storage for storage in op.writes if index not in seen or storage not in op.writes_once]
        seen.add(index)
        for storage in (*op.reads, *writes):
            where = f"step {step}, {_op(graph, index)}, {_storage(graph, storage)}"
            if storage not in version or (storage, step) in away:
                yield Violation(ViolationKind.ABSENT_STORAGE, where)
            elif version[storage] != expected[index, storage]:
                found = f"version {version[storage]} instead of {expected[index, storage]}"
                yield Violation(ViolationKind.STALE_STORAGE, f"{where}: {found}")
        for storage in op.creates:
            version[storage] = 1
        for storage in writes:
            version[storage] = expected[index, storage] + 1
    for storage in graph.outputs:
        final = sum(storage in op.creates + op.writes for op in graph.ops)
        if version.get(storage) != final:
            where = f"at the end, output {_storage(graph, storage)}"
            yield Violation(ViolationKind.STALE_STORAGE, f"{where}: version {version.get(storage)} instead of {final}")


def _versions_in_program_order(graph: Graph) -> dict[tuple[int, int], int]:
    version = [0] * len(graph.storages)
    expected: dict[tuple[int, int], int] = {}
    for index, op in enumerate(graph.ops):
        for storage in op.reads + op.writes:
            expected[index, storage] = version[storage]
        for storage in op.creates + op.writes:
            version[storage] += 1
    return expected


def _bytes(graph: Graph, plan: Plan) -> Iterator[Violation]:
    peak = _peak(graph, plan.order, plan.spills)
    if plan.peak_bytes != peak:
        yield Violation(ViolationKind.WRONG_PEAK, f"{plan.peak_bytes:,} bytes claimed, {peak:,} needed")
    if plan.lower_bound_bytes > peak:
        yield Violation(ViolationKind.BOUND_ABOVE_PEAK, f"bound {plan.lower_bound_bytes:,}, peak {peak:,} bytes")
    baseline = _peak(graph, tuple(range(len(graph.ops))), eager=True)
    if plan.baseline_peak_bytes != baseline:
        yield Violation(ViolationKind.WRONG_BASELINE, f"{plan.baseline_peak_bytes:,} claimed, {baseline:,} needed")
    persistent = sum(storage.size for storage in graph.storages if storage.persistent)
    if plan.persistent_bytes != persistent:
        yield Violation(ViolationKind.WRONG_PERSISTENT, f"{plan.persistent_bytes:,} claimed, {persistent:,} needed")


def _peak(graph: Graph, order: tuple[int, ...], spills: tuple[Spill, ...] = (), *, eager: bool = False) -> int:
    starting: list[int] = [0] * (len(order) + 1)
    ending: list[int] = [0] * (len(order) + 1)
    for life in _lives(graph, order):
        storage = graph.storages[life.storage]
        size = storage.eager_size if eager else storage.size
        starting[life.start] += size
        ending[life.end] += size
    for spill in spills:
        ending[spill.start] += graph.storages[spill.storage].size
        starting[spill.end] += graph.storages[spill.storage].size
    live = 0
    peak = sum(graph.storages[s].size for s in set(graph.outputs) if not graph.storages[s].persistent)  # in the end
    for step, index in enumerate(order):
        live += starting[step] - ending[step]
        peak = max(peak, live + graph.ops[index].workspace + (graph.ops[index].reused if eager else 0))
    return peak


def _addresses(graph: Graph, plan: Plan) -> Iterator[Violation]:
    if plan.offsets is None:
        if plan.workspaces or plan.arena_bytes is not None or plan.arena_lower_bound_bytes is not None:
            yield Violation(ViolationKind.WRONG_OFFSETS, "an arena without offsets")
        return
    lives = _lives(graph, plan.order)
    for spill in plan.spills:
        life = next(life for life in lives if life.storage == spill.storage and life.start < spill.start < life.end)
        lives.append(_Life(spill.storage, spill.end, life.end))
        life.end = spill.start
    lives = [life for life in lives if life.start < life.end]
    lives.sort(key=lambda life: (life.start, life.storage))
    if plan.arena_bytes is None or plan.arena_lower_bound_bytes is None or len(plan.offsets) != len(lives):
        yield Violation(ViolationKind.WRONG_OFFSETS, f"{len(plan.offsets)} offsets for {len(lives)} lives")
        return
    blocks: list[_Block] = []
    for life, offset in zip(lives, plan.offsets, strict=True):
        if offset is not None:
            top = offset + graph.storages[life.storage].size
            name = _storage(graph, life.storage)
            blocks.append(_Block(name, life.start, life.end, offset, top, made_at=life.start))
    yield from _workspaces(graph, plan, blocks)
    top = max((block.high for block in blocks), default=0)
    for block in blocks:
        if block.low < 0 or block.high > plan.arena_bytes:
            yield Violation(ViolationKind.OUTSIDE_ARENA, f"{block.name} at [{block.low:,}, {block.high:,})")
    yield from _overlaps(blocks)
    if top < plan.arena_bytes:
        yield Violation(ViolationKind.WRONG_ARENA, f"{plan.arena_bytes:,} bytes claimed, {top:,} used")
    if plan.arena_lower_bound_bytes > plan.arena_bytes:
        yield Violation(
            ViolationKind.WRONG_ARENA, f"bound {plan.arena_lower_bound_bytes:,}, {plan.arena_bytes:,} bytes"
        )


@dataclass(slots=True)
class _Block:
    """Bytes of the arena, for some steps."""

    name: str
    start: int
    end: int
    low: int
    high: int
    made_at: int | None  # the step at which an op creates it; None: a workspace


def _workspaces(graph: Graph, plan: Plan, blocks: list[_Block]) -> Iterator[Violation]:
    """Add the workspaces to ``blocks``."""
    created: dict[int, list[_Block]] = {}
    for block in blocks:
        created.setdefault(block.start, []).append(block)
    working: dict[int, list[_Block]] = {}
    for step, offset, size in plan.workspaces:
        if not 0 <= step < len(plan.order) or size < 0:
            yield Violation(ViolationKind.WRONG_WORKSPACES, f"{size:,} bytes at step {step} of {len(plan.order)}")
            continue
        name = f"the workspace of {_op(graph, plan.order[step])}"
        working.setdefault(step, []).append(_Block(name, step, step + 1, offset, offset + size, made_at=None))
    for step, index in enumerate(plan.order):
        # Workspaces may be where a result comes later, but these bytes do not count.
        results = created.get(step, [])
        placed = _covered(results + working.get(step, [])) - _covered(results)
        if placed < graph.ops[index].workspace:
            needed = f"needs {graph.ops[index].workspace:,} bytes, {placed:,} are placed"
            yield Violation(ViolationKind.WRONG_WORKSPACES, f"step {step}, {_op(graph, index)}: {needed}")
    for found in working.values():
        blocks.extend(found)


def _covered(blocks: list[_Block]) -> int:
    """How many bytes belong to at least one of the blocks."""
    covered, top = 0, -1
    for block in sorted(blocks, key=lambda block: block.low):
        covered += max(0, block.high - max(block.low, top))
        top = max(top, block.high)
    return covered


def _overlaps(blocks: list[_Block]) -> Iterator[Violation]:
    placed: list[_Block] = []
    for block in sorted(blocks, key=lambda block: block.start):
        placed = [other for other in placed if other.end > block.start]
        for other in placed:
            if block.low < other.high and other.low < block.high and not _one_after_the_other(block, other):
                yield Violation(ViolationKind.OVERLAP, f"{other.name} and {block.name} at step {block.start}")
        placed.append(block)


def _one_after_the_other(one: _Block, other: _Block) -> bool:
    """Within one op, a workspace may be given back before another one, or a result, is allocated."""
    times = {one.start, one.made_at} & {other.start, other.made_at} - {None}
    return bool(times) and None in (one.made_at, other.made_at)


def _lives(graph: Graph, order: tuple[int, ...]) -> list[_Life]:
    """One life per creation, sorted by start and storage; see ``live_intervals``."""
    current: dict[int, _Life] = {}
    lives: list[_Life] = []
    for step, index in enumerate(order):
        op = graph.ops[index]
        for storage in op.creates:
            current[storage] = _Life(storage, step, step + 1)
            lives.append(current[storage])
        for storage in op.reads + op.writes:
            if storage in current:
                current[storage].end = step + 1
    for storage in graph.outputs:
        if storage in current:
            current[storage].end = len(order)
    lives.sort(key=lambda life: (life.start, life.storage))
    return lives


def _op(graph: Graph, op: int) -> str:
    return f"op {op} ({graph.ops[op].name!r})"


def _storage(graph: Graph, storage: int) -> str:
    return f"storage {storage} ({graph.storages[storage].name!r})"
