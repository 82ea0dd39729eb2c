"""A plan in the form that the name of a file asks for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias

from olla.errors import OllaError
from olla.graph.check import verify
from olla.graph.graph import Graph
from olla.graph.plan import Plan
from olla.show.dot import write_dot
from olla.show.draw import draw_addresses, draw_memory
from olla.show.page import write_page
from olla.show.snapshot import write_snapshot
from olla.show.trace import write_trace

__all__ = ["Drawing", "draw"]

Drawing: TypeAlias = Literal["memory", "addresses", "graph", "page", "trace", "snapshot"]

_PICTURES = (".png", ".svg", ".pdf")
_ENDINGS: dict[Drawing, tuple[str, ...]] = {
    "memory": _PICTURES,
    "addresses": _PICTURES,
    "graph": (".dot", *_PICTURES),
    "page": (".html",),
    "trace": (".json",),
    "snapshot": (".pickle",),
}


def draw(
    graph: Graph,
    plan: Plan | None,
    path: str | Path,
    what: Drawing | None = None,
    *,
    seconds: Sequence[float] | None = None,
) -> None:
    """Write a picture of ``plan``, or something to explore, to ``path``, whose ending says what.

    ``.png``, ``.svg`` and ``.pdf`` show ``what``: ``"memory"`` over time, eager and planned (the default), the
    ``"addresses"`` in the arena, or the ``"graph"``, which ``.dot`` holds, too. ``.html`` is a page with all blocks to
    point at, which needs nothing but a browser; ``.json`` a trace for Perfetto or chrome://tracing, with the
    ``seconds`` of each op if they are known; ``.pickle`` a snapshot for PyTorch's memory visualizer. Without a plan,
    only the graph can be drawn.

    Raises
    ------
    InvalidPlanError
        If the plan is none for this graph.
    OllaError
        If the ending fits nothing, or not ``what``; if addresses are wanted and not planned; if a package is missing.
    """
    path = Path(path)
    chosen = what or _chosen(path, plan)
    if path.suffix not in _ENDINGS[chosen]:
        raise OllaError(f"{path}: {chosen} is written as {' or '.join(_ENDINGS[chosen])}")
    if plan is not None:
        verify(graph, plan)
    if chosen == "graph":
        write_dot(graph, path, plan)
        return
    if plan is None:
        raise OllaError(f"{path}: {chosen} is drawn of a plan, and none is given")
    if chosen == "trace":
        write_trace(graph, plan, path, seconds)
        return
    writers = {"memory": draw_memory, "addresses": draw_addresses, "page": write_page, "snapshot": write_snapshot}
    writers[chosen](graph, plan, path)


def _chosen(path: Path, plan: Plan | None) -> Drawing:
    """What the ending of ``path`` stands for: the first thing that is written so."""
    for what, endings in _ENDINGS.items():
        if path.suffix in endings and (plan is not None or what == "graph"):
            return what
    known = sorted({ending for endings in _ENDINGS.values() for ending in endings})
    raise OllaError(
        f"{path}: nothing {'' if plan else 'without a plan '}is written so; known endings: {', '.join(known)}"
    )
