"""What dropout keeps, in one byte an element.

From forward to backward, eager PyTorch holds the numbers that it multiplies with, 0 or the inverse of the share that is
kept, in the dtype of the input. Drawn as bytes, 0 or 1, from the same random numbers, they become these numbers again a
piece at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, ops

from olla.capture.rewrite.calls import only_user, value_of

__all__ = ["DROPOUT", "DROPOUT_OUT", "bytes_of_piece", "draw_bytes_for_dropout"]

aten = ops.aten

_PIECE = 2**20  # bytes of the numbers that are there at once: they stay in the cache of a core

_LIBRARY = torch.library.Library("olla", "FRAGMENT")
_LIBRARY.define("dropout(Tensor input, Tensor kept, float share) -> Tensor")
_LIBRARY.define("dropout.out(Tensor input, Tensor kept, float share, *, Tensor(a!) out) -> Tensor(a!)")
DROPOUT, DROPOUT_OUT = ops.olla.dropout.default, ops.olla.dropout.out


def draw_bytes_for_dropout(graph: fx.Graph) -> None:
    """Let each large dropout on the CPU keep bytes."""
    for drawn in graph.find_nodes(op="call_function", target=aten.bernoulli_.float):
        made, numbers = drawn.all_input_nodes[0], only_user(drawn)
        if numbers is None or not _is_dropout(made, drawn, numbers):
            continue
        made.kwargs = {**made.kwargs, "dtype": torch.uint8}
        made.meta["eager"] = (value_of(made).nbytes,)
        made.meta["val"] = drawn.meta["val"] = torch.empty_like(value_of(made), dtype=torch.uint8)
        for user in [*numbers.users]:
            (input_,) = (node for node in user.all_input_nodes if node is not numbers)
            with graph.inserting_before(user):
                product = graph.call_function(DROPOUT, (input_, drawn, numbers.args[1]))
            product.meta = dict(user.meta)
            user.replace_all_uses_with(product)
            graph.erase_node(user)
        graph.erase_node(numbers)


def _is_dropout(made: fx.Node, drawn: fx.Node, numbers: fx.Node) -> bool:
    """Whether numbers are drawn into a large tensor and divided, and tensors are then multiplied with them only."""
    value = value_of(made)
    return (
        made.target is aten.empty_like.default
        and only_user(made) is drawn
        and numbers.target is aten.div_.Scalar
        and value.dtype.is_floating_point
        and value.device.type == "cpu"
        and value.nbytes > _PIECE
        and all(_is_product(user, numbers) for user in numbers.users)
    )


def _is_product(node: fx.Node, numbers: fx.Node) -> bool:
    """Whether ``node`` multiplies a tensor of the same dtype and shape with ``numbers``."""
    if node.target is not aten.mul.Tensor or len(node.all_input_nodes) != 2:
        return False
    factors, product = [value_of(factor) for factor in node.all_input_nodes], value_of(node)
    (input_,) = (value_of(factor) for factor in node.all_input_nodes if factor is not numbers)
    alike = all((factor.shape, factor.dtype) == (product.shape, product.dtype) for factor in factors)
    return alike and torch.empty_like(input_).stride() == product.stride()


def bytes_of_piece(input: Tensor, kept: Tensor) -> int:  # noqa: A002  (the name that torch gives it)
    """The workspace: the numbers that ``input`` is multiplied with at once."""
    (first, *_), step = _pieces(input, kept, torch.empty_like(input))
    return first[:step].numel() * first.dtype.itemsize


def _pieces(*tensors: Tensor) -> tuple[list[Tensor], int]:
    """The tensors, as rows of one element if memory allows, and how many rows are worked on at once."""
    if all(tensor.is_contiguous() for tensor in tensors):
        tensors = tuple(tensor.view(-1) for tensor in tensors)
    return [*tensors], max(1, _PIECE // tensors[0][0].nbytes)


def _by_pieces(input: Tensor, kept: Tensor, share: float, *, out: Tensor) -> Tensor:  # noqa: A002
    (inputs, keeps, outs), step = _pieces(input, kept, out)
    workspace = torch.empty_like(inputs[:step])
    for first in range(0, len(inputs), step):
        piece = slice(first, first + step)
        numbers = workspace[: len(inputs) - first].copy_(keeps[piece]).div_(share)
        torch.mul(inputs[piece], numbers, out=outs[piece])
    return out


def _elsewhere(input: Tensor, kept: Tensor, share: float) -> Tensor:  # noqa: A002
    return _by_pieces(input, kept, share, out=torch.empty_like(input))


_LIBRARY.impl("dropout", _elsewhere, "CompositeExplicitAutograd")
_LIBRARY.impl("dropout.out", _by_pieces, "CompositeExplicitAutograd")
