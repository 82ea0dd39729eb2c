"""The gradient of a convolution's weight, some output channels at a time.

On the CPU, ``convolution_backward`` computes it in a blocked layout and then copies it, so that it holds the weight's
size twice. Its rows do not depend on one another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from olla.capture.rewrite.calls import value_of

__all__ = [
    "bytes_of_slices",
    "compute_in_slices",
    "fewer_slices",
    "slice_weight_gradients",
    "slices_that_keep_the_bits",
    "weight_gradient",
]

_BACKWARD = torch.ops.aten.convolution_backward.default
_WORTH_IT = 4  # the weight must be so many times larger than the activations that each slice reads again
_SMALLEST = 4 * 2**20  # bytes of a weight below which a second copy does not matter
_CHANNELS = 64  # in one slice at least: full vectors for the kernels
_SLICES = 8


def slice_weight_gradients(graph: fx.Graph) -> None:
    """Take each backward convolution apart whose weight is large enough."""
    for node in graph.find_nodes(op="call_function", target=_BACKWARD):
        slices = _slices(node)
        if slices > 1:
            _split(graph, node, slices)


def weight_gradient(
    gradient: Tensor,
    input: Tensor,  # noqa: A002  (the name that torch gives it)
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    slices: int,
) -> Tensor:
    """The gradient of a convolution's weight, computed in ``slices`` equal parts of its output channels."""
    zeros, wanted = [0] * len(stride), [False, True, False]

    def part(rows: slice) -> Tensor:
        args = (gradient[:, rows], input, weight[rows], None, stride, padding, dilation, False, zeros, 1, wanted)
        result: Tensor = _BACKWARD(*args)[1]
        return result

    if slices == 1:
        return part(slice(None))
    whole = torch.empty_like(weight)
    step = len(weight) // slices
    for first in range(0, len(weight), step):
        rows = slice(first, first + step)
        whole[rows] = part(rows)
    return whole


def fewer_slices(node: fx.Node) -> list[int]:
    """In how many slices ``node`` may compute a weight's gradient, fewest first; none, if that is no such call."""
    if node.target is not weight_gradient:
        return []
    slices = node.args[6]
    assert isinstance(slices, int)
    return [number for number in range(1, slices) if slices % number == 0]


def bytes_of_slices(node: fx.Node, slices: int) -> int:
    """The workspace: a slice, and its blocked copy; the whole is the result itself, and copied once."""
    return (2 if slices > 1 else 1) * value_of(node.args[2]).nbytes // slices


def compute_in_slices(node: fx.Node, slices: int) -> None:
    """Let a ``weight_gradient`` node compute so; the fewer, the faster, and the larger the copies."""
    node.update_arg(6, slices)


def slices_that_keep_the_bits(node: fx.Node) -> int:
    """The number of slices for a ``weight_gradient`` node: as planned if this machine's kernels agree, else 1.

    Kernels may add in another order for another number of channels, so both ways are run once on
    random numbers of the shapes in question.
    """
    gradient, input_, weight, stride, padding, dilation, slices = node.args
    shapes = tuple(tuple(value_of(argument).shape) for argument in (gradient, input_, weight))
    settings = (tuple(_ints(stride)), tuple(_ints(padding)), tuple(_ints(dilation)))
    assert isinstance(slices, int)
    if slices == 1:
        return 1
    kept = _keeps_bits(shapes, value_of(weight).dtype, settings, slices, torch.get_num_threads())
    return slices if kept else 1


@cache
def _keeps_bits(
    shapes: tuple[Any, ...], dtype: torch.dtype, settings: tuple[Any, ...], slices: int, threads: int
) -> bool:
    generator = torch.Generator().manual_seed(0)
    gradient, input_, weight = (torch.randn(shape, generator=generator, device="cpu").to(dtype) for shape in shapes)
    stride, padding, dilation = settings
    sliced, whole = (weight_gradient(gradient, input_, weight, stride, padding, dilation, n) for n in (slices, 1))
    return torch.equal(sliced, whole)


def _slices(node: fx.Node) -> int:
    """In how many slices the weight's gradient of ``node`` should be computed; 1 to leave it alone."""
    gradient, input_, weight, _, _, _, _, transposed, _, groups, mask = node.args
    values = [value_of(argument) for argument in (gradient, input_, weight)]
    if transposed or groups != 1 or not _ints(mask)[1] or values[2].device.type != "cpu":
        return 1
    activations, size = sum(value.nbytes for value in values[:2]), values[2].nbytes
    made = next((user for user in node.users if user.args[1] == 1), None)
    if size < _SMALLEST or size < _WORTH_IT * activations or made is None:
        return 1
    if value_of(made).stride() != values[2].stride():
        return 1
    return math.gcd(_SLICES, max(1, len(values[2]) // _CHANNELS)) if len(values[2]) % _SLICES == 0 else 1


def _split(graph: fx.Graph, node: fx.Node, slices: int) -> None:
    gradient, input_, weight, bias, stride, padding, dilation, transposed, output_padding, groups, mask = node.args
    made = next(user for user in node.users if user.args[1] == 1)
    with graph.inserting_before(node):
        part = graph.call_function(weight_gradient, (gradient, input_, weight, stride, padding, dilation, slices))
        part.meta = dict(made.meta)
    made.replace_all_uses_with(part)
    graph.erase_node(made)
    wanted = _ints(mask)
    rest = (bool(wanted[0]), False, bool(wanted[2]))
    if not any(rest):
        graph.erase_node(node)
        return
    node.args = (
        gradient, input_, weight, bias, stride, padding, dilation, transposed, output_padding, groups, list(rest),
    )  # fmt: skip
    results = node.meta["val"]
    node.meta["val"] = tuple(value if keep else None for value, keep in zip(results, rest, strict=True))


def _ints(argument: Any) -> list[int]:
    return list(argument)
