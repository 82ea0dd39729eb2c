"""The dataflow graph as DOT, for study. Needs pydot; to draw it, Graphviz."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from olla.errors import OllaError
from olla.graph.graph import Graph
from olla.graph.lifetimes import memory_profile
from olla.graph.plan import Plan

__all__ = ["write_dot"]

_AT_THE_PEAK = "#f4b6a6"


def write_dot(graph: Graph, path: Path, plan: Plan | None = None) -> None:
    """Write ``graph`` as a ``.dot`` file, or draw it as ``.svg``, ``.png`` or ``.pdf``.

    Ops are boxes, and an arrow is a storage on its way from the op that made its contents to one that needs them;
    a dashed one says that what was read is overwritten. Persistent storages are ellipses. With a plan, ops are numbered
    by their steps, and those at which the peak is reached are red.

    Raises
    ------
    OllaError
        If pydot is not there, or it is to be drawn and Graphviz is not, or cannot draw such a file.
    """
    try:
        import pydot
    except ImportError as error:
        raise OllaError("writing DOT needs pydot: pip install pydot") from error
    drawing = _drawn(pydot, graph, plan)
    if path.suffix == ".dot":
        path.write_text(drawing.to_string())
        return
    try:
        drawn = drawing.create(format=path.suffix[1:])
    except (OSError, AssertionError) as error:
        hint = "install Graphviz, or write .dot" if isinstance(error, FileNotFoundError) else "write .dot, .svg or .png"
        raise OllaError(f"Graphviz cannot draw {path}: {hint}") from error
    path.write_bytes(drawn)


def _drawn(pydot: Any, graph: Graph, plan: Plan | None) -> Any:
    drawing = pydot.Dot("olla", graph_type="digraph", rankdir="TB")
    drawing.set_node_defaults(shape="box", fontname="Helvetica", fontsize="10")
    drawing.set_edge_defaults(fontname="Helvetica", fontsize="8")
    steps, at_the_peak = _steps(graph, plan)
    for index, op in enumerate(graph.ops):
        title = f"{', '.join(map(str, steps[index]))}: {op.name}" if plan else op.name
        lines = [title, f"workspace {op.workspace:,} bytes"] if op.workspace else [title]
        colour = {"style": "filled", "fillcolor": _AT_THE_PEAK} if index in at_the_peak else {}
        drawing.add_node(pydot.Node(f"op{index}", label=_label(*lines), **colour))
    sized = [_label(storage.name, f"{storage.size:,} bytes") for storage in graph.storages]
    maker = {index: f"storage{index}" for index, storage in enumerate(graph.storages) if storage.persistent}
    for index, node in maker.items():
        drawing.add_node(pydot.Node(node, label=sized[index], shape="ellipse"))
    readers = defaultdict[int, list[int]](list)
    for index, op in enumerate(graph.ops):
        for used in op.reads + op.writes:
            is_said = maker[used].startswith("storage")  # by the ellipse
            drawing.add_edge(pydot.Edge(maker[used], f"op{index}", label="" if is_said else sized[used]))
        for written in op.writes:
            for reader in readers.pop(written, []):
                drawing.add_edge(pydot.Edge(f"op{reader}", f"op{index}", style="dashed", constraint="false"))
        for read in op.reads:
            readers[read].append(index)
        for made in op.creates + op.writes:
            maker[made] = f"op{index}"
    if graph.outputs:
        drawing.add_node(pydot.Node("outputs", shape="plaintext"))
    for output in graph.outputs:
        drawing.add_edge(pydot.Edge(maker[output], "outputs", label=sized[output]))
    return drawing


def _steps(graph: Graph, plan: Plan | None) -> tuple[dict[int, list[int]], set[int]]:
    """The steps at which each op runs, and the ops that run at the peak."""
    steps = defaultdict[int, list[int]](list)
    if plan is None:
        return steps, set()
    for step, op in enumerate(plan.order):
        steps[op].append(step)
    profile = memory_profile(graph, plan.order, plan.spills)
    return steps, {op for op, live in zip(plan.order, profile, strict=True) if live == plan.peak_bytes}


def _label(*lines: str) -> str:
    escaped = "\n".join(lines).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
