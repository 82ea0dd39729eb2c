"""The addresses of a planned step: its storages and workspaces in one arena."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

from olla.errors import InvalidBuffersError
from olla.graph.graph import Graph
from olla.graph.lifetimes import Spill, live_intervals
from olla.graph.plan import Addresses, Placement, Workspace
from olla.place.allocate import allocate
from olla.place.buffers import Buffer
from olla.place.problem import Problem

__all__ = ["Interval", "addresses", "intervals", "pack", "padded", "place", "unpadded"]

Interval: TypeAlias = tuple[int, int, int]  # (start, end, bytes), half-open

_GAP = 5e-4  # of the arena: what is gained below is not worth waiting for
ALIGNMENT = 64  # bytes; what PyTorch gives on CPUs, and a cache line


def place(
    graph: Graph,
    order: Sequence[int],
    spills: Sequence[Spill] = (),
    *,
    alignment: int = ALIGNMENT,
    time_limit: float = 60.0,
) -> Addresses:
    """Addresses for all that ``graph`` allocates when it runs in ``order``.

    Outputs belong to the caller and outlive the step, so they stay outside of the arena.

    Raises
    ------
    InvalidBuffersError
        If ``alignment`` is below 1.
    """
    lives = intervals(graph, order, spills)
    return addresses(graph, order, pack(lives, alignment=alignment, time_limit=time_limit), spills)


def addresses(graph: Graph, order: Sequence[int], found: Placement, spills: Sequence[Spill] = ()) -> Addresses:
    """A placement of :func:`intervals` as the addresses of a plan."""
    placed = iter(found.offsets)
    lives, outputs = live_intervals(graph, order, spills), set(graph.outputs)
    return Addresses(
        offsets=tuple(None if life.storage in outputs else next(placed) for life in lives),
        workspaces=tuple(
            Workspace(step, next(placed), graph.ops[index].workspace)
            for step, index in enumerate(order)
            if graph.ops[index].workspace
        ),
        arena_bytes=found.arena_bytes,
        lower_bound_bytes=found.lower_bound_bytes,
    )


def intervals(graph: Graph, order: Sequence[int], spills: Sequence[Spill] = ()) -> list[Interval]:
    """What is placed: the lives of storages, but of outputs, and then the workspaces."""
    lives = live_intervals(graph, order, spills)
    inside = [
        (start, end, graph.storages[storage].size) for storage, start, end in lives if storage not in graph.outputs
    ]
    working = [(step, step + 1, graph.ops[index].workspace) for step, index in enumerate(order)]
    return inside + [interval for interval in working if interval[2]]


def pack(lives: Sequence[Interval], *, alignment: int, time_limit: float) -> Placement:
    """Place (start, end, bytes) in an arena of which ``alignment`` is asked of offsets only, not of sizes."""
    if alignment < 1:
        raise InvalidBuffersError(f"the alignment is {alignment}: it must be at least 1")
    buffers = padded(lives, alignment)
    return unpadded(lives, allocate(buffers, alignment=alignment, gap=_GAP, time_limit=time_limit))


def padded(lives: Sequence[Interval], alignment: int) -> list[Buffer]:
    """Buffers of full units, so that what is placed upon another one is aligned without a thought."""
    return [Buffer(start, end, -(-size // alignment) * alignment) for start, end, size in lives]


def unpadded(lives: Sequence[Interval], placement: Placement) -> Placement:
    """The placement with the arena and the bound of the true sizes."""
    tops = (offset + size for offset, (_, _, size) in zip(placement.offsets, lives, strict=True))
    bound = Problem.of([Buffer(*interval) for interval in lives]).bound
    return replace(placement, arena_bytes=max(tops, default=0), lower_bound_bytes=bound)
