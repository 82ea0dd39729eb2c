"""Code of a joint graph, cut at its boundary into that of forward and that of backward."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, cast

from torch import fx

from olla.backend.joint import boundary
from olla.run.emit import runnable

__all__ = ["split"]


def split(module: fx.GraphModule, forward_outputs: int) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The calls before the boundary and those after it, as AOTAutograd wants them.

    Forward returns its outputs, and then what backward needs of it. Backward takes that, and then the tangents; it
    returns the gradients. What is told of the ops stays, but for the boundary's result.
    """
    calls = list(module.graph.nodes)
    at = next(index for index, node in enumerate(calls) if node.target is boundary)
    outputs, gradients = calls[at].args, cast("Sequence[Any]", calls[-1].args[0])[forward_outputs:]
    before, after = calls[:at], calls[at + 1 : -1]
    of_boundary = [node for node in after if calls[at] in node.all_input_nodes]
    tangents = [node for node in of_boundary if node.target is operator.getitem]
    after = [node for node in after if node not in of_boundary]
    needed = {used for node in after for used in node.all_input_nodes}
    needed.update(gradient for gradient in gradients if isinstance(gradient, fx.Node))
    saved = [node for node in before if node in needed]
    inputs = [node for node in before if node.op == "placeholder"]
    return _module(module, inputs, before, [*outputs, *saved]), _module(module, [*saved, *tangents], after, gradients)


def _module(
    root: fx.GraphModule, inputs: Sequence[fx.Node], calls: Iterable[fx.Node], outputs: Sequence[Any]
) -> fx.GraphModule:
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in calls:
        if node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(fx.map_arg(tuple(outputs), copies.__getitem__))
    return runnable(root, graph, "Planned")
