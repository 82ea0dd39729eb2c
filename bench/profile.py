"""Rows that are run operator by operator, with what CUDA's caching allocator makes of them."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

import olla
from bench.row import PLACING_SECONDS, Row, workload_of
from olla.graph.events import Allocate, Event, lifetimes_of
from olla.measure import caching_allocator
from olla.measure.profile import MemoryProfile
from olla.place.place import pack
from olla.run.arena import Arena, Clock, Replay


def profile(row: Row, options: argparse.Namespace) -> None:
    """Both steps op by op: what is allocated, and what the caching allocator reserves for it."""
    with torch.device(row.device):
        workload, training = workload_of(row)
    step = olla.optimize(workload.model, workload.inputs, **training, progress=False)
    row.note(step.plan)
    eager, planned = workload.call(step.profile, train=row.mode == "train")
    row.measured_eager_bytes, row.measured_planned_bytes = eager.peak_allocated_bytes, planned.peak_allocated_bytes
    row.reserved_eager_bytes, row.reserved_planned_bytes = _reserved(eager), _reserved(planned)
    lives = lifetimes_of(planned.events)
    packed = pack(lives, alignment=512, time_limit=PLACING_SECONDS)
    row.arena_bytes = packed.arena_bytes
    row.fragmentation = 1 - packed.lower_bound_bytes / packed.arena_bytes if packed.arena_bytes else 0.0
    if options.profile_alloc_time:
        row.allocation_seconds, row.arena_allocation_seconds = _time_allocations(planned.events, lives, packed.offsets)
    _write_ops(row, {"eager": eager, "planned": planned}, options.log_path.with_suffix(".ops.csv"))


def _reserved(profile: MemoryProfile) -> int:
    """Measured on a GPU; without one, what was recorded on the CPU is replayed through the model."""
    return profile.peak_reserved_bytes or caching_allocator.replay(profile.events).peak_reserved_bytes


def _time_allocations(
    events: Sequence[Event], lives: Sequence[tuple[int, int, int]], offsets: Sequence[int], rounds: int = 20
) -> tuple[float, float]:
    """Seconds for all allocations and releases of a step, by PyTorch's CPU allocator and in an arena; medians."""
    clock = Clock()
    sizes = [size for _, _, size in lives]
    top = max((offset + size for offset, size in zip(offsets, sizes, strict=True)), default=0)
    arena = Arena(torch.device("cpu"))
    replay = Replay(arena, clock, positions=[0] * len(sizes), sizes=sizes, offsets=offsets, arena_bytes=top)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for in_arena in (False, True) * rounds:
        blocks: dict[int, Tensor] = {}
        with replay if in_arena else nullcontext():
            clock.tell(0)
            started = time.perf_counter()
            for event in events:
                if isinstance(event, Allocate):
                    blocks[event.name] = torch.empty(event.size, dtype=torch.uint8)
                else:
                    del blocks[event.name]
            seconds[in_arena].append(time.perf_counter() - started)
            blocks.clear()
    arena.close()
    return statistics.median(seconds[False]), statistics.median(seconds[True])


def _write_ops(row: Row, profiles: dict[str, MemoryProfile], path: Path) -> None:
    """Add the ops of a case to the second file."""
    import pandas

    case = {"model": row.model, "batch_size": row.batch_size, "mode": row.mode}
    lines = [
        {**case, "order": order, "position": position, **asdict(op)}
        for order, profile in profiles.items()
        for position, op in enumerate(profile.ops)
    ]
    pandas.DataFrame(lines).to_csv(path, mode="a", header=not path.exists(), index=False)
