"""What a run asks of an allocator: the allocations and releases of a graph's steps, in order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, TypeAlias

from olla.graph.graph import Graph
from olla.graph.lifetimes import live_intervals

__all__ = ["Allocate", "Event", "Release", "eager_events_of", "events_of", "lifetimes_of"]


class Allocate(NamedTuple):
    """``size`` bytes are asked for, and called ``name`` until they are released."""

    name: int
    size: int


class Release(NamedTuple):
    """What was called ``name`` is given back."""

    name: int


Event: TypeAlias = Allocate | Release


def eager_events_of(graph: Graph) -> tuple[Event, ...]:
    """What one step of eager PyTorch asks of the allocator: program order, and all that an op does without."""
    storages, ops = [replace(storage, size=storage.eager_size) for storage in graph.storages], []
    latest = list(range(len(storages)))  # what holds the contents of each storage
    for op in graph.ops:
        own = [storage for storage in op.writes if not storages[storage].persistent]
        over = [storage for storage in own if 0 < graph.storages[storage].size <= op.reused]  # else it is temporaries
        moved = {storage: len(storages) + position for position, storage in enumerate(over)}
        reads = tuple(latest[storage] for storage in op.reads + tuple(over))
        writes = tuple(latest[storage] for storage in op.writes if storage not in moved)
        creates, results = op.creates + tuple(moved.values()), sum(storages[storage].size for storage in over)
        workspace = op.workspace + max(0, op.reused - results)
        ops.append(replace(op, creates=creates, reads=reads, writes=writes, workspace=workspace, reused=0))
        for storage, result in moved.items():
            storages.append(storages[storage])
            latest[storage] = result
    eager = Graph(tuple(ops), tuple(storages), tuple(latest[storage] for storage in graph.outputs))
    return events_of(eager, range(len(ops)))


def events_of(graph: Graph, order: Sequence[int]) -> tuple[Event, ...]:
    """What one step asks of the allocator when the ops run in ``order``.

    An op first allocates what it creates, then takes and gives back its workspace, then releases what
    it used last. Outputs are not released. Persistent storages are no part of it, nor is what has no
    bytes, for which PyTorch asks nothing.
    """
    lives = live_intervals(graph, order)
    sizes = [graph.storages[life.storage].size for life in lives]
    starting, ending = defaultdict[int, list[int]](list), defaultdict[int, list[int]](list)
    for name, (storage, start, end) in enumerate(lives):
        if sizes[name]:
            starting[start].append(name)
            if storage not in graph.outputs or end < len(order):
                ending[end].append(name)
    events: list[Event] = []
    for step, index in enumerate(order):
        events += [Allocate(name, sizes[name]) for name in starting[step]]
        if graph.ops[index].workspace:
            events += [Allocate(len(lives), graph.ops[index].workspace), Release(len(lives))]
        events += [Release(name) for name in ending[step + 1]]
    return tuple(events)


def lifetimes_of(events: Sequence[Event]) -> list[tuple[int, int, int]]:
    """(start, end, bytes) of each allocation, in their order; half-open, counted in events."""
    open_: dict[int, int] = {}
    lives: list[tuple[int, int, int]] = []
    for now, event in enumerate(events):
        if isinstance(event, Allocate):
            open_[event.name] = len(lives)
            lives.append((now, len(events), event.size))
        else:
            index = open_.pop(event.name)
            lives[index] = (lives[index][0], now, lives[index][2])
    return lives
