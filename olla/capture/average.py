"""Gradients averaged over processes, by collectives that are operators of the graph like others.

They write the process group, a storage of size 0, as random operators write the generator: so they keep one order,
which is the same in every plan of the step and on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from olla.capture.lower import tensors_of
from olla.capture.program import require_process_group
from olla.errors import CaptureError
from olla.torch_private import ProcessGroup, finish_sum, is_sum, start_sum, storage_key

__all__ = ["average_gradients", "start_as_soon_as_possible"]


def average_gradients(parameters: Iterable[Tensor], process_group: ProcessGroup) -> None:
    """Average the ``.grad`` of ``parameters`` over the processes of a group, in place; those without one are left out.

    Call it in a step of your own (:func:`olla.optimize_step`, with ``process_group=``) after ``backward()`` and
    before gradients are clipped and the optimizer is stepped; it works in eager PyTorch, too. Like
    ``DistributedDataParallel`` it divides by the number of processes, and then sums.

    Raises
    ------
    CaptureError
        If ``process_group`` is not one that this process belongs to, or a gradient is sparse.
    """
    require_process_group(process_group)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for gradient in gradients:
        if gradient.layout is not torch.strided:
            raise CaptureError(f"a gradient of shape {tuple(gradient.shape)} is sparse: only dense ones are averaged")
    with torch.no_grad():
        for gradient in gradients:
            gradient.mul_(1.0 / process_group.size())
            start_sum(gradient, process_group)
        for gradient in gradients:
            finish_sum(gradient)


def start_as_soon_as_possible(graph: fx.Graph) -> None:
    """Move each sum that :func:`average_gradients` starts to where its gradient exists, and nobody uses it any more.

    So sums are started in the order in which the backward pass makes the gradients, and run beside the rest of it.
    """
    latest: dict[int, fx.Node] = {}  # storage -> the last call so far that touches it
    for node in list(graph.nodes):
        scaled = node.args[0] if is_sum(node.target) else None
        if isinstance(scaled, fx.Node) and scaled.target is torch.ops.aten.mul_.Tensor:
            gradient = scaled.args[0]
            assert isinstance(gradient, fx.Node)
            before = latest[storage_key(gradient.meta["val"])]
            if before.op == "call_function":
                before.append(scaled)
                scaled.append(node)
        elif not _is_scaling(node):
            for touched in (node, *node.all_input_nodes):
                latest |= {storage_key(tensor): node for tensor in tensors_of(touched.meta.get("val"))}


def _is_scaling(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.mul_.Tensor and any(is_sum(user.target) for user in node.users)
