"""A plan as one HTML page to explore: memory step by step, and every block at its address. It loads nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from olla.graph.graph import Graph
from olla.graph.plan import Plan
from olla.show.blocks import Kind, Memory, blocks_of, eager_memory, origin, planned_memory
from olla.show.size import format_bytes

__all__ = ["write_page"]

_TEMPLATE = Path(__file__).with_name("page.html")
_KINDS = list(Kind)


def write_page(graph: Graph, plan: Plan, path: Path) -> None:
    """Write ``plan`` as a page for a browser; without addresses, it shows memory alone."""
    data = {
        "facts": _facts(plan),
        "kinds": [kind.value for kind in _KINDS],
        "ops": [{"name": op.name, "origin": origin(op)} for op in graph.ops],
        "order": plan.order,
        "arena": plan.arena_bytes,
        "bound": plan.lower_bound_bytes,
        "eager": _layers(eager_memory(graph)),
        "planned": _layers(planned_memory(graph, plan)),
        "blocks": _blocks(graph, plan),
    }
    embedded = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # no name can end the script
    path.write_text(_TEMPLATE.read_text().replace("$DATA", embedded))


def _blocks(graph: Graph, plan: Plan) -> list[dict[str, Any]]:
    return [
        {
            "name": block.name,
            "kind": _KINDS.index(block.kind),
            "op": block.op,
            "start": block.start,
            "end": block.end,
            "size": block.size,
            "offset": block.offset,
            "outside": block.outside,
        }
        for block in blocks_of(graph, plan)
    ]


def _layers(memory: Memory) -> list[tuple[int, ...]]:
    return [memory[kind] for kind in _KINDS]


def _facts(plan: Plan) -> list[tuple[str, str]]:
    facts = [
        ("eager peak", format_bytes(plan.baseline_peak_bytes)),
        ("planned peak", f"{format_bytes(plan.peak_bytes)} ({plan.saving:.1%} less)"),
        ("lower bound", f"{format_bytes(plan.lower_bound_bytes)} ({plan.status})"),
        ("live across steps", format_bytes(plan.persistent_bytes)),
    ]
    if plan.arena_bytes is not None:
        facts.append(("arena", f"{format_bytes(plan.arena_bytes)} ({plan.fragmentation:.2%} fragmentation)"))
    if plan.recomputed:
        facts.append(("recomputed", f"{len(plan.recomputed):,} ops"))
    if plan.spills:
        facts.append(("spilled", f"{len(plan.spills):,} storages"))
    return facts
