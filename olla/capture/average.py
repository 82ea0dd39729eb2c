"""Gradients averaged over processes, by collectives that are operators of the graph like others.

They write the process group, a storage of size 0, as random operators write the generator: so they keep one order,
which is the same in every plan of the step and on all ranks (``chain.py`` chooses it).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, fx

from olla.capture.program import require_process_group
from olla.errors import CaptureError
from olla.torch_private import ProcessGroup, dense_parts, flatten, process_group, storage_key

__all__ = ["PROCESS_GROUP", "START_SUM", "average_gradients", "start_as_soon_as_possible", "unowned"]

_running: dict[int, dist.Work] = {}  # address of a tensor -> what fills it


def _start_sum(tensor: Tensor, group_name: str) -> None:
    work = dist.all_reduce(unowned(tensor), group=process_group(group_name), async_op=True)
    assert work is not None
    _running[tensor.data_ptr()] = work


def _finish_sum(tensor: Tensor) -> None:
    _running.pop(tensor.data_ptr()).wait()


def unowned(tensor: Tensor) -> Tensor:
    """A tensor on the same bytes that does not keep them: threads of gloo hold it for a moment after they are done."""
    if tensor.device.type != "cpu" or not tensor.numel():
        return tensor
    return torch.frombuffer((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()), dtype=tensor.dtype)


_LIBRARY = torch.library.Library("olla", "FRAGMENT")
_LIBRARY.define("start_sum(Tensor(a!) tensor, str group_name) -> ()")
_LIBRARY.define("finish_sum(Tensor(a!) tensor) -> ()")
for _name, _function in (("start_sum", _start_sum), ("finish_sum", _finish_sum)):
    _LIBRARY.impl(_name, _function, "CPU")
    _LIBRARY.impl(_name, _function, "CUDA")
    _LIBRARY.impl(_name, lambda *_: None, "Meta")
START_SUM = torch.ops.olla.start_sum.default
PROCESS_GROUP = "process group"  # the name of the storage that collectives write


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
            torch.ops.olla.start_sum(gradient, process_group.group_name)
        for gradient in gradients:
            torch.ops.olla.finish_sum(gradient)


def start_as_soon_as_possible(graph: fx.Graph) -> None:
    """Move each sum that :func:`average_gradients` starts to where its gradient exists, and nobody uses it any more.

    So sums are started in the order in which the backward pass makes the gradients, and run beside the rest of it.
    """
    latest: dict[int, fx.Node] = {}  # storage -> the last call so far that touches it
    for node in list(graph.nodes):
        scaled = node.prev
        if node.target is START_SUM:
            before = latest[storage_key(scaled.meta["val"])]
            if before.op == "call_function":
                before.append(scaled)
                scaled.append(node)
        elif node.next.target is not START_SUM:
            for touched in (node, *node.all_input_nodes):
                leaves, _ = flatten(touched.meta.get("val"))
                tensors = [part for leaf in leaves if isinstance(leaf, Tensor) for part in dense_parts(leaf)]
                latest |= {storage_key(tensor): node for tensor in tensors}
