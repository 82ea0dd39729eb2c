"""A sum of tensors that are zero but for one part each, written part by part.

The gradient of ``x[0]``, or of a slice of ``x``, has the size of ``x`` and is filled with zeros, and several are
added one by one. Where their parts are disjoint and fill the whole, each element of the sum is one element of a part
with zeros added: the same bits, but -0 becomes +0. So every part is written to its place with zero added.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, fx, ops

from olla.capture.rewrite.calls import changes_between, erase_unused, only_user, value_of

__all__ = ["disjoint_sum", "sum_disjoint_parts_in_place"]

aten = ops.aten

Place = tuple[int | slice, ...]  # as in whole[place]: one entry a dimension

_ALL = slice(None)
_SELECT, _SLICE = aten.select_backward.default, aten.slice_backward.default


def disjoint_sum(parts: Sequence[Tensor], places: Sequence[Place], shape: Sequence[int]) -> Tensor:
    """The tensor of this shape that holds each part at its place, with +0 for -0."""
    whole = parts[0].new_empty(shape)
    for part, place in zip(parts, places, strict=True):
        torch.add(part, 0, out=whole[place])
    return whole


def sum_disjoint_parts_in_place(graph: fx.Graph) -> None:
    """Replace each sum of gradients of selections and slices that together fill a tensor."""
    for root in reversed(graph.find_nodes(op="call_function", target=aten.add.Tensor)):
        if not root.users or not _is_plain(root):  # without users, it was in a sum that is replaced
            continue
        terms = [*_terms(root)]
        if any(value_of(term).shape != value_of(root).shape for term, _ in terms):
            continue
        parts = [_part(term, user) for term, user in terms]
        if not _make_up(root, parts):
            continue
        nodes, places = [part.node for part in parts], tuple(part.place for part in parts)
        with graph.inserting_before(root):
            whole = graph.call_function(disjoint_sum, (nodes, places, tuple(value_of(root).shape)))
        whole.meta = dict(root.meta)
        root.replace_all_uses_with(whole)
        erase_unused(root)


class _Part(NamedTuple):
    node: fx.Node
    place: Place
    put: fx.Node  # the first of the calls that put it there


def _make_up(root: fx.Node, parts: Sequence[_Part]) -> bool:
    """Whether ``root`` holds the parts, each at its place, and nothing else."""
    whole = value_of(root)
    return (
        _fill([part.place for part in parts], whole.shape)
        and whole.is_contiguous()
        and whole.dtype.is_floating_point
        and all(value_of(part.node).dtype == whole.dtype for part in parts)
        and not any(changes_between(part.put, root) for part in parts)
    )


def _is_plain(node: fx.Node) -> bool:
    """Whether two tensors, not one with itself or with a number, are added and nothing else."""
    return not node.kwargs and len(node.all_input_nodes) == 2


def _terms(root: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Each term of a sum, and the call that adds it."""
    for node in root.all_input_nodes:
        if node.target is aten.add.Tensor and only_user(node) is root and _is_plain(node):
            yield from _terms(node)
        else:
            yield node, root


def _part(node: fx.Node, user: fx.Node) -> _Part:
    """What ``node``, which ``user`` adds, is but for zeros."""
    place: list[int | slice] = [_ALL] * value_of(node).dim()
    axes = [*range(len(place))]
    while node.target in (_SELECT, _SLICE) and only_user(node) is user:
        inner, _, dim, *where = cast("tuple[Any, ...]", node.args)
        axis = axes[dim]
        if place[axis] != _ALL:
            break
        if node.target is _SELECT:
            place[axis] = where[0]
            axes.remove(axis)
        else:
            place[axis] = slice(*where)
        node, user = inner, node
    return _Part(node, tuple(place), user)


def _fill(places: Sequence[Place], shape: Sequence[int]) -> bool:
    """Whether each element of a tensor of this shape is in exactly one of the places."""
    is_cut = [any(index != _ALL for index in indices) for indices in zip(*places, strict=True)]
    count = np.zeros([size if cut else 1 for size, cut in zip(shape, is_cut, strict=True)], np.int64)
    for place in places:
        count[place] += 1
    return bool((count == 1).all())
