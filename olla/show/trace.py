"""A plan beside eager PyTorch as a trace in Chrome's format, for Perfetto or chrome://tracing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from olla.graph.graph import Graph
from olla.graph.plan import Plan, Spill
from olla.show.blocks import Memory, eager_memory, origin, planned_memory

__all__ = ["write_trace"]

_EACH = 1e-3  # seconds of an op, where times are not known

Event = dict[str, Any]


def write_trace(graph: Graph, plan: Plan, path: Path, seconds: Sequence[float] | None = None) -> None:
    """Write two processes, planned and eager: ops as slices, memory as a counter, and what is spilled while it is away.

    Time is that of ``seconds``, one entry for each op of the graph; without them, every op takes a millisecond.
    """
    taken = seconds or [_EACH] * len(graph.ops)
    events = [
        *_process(1, "planned", graph, plan.order, planned_memory(graph, plan), taken, plan.spills),
        *_process(2, "eager PyTorch", graph, range(len(graph.ops)), eager_memory(graph), taken),
    ]
    times = "estimated or measured" if seconds else "unknown: every op takes a millisecond"
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"times": times}}) + "\n")


def _process(
    number: int,
    name: str,
    graph: Graph,
    order: Sequence[int],
    memory: Memory,
    seconds: Sequence[float],
    spills: Sequence[Spill] = (),
) -> Iterator[Event]:
    yield {"ph": "M", "name": "process_name", "pid": number, "args": {"name": name}}
    # Whole microseconds, and at least one each: when a viewer rounds, no slice reaches into another one.
    times = [0]
    for time in accumulate(seconds[op] for op in order):
        times.append(max(times[-1] + 1, round(time * 1e6)))
    bytes_: dict[str, int] = {}
    seen: set[int] = set()
    for step, op in enumerate(order):
        described = {"step": step, "op": op, "source": origin(graph.ops[op]), "again": op in seen}
        seen.add(op)
        at = {"name": graph.ops[op].name, "pid": number, "tid": 1, "ts": times[step]}
        yield {"ph": "X", "dur": times[step + 1] - times[step], "args": described, **at}
        bytes_ = {kind.value: sizes[step] for kind, sizes in memory.items()}
        yield {"ph": "C", "name": "memory", "pid": number, "ts": times[step], "args": bytes_}
    yield {"ph": "C", "name": "memory", "pid": number, "ts": times[-1], "args": bytes_}
    for index, (storage, start, end) in enumerate(spills):
        away = {
            "name": f"{graph.storages[storage].name} is away",
            "cat": "spilled",
            "pid": number,
            "id2": {"local": index},
        }
        yield {"ph": "b", "ts": times[start], **away}
        yield {"ph": "e", "ts": times[end], **away}
