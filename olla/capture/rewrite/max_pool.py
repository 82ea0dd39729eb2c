"""Maxima of windows on the CPU, which keep a byte each.

From forward to backward, eager PyTorch holds the index of each maximum, in eight bytes, and the image. A byte says
where the maximum is in its window, and nothing else is needed; inference keeps nothing. And where PyTorch's kernel
compares one number after the other, the windows beside each other are compared at once, in an image that is laid out
anew for it, one for each thread, which is not counted: it is outside of PyTorch's allocator.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, ops

from olla.capture.rewrite.calls import part_of, value_of
from olla.compiling import Library, load_operators, vectors
from olla.torch_private import storage_key

__all__ = ["MAX_POOL", "keep_bytes_for_max_pools"]

aten = ops.aten

_DEFAULTS: tuple[Any, ...] = (None, None, [], 0, 1)  # of PyTorch's operator, whose trace ends with what is not one
_PLACES = 256  # that a byte tells apart

_WINDOWS = "int[2] kernel, int[2] stride, int[2] padding, int[2] size"  # the last is that of the images in the result
_LIBRARY = torch.library.Library("olla", "FRAGMENT")
_LIBRARY.define(f"max_pool2d(Tensor input, {_WINDOWS}) -> Tensor")
_LIBRARY.define(f"max_pool2d_with_places(Tensor input, {_WINDOWS}) -> (Tensor, Tensor)")
_LIBRARY.define(f"max_pool2d_backward(Tensor gradient, Tensor places, {_WINDOWS}) -> Tensor")
MAX_POOL = ops.olla.max_pool2d.default
MAX_POOL_WITH_PLACES = ops.olla.max_pool2d_with_places.default
MAX_POOL_BACKWARD = ops.olla.max_pool2d_backward.default


def keep_bytes_for_max_pools(graph: fx.Graph) -> None:
    """Let each max pool on the CPU keep bytes, if only its own backward reads what it keeps; or nothing."""
    for node in graph.find_nodes(op="call_function", target=aten.max_pool2d_with_indices.default):
        if _is_known(node) and _has_kernels():
            _replace(graph, node)


def _is_known(node: fx.Node) -> bool:
    """Whether PyTorch's operators would compute on these tensors as they are."""
    maxima, _ = node.meta["val"]
    kernel, _, _, dilation = _windows(node)
    return (
        maxima.device.type == "cpu"
        and maxima.dtype == torch.float32
        and dilation == [1, 1]
        and math.prod(kernel) <= _PLACES
        and all(_is_dense(value) for value in (value_of(node.args[0]), maxima))
        and all(user.target is operator.getitem for user in node.users)
        and all(_is_known_backward(user) for user in _users_of_indices(node))
    )


def _is_known_backward(node: fx.Node) -> bool:
    return (
        node.target is aten.max_pool2d_with_indices_backward.default
        and value_of(node.args[0]).dtype == torch.float32
        and _is_dense(value_of(node))
    )


def _is_dense(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and tensor.is_contiguous()


def _windows(node: fx.Node) -> list[list[int]]:
    """Kernel, stride, padding and dilation, each for height and width."""
    _, kernel, stride, padding, dilation = (*node.args, *_DEFAULTS[len(node.args) :])[:5]
    return [_pair(size) for size in (kernel, stride or kernel, padding, dilation)]


def _pair(size: Any) -> list[int]:
    return [size, size] if isinstance(size, int) else [size[0], size[-1]]


def _users_of_indices(node: fx.Node) -> list[fx.Node]:
    return [user for part in node.users if part.args[1] == 1 for user in part.users]


def _replace(graph: fx.Graph, node: fx.Node) -> None:
    input_, backward = node.args[0], _users_of_indices(node)
    maxima, indices = node.meta["val"]
    windows = _windows(node)[:3]
    target = MAX_POOL_WITH_PLACES if backward else MAX_POOL
    with graph.inserting_before(node):
        found = graph.call_function(target, (input_, *windows, _size_of(maxima)))
        found.meta = {**node.meta, "val": maxima}
        if backward:
            places = torch.empty_like(indices, dtype=torch.uint8)
            held = indices.nbytes + (0 if _is_held(node, backward) else value_of(input_).nbytes)
            found.meta |= {"val": (maxima, places), "eager": (maxima.nbytes, held)}
            found, kept = (part_of(found, index) for index in range(2))
    for user in backward:
        with graph.inserting_before(user):
            given = (user.args[0], kept, *windows, _size_of(value_of(user)))
            result = graph.call_function(MAX_POOL_BACKWARD, given)
        result.meta = dict(user.meta)
        user.replace_all_uses_with(result)
        graph.erase_node(user)
    for part in list(node.users):
        if part.args[1] == 0:
            part.replace_all_uses_with(found)
        graph.erase_node(part)
    graph.erase_node(node)


def _size_of(images: Tensor) -> list[int]:
    """Height and width; those of torch.compile may be symbols, though they are fixed."""
    return [int(size) for size in images.shape[-2:]]


def _is_held(node: fx.Node, backward: Sequence[fx.Node]) -> bool:
    """Whether its input stays after it for others than its backward, at least for some time."""
    after = itertools.takewhile(lambda other: other is not node, reversed(node.graph.nodes))
    read = [value for other in after if other not in backward for value in other.all_input_nodes]
    held = [other.meta.get("val") for other in (*node.graph.find_nodes(op="placeholder"), *read)]
    kept = storage_key(value_of(node.args[0]))
    return any(storage_key(tensor) == kept for tensor in held if isinstance(tensor, Tensor) and not tensor.is_sparse)


@cache
def _has_kernels() -> bool:
    """Whether the operators can be called, which are compiled at first use."""
    library = Library(Path(__file__).with_suffix(".cpp"), flags=("-O3", *vectors()), links=("c10", "torch_cpu"))
    return load_operators(library, "max pools take the memory and the time that they take in eager PyTorch")


def _traced(input_: Tensor, _kernel: Any, _stride: Any, _padding: Any, size: Sequence[int]) -> Tensor:
    return input_.new_empty((*input_.shape[:-2], *size))


def _traced_with_places(input_: Tensor, *windows: Any) -> tuple[Tensor, Tensor]:
    maxima = _traced(input_, *windows)
    return maxima, torch.empty_like(maxima, dtype=torch.uint8)


def _traced_backward(gradient: Tensor, _places: Tensor, *windows: Any) -> Tensor:
    return _traced(gradient, *windows)


_LIBRARY.impl("max_pool2d", _traced, "Meta")
_LIBRARY.impl("max_pool2d_with_places", _traced_with_places, "Meta")
_LIBRARY.impl("max_pool2d_backward", _traced_backward, "Meta")
