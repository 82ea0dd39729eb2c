"""The addresses of a planned step: its storages and workspaces in one arena."""

from __future__ import annotations

from collections.abc import Sequence

from olla.errors import InvalidBuffersError
from olla.graph.graph import Graph
from olla.graph.lifetimes import live_intervals
from olla.graph.plan import Addresses, Workspace
from olla.place.allocate import allocate
from olla.place.buffers import Buffer
from olla.place.problem import Problem

__all__ = ["pack", "place"]

_GAP = 5e-4  # of the arena: what is gained below is not worth waiting for
ALIGNMENT = 64  # bytes; what PyTorch gives on CPUs, and a cache line


def place(graph: Graph, order: Sequence[int], *, alignment: int = ALIGNMENT, time_limit: float = 60.0) -> Addresses:
    """Addresses for all that ``graph`` allocates when it runs in ``order``.

    Outputs belong to the caller and outlive the step, so they stay outside of the arena.

    Raises
    ------
    InvalidBuffersError
        If ``alignment`` is below 1.
    """
    outputs = set(graph.outputs)
    lives = live_intervals(graph, order)
    inside = [life for life in lives if life.storage not in outputs]
    working = [(step, graph.ops[index].workspace) for step, index in enumerate(order) if graph.ops[index].workspace]
    intervals = [(life.start, life.end, graph.storages[life.storage].size) for life in inside]
    intervals += [(step, step + 1, size) for step, size in working]
    offsets, arena_bytes, bound = pack(intervals, alignment=alignment, time_limit=time_limit)
    placed = iter(offsets)
    return Addresses(
        offsets=tuple(None if life.storage in outputs else next(placed) for life in lives),
        workspaces=tuple(Workspace(step, next(placed), size) for step, size in working),
        arena_bytes=arena_bytes,
        lower_bound_bytes=bound,
    )


def pack(
    intervals: Sequence[tuple[int, int, int]], *, alignment: int, time_limit: float
) -> tuple[tuple[int, ...], int, int]:
    """Offsets for (start, end, bytes), the bytes that the arena needs, and the most that are alive at once."""
    if alignment < 1:
        raise InvalidBuffersError(f"the alignment is {alignment}: it must be at least 1")
    # Of full units, so that what is placed upon another block is aligned without a thought.
    padded = [Buffer(start, end, -(-size // alignment) * alignment) for start, end, size in intervals]
    offsets = allocate(padded, alignment=alignment, gap=_GAP, time_limit=time_limit).offsets
    arena_bytes = max((offset + size for offset, (_, _, size) in zip(offsets, intervals, strict=True)), default=0)
    return offsets, arena_bytes, Problem.of([Buffer(*interval) for interval in intervals]).bound
