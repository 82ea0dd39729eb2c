"""Questions about traced calls that more than one rewrite asks."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx

from olla.torch_private import OpOverload, storage_key, written_arguments

__all__ = ["changes_between", "erase_unused", "only_user", "part_of", "value_of"]


def value_of(argument: Any) -> Tensor:
    """The tensor without bytes that ``argument`` was traced with."""
    value = argument.meta["val"]
    assert isinstance(value, Tensor)
    return value


def only_user(node: fx.Node) -> fx.Node | None:
    """The call that uses the result of ``node``, if there is one and no other."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def part_of(node: fx.Node, index: int) -> fx.Node:
    """A new call, where calls are being inserted, that takes one of the results of ``node``."""
    part = node.graph.call_function(operator.getitem, (node, index))
    part.meta = {**node.meta, "val": node.meta["val"][index]}
    return part


def changes_between(first: fx.Node, last: fx.Node) -> bool:
    """Whether a call between the two may change what ``first`` reads, which could not be read at ``last`` then."""
    read = {storage_key(tensor) for tensor in _tensors(first)}
    node = first.next
    while node is not last:
        writes = isinstance(node.target, OpOverload) and written_arguments(node.target)
        if writes and any(storage_key(tensor) in read for tensor in _tensors(node)):
            return True
        node = node.next
    return False


def _tensors(node: fx.Node) -> list[Tensor]:
    """What the call is given."""
    values = [argument.meta["val"] for argument in node.all_input_nodes]
    return [value for value in values if isinstance(value, Tensor) and not value.is_sparse]


def erase_unused(node: fx.Node) -> None:
    """Erase a call whose result nobody uses, and those whose result only it used."""
    if not node.users:
        inputs = node.all_input_nodes
        node.graph.erase_node(node)
        for argument in inputs:
            if argument.op == "call_function":
                erase_unused(argument)
