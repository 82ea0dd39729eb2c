"""Bytes that operators hold only while they run: estimates for those whose kernels are known to need much."""

from __future__ import annotations

import torch
from torch import Tensor, fx, ops

from olla.capture.rewrite.batch_norm import BATCH_NORM_BACKWARD, BATCH_NORM_BACKWARD_OUT
from olla.capture.rewrite.calls import value_of
from olla.capture.rewrite.cross_entropy import CROSS_ENTROPY_BACKWARD, CROSS_ENTROPY_BACKWARD_OUT, bytes_of_rows
from olla.capture.rewrite.disjoint_sum import disjoint_sum
from olla.capture.rewrite.dropout import DROPOUT, DROPOUT_OUT, bytes_of_piece
from olla.capture.rewrite.embedding_sum import EMBEDDING_SUM, EMBEDDING_SUM_OUT, bytes_of_tokens
from olla.capture.rewrite.max_pool import MAX_POOL
from olla.capture.rewrite.weight_gradient import bytes_of_slices, weight_gradient

__all__ = ["spared_bytes", "workspace_bytes"]

_BATCH_NORM = (BATCH_NORM_BACKWARD, BATCH_NORM_BACKWARD_OUT)
_EMBEDDING_SUM = (EMBEDDING_SUM, EMBEDDING_SUM_OUT)
_CROSS_ENTROPY = (CROSS_ENTROPY_BACKWARD, CROSS_ENTROPY_BACKWARD_OUT)


def workspace_bytes(node: fx.Node) -> int:
    """The workspace of one call.

    On the CPU, oneDNN convolutions copy the weight, or compute its gradient, in a blocked layout.
    """
    if node.target is ops.aten.convolution.default:
        return _on_cpu(node.args[1])
    if node.target is ops.aten.convolution_backward.default:
        return _on_cpu(node.args[2])
    if node.target is weight_gradient:
        slices = node.args[6]
        assert isinstance(slices, int)
        return bytes_of_slices(node, slices)
    if node.target in _CROSS_ENTROPY:
        return bytes_of_rows(value_of(node.args[1]))
    if node.target in _EMBEDDING_SUM:
        return bytes_of_tokens(*map(value_of, node.args[1:3]))
    if node.target in (DROPOUT, DROPOUT_OUT):
        return bytes_of_piece(*map(value_of, node.all_input_nodes[:2]))
    return 0


def spared_bytes(node: fx.Node) -> int:
    """What the calls that were replaced by this one allocate while they run, and it does not."""
    if node.target in _CROSS_ENTROPY:
        return value_of(node.args[1]).nbytes - workspace_bytes(node)
    if node.target in _EMBEDDING_SUM:  # the gradient of the embedding, when those of tokens have been used up
        return max(0, value_of(node).nbytes - workspace_bytes(node) - value_of(node.args[1]).nbytes)
    if node.target in _BATCH_NORM:  # the gradient of the input, in a layout that is not used
        return value_of(node.args[1]).nbytes
    if node.target is MAX_POOL:  # indices, which are not used
        return value_of(node).numel() * torch.int64.itemsize
    if node.target is disjoint_sum:  # two terms and their sum, when the first two parts have been used up
        return 2 * value_of(node).nbytes - sum(value_of(part).nbytes for part in node.all_input_nodes[:2])
    return 0


def _on_cpu(argument: object) -> int:
    assert isinstance(argument, fx.Node)
    tensor = argument.meta["val"]
    assert isinstance(tensor, Tensor)
    return tensor.nbytes if tensor.device.type == "cpu" else 0
