"""Questions about traced calls that more than one rewrite asks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from olla.torch_private import OpOverload, written_arguments

__all__ = ["only_user", "value_of", "writes_between"]


def value_of(argument: Any) -> Tensor:
    """The tensor without bytes that ``argument`` was traced with."""
    value = argument.meta["val"]
    assert isinstance(value, Tensor)
    return value


def only_user(node: fx.Node) -> fx.Node | None:
    """The call that uses the result of ``node``, if there is one and no other."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def writes_between(first: fx.Node, last: fx.Node) -> bool:
    """Whether a call between the two changes a tensor, so that what ``first`` does cannot be done at ``last``."""
    node = first.next
    while node is not last:
        if isinstance(node.target, OpOverload) and written_arguments(node.target):
            return True
        node = node.next
    return False
