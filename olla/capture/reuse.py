"""Results written over an input that nobody needs any more, where the operator computes the same bits that way.

It takes no time and no choice: if every other user of the input must run before, in any order, its bytes are free when
the operator ends, and if the kernel works element by element (or row by row, for softmax), it may write there at once.
``tests/reuse_test.py`` runs every operator of the table both ways.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx, ops

from olla.capture.lower import Lowered, tensors_of
from olla.capture.rewrite.batch_norm import BATCH_NORM_BACKWARD, BATCH_NORM_BACKWARD_OUT
from olla.capture.rewrite.cross_entropy import CROSS_ENTROPY_BACKWARD, CROSS_ENTROPY_BACKWARD_OUT
from olla.capture.rewrite.dropout import DROPOUT, DROPOUT_OUT
from olla.capture.rewrite.embedding_sum import EMBEDDING_SUM, EMBEDDING_SUM_OUT
from olla.graph.graph import Graph
from olla.torch_private import OpOverload, storage_key

__all__ = ["IN_PLACE", "OVERWRITING", "fits", "reuse"]

aten = ops.aten

# The variant that writes into a tensor, and the name of the argument for it.
OVERWRITING: Mapping[OpOverload, tuple[OpOverload, str]] = {
    aten.add.Tensor: (aten.add.out, "out"),
    aten.sub.Tensor: (aten.sub.out, "out"),
    aten.mul.Tensor: (aten.mul.out, "out"),
    aten.div.Tensor: (aten.div.out, "out"),
    aten.pow.Tensor_Scalar: (aten.pow.Tensor_Scalar_out, "out"),
    aten.sqrt.default: (aten.sqrt.out, "out"),
    aten.rsqrt.default: (aten.rsqrt.out, "out"),
    aten.neg.default: (aten.neg.out, "out"),
    aten.exp.default: (aten.exp.out, "out"),
    aten.tanh.default: (aten.tanh.out, "out"),
    aten.sigmoid.default: (aten.sigmoid.out, "out"),
    aten.gelu.default: (aten.gelu.out, "out"),
    aten.silu.default: (aten.silu.out, "out"),
    aten.where.self: (aten.where.self_out, "out"),
    aten._softmax.default: (aten._softmax.out, "out"),
    aten._log_softmax.default: (aten._log_softmax.out, "out"),
    aten.gelu_backward.default: (aten.gelu_backward.grad_input, "grad_input"),
    aten.silu_backward.default: (aten.silu_backward.grad_input, "grad_input"),
    aten.tanh_backward.default: (aten.tanh_backward.grad_input, "grad_input"),
    aten.sigmoid_backward.default: (aten.sigmoid_backward.grad_input, "grad_input"),
    aten.threshold_backward.default: (aten.threshold_backward.grad_input, "grad_input"),
    aten.hardtanh_backward.default: (aten.hardtanh_backward.grad_input, "grad_input"),
    aten.leaky_relu_backward.default: (aten.leaky_relu_backward.grad_input, "grad_input"),
    aten._softmax_backward_data.default: (aten._softmax_backward_data.out, "grad_input"),
    aten._log_softmax_backward_data.default: (aten._log_softmax_backward_data.out, "out"),
    CROSS_ENTROPY_BACKWARD: (CROSS_ENTROPY_BACKWARD_OUT, "out"),
    DROPOUT: (DROPOUT_OUT, "out"),
    EMBEDDING_SUM: (EMBEDDING_SUM_OUT, "out"),
    BATCH_NORM_BACKWARD: (BATCH_NORM_BACKWARD_OUT, "out"),  # the first of its results
}

# Kernels that work on rows, and copy what is not contiguous: then writing over an input goes wrong.
_CONTIGUOUS_ONLY = frozenset(target for target in OVERWRITING if "softmax" in target.name()) | {CROSS_ENTROPY_BACKWARD}

# The variant that writes over its first argument: for these, the one above would allocate all the same.
IN_PLACE: Mapping[OpOverload, OpOverload] = {
    aten.add.Scalar: aten.add_.Scalar,
    aten.sub.Scalar: aten.sub_.Scalar,
    aten.mul.Scalar: aten.mul_.Scalar,
    aten.div.Scalar: aten.div_.Scalar,
    aten.masked_fill.Scalar: aten.masked_fill_.Scalar,
    aten.relu.default: aten.relu_.default,
    aten.hardtanh.default: aten.hardtanh_.default,
    aten.hardswish.default: aten.hardswish_.default,
}

# In half precision, its two variants give different bits.
_FULL_PRECISION_ONLY = frozenset({aten.mul.Scalar})


def fits(target: OpOverload, over: Tensor) -> bool:
    """Whether ``target`` computes the same bits if it writes over ``over``."""
    if target in _CONTIGUOUS_ONLY and not over.is_contiguous():
        return False
    return target not in _FULL_PRECISION_ONLY or over.dtype not in (torch.bfloat16, torch.float16)


def reuse(lowered: Lowered) -> dict[fx.Node, fx.Node]:
    """Let ops write over dying inputs, in the traced calls; returns the input that each of these writes over.

    The graph is to be lowered again with it.
    """
    graph, before = lowered.graph, _ancestors(lowered.graph)
    storages = {
        storage_key(tensor): storage
        for node, found in lowered.results.items()
        for tensor, storage in zip(tensors_of(node.meta.get("val")), found, strict=True)
    }
    touchers: dict[int, list[int]] = {}
    for index, op in enumerate(graph.ops):
        for storage in op.touches:
            touchers.setdefault(storage, []).append(index)
    reused: dict[fx.Node, fx.Node] = {}
    for index, node in enumerate(lowered.nodes):
        op, target = graph.ops[index], node.target
        if not isinstance(target, OpOverload) or not op.creates or op.writes or op.creates[0] in graph.outputs:
            continue
        for argument in _candidates(node, target):
            storage = storages.get(storage_key(argument.meta["val"]), -1)
            if storage < 0 or graph.storages[storage].persistent or storage in graph.outputs:
                continue
            is_last = all(other == index or before[index] >> other & 1 for other in touchers[storage])
            if is_last and fits(target, argument.meta["val"]) and _is_whole(node, argument):
                if target in IN_PLACE:
                    node.target = IN_PLACE[target]
                else:
                    node.target, name = OVERWRITING[target]
                    node.kwargs = {**node.kwargs, name: argument}
                reused[node] = argument
                break
    return reused


def _candidates(node: fx.Node, target: OpOverload) -> list[fx.Node]:
    """The arguments that there is a variant to write over."""
    if target in IN_PLACE:
        return node.all_input_nodes[:1]
    return node.all_input_nodes if target in OVERWRITING else []


def _is_whole(node: fx.Node, argument: fx.Node) -> bool:
    """Whether the argument is its whole storage, laid out as the (first) result, and any other there is the same."""
    result, over = tensors_of(node.meta["val"])[0], argument.meta["val"]
    if over.untyped_storage().nbytes() != result.untyped_storage().nbytes():
        return False
    layout = (result.shape, result.stride(), result.dtype, result.device, result.storage_offset())
    same = [other.meta["val"] for other in node.all_input_nodes]
    return all(
        (value.shape, value.stride(), value.dtype, value.device, value.storage_offset()) == layout
        for value in same
        if storage_key(value) == storage_key(over)
    )


def _ancestors(graph: Graph) -> list[int]:
    """For each op, the ops that must run before it, as bits."""
    found: list[int] = []
    for others in graph.predecessors:
        bits = 0
        for other in others:
            bits |= found[other] | 1 << other
        found.append(bits)
    return found
