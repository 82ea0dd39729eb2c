"""Calls that do nothing: aliases, which saving a tensor for the backward pass leaves, and tensors of no bytes, unread.

They take no memory, but some microseconds each in every step.
"""

from __future__ import annotations

from torch import fx, ops

from olla.capture.rewrite.calls import value_of
from olla.torch_private import reshapes_in_place

__all__ = ["erase_needless_calls"]

aten = ops.aten


def erase_needless_calls(graph: fx.Graph) -> None:
    """Let users of an alias have what it is an alias of; erase the reserve that batch norms have on GPUs only."""
    if not any(reshapes_in_place(node.target) for node in graph.nodes):  # else an alias may keep another shape
        for node in graph.find_nodes(op="call_function", target=aten.alias.default):
            if graph.output_node() not in node.users:  # a result is a tensor of its own
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
    for node in graph.find_nodes(op="call_function", target=aten.empty.memory_format):
        if not node.users and value_of(node).numel() == 0:
            graph.erase_node(node)
