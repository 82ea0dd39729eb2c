"""The backward pass of batch norms, with the gradient of the input in memory once, or not at all.

On the CPU, PyTorch's operator allocates that gradient, and then again in the layout that its kernel writes. Called
directly, the kernel writes where it is told, also over the gradient that it is given, or over the input.
"""

from __future__ import annotations

import ctypes
import logging
import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, ops

from olla.capture.rewrite.calls import value_of
from olla.compiling import Library, NativeUnavailableError
from olla.torch_private import address_of

__all__ = ["BATCH_NORM_BACKWARD", "BATCH_NORM_BACKWARD_OUT", "allocate_gradients_of_batch_norms_once"]

aten = ops.aten
log = logging.getLogger(__name__)

# PyTorch's header declares the kernels of several processors, which are those that PyTorch was compiled for.
_FLAGS = {"x86_64": ("-DHAVE_AVX2_CPU_DEFINITION", "-DHAVE_AVX512_CPU_DEFINITION")}
_LAYOUTS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)

_ARGUMENTS = (
    "Tensor gradient, Tensor input, Tensor? weight, Tensor? running_mean, Tensor? running_var, Tensor? save_mean, "
    "Tensor? save_invstd, bool train, float eps, bool[3] output_mask"
)
_LIBRARY = torch.library.Library("olla", "FRAGMENT")
_LIBRARY.define(f"batch_norm_backward({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)")
_LIBRARY.define(f"batch_norm_backward.out({_ARGUMENTS}, *, Tensor(a!) out) -> (Tensor(a!), Tensor, Tensor)")
BATCH_NORM_BACKWARD = ops.olla.batch_norm_backward.default
BATCH_NORM_BACKWARD_OUT = ops.olla.batch_norm_backward.out


def allocate_gradients_of_batch_norms_once(graph: fx.Graph) -> None:
    """Let each batch norm on the CPU have the gradient of its input where it is wanted."""
    for node in graph.find_nodes(op="call_function", target=aten.native_batch_norm_backward.default):
        if _is_known(node) and _kernel() is not None:
            node.target = BATCH_NORM_BACKWARD


def _is_known(node: fx.Node) -> bool:
    """Whether PyTorch's operator would call the kernel on these tensors as they are, and return three of its own."""
    gradient, input_, weight, mask = *map(_value, node.args[:3]), node.args[9]
    of_input, *others = node.meta["val"]
    return bool(
        mask == [True, True, True]
        and input_.device.type == "cpu"
        and input_.numel() > 0
        and any(input_.is_contiguous(memory_format=layout) for layout in _LAYOUTS)
        and _kind(gradient) == _kind(input_) == _kind(of_input)
        and all(other.dtype == _dtype_of_others(input_, weight) for other in others)
    )


def _value(argument: Any) -> Any:
    return None if argument is None else value_of(argument)


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


def _dtype_of_others(input_: Tensor, weight: Tensor | None) -> torch.dtype:
    return input_.dtype if weight is None else weight.dtype


@cache
def _kernel() -> Any:
    """The kernel, which takes addresses of tensors; None if it cannot be had here."""
    if platform.machine() not in _FLAGS:
        return None
    source = Path(__file__).with_suffix(".cpp")
    try:
        path = Library(source, flags=_FLAGS[platform.machine()], links=("c10", "torch_cpu")).compiled()
        call = ctypes.CDLL(str(path)).olla_batch_norm_backward
    except (NativeUnavailableError, OSError) as error:  # as from a PyTorch that was built for other processors
        log.info("gradients of batch norms are allocated twice, as by eager PyTorch: %s", error)
        return None
    call.argtypes, call.restype = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_bool, ctypes.c_double], ctypes.c_bool
    return call


def _to(
    gradient: Tensor, input_: Tensor, weight: Tensor | None, *others: Any, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    *statistics, train, eps, _ = others
    kernel, is_alike = _kernel(), _kind(gradient) == _kind(input_) == _kind(out)
    of_weight, of_bias = (
        torch.empty(input_.shape[1], dtype=_dtype_of_others(input_, weight), device=input_.device) for _ in range(2)
    )
    tensors = (out, of_weight, of_bias, gradient, input_, weight, *statistics)
    addresses = (ctypes.c_void_p * len(tensors))(*(None if t is None else address_of(t) for t in tensors))
    if not is_alike or kernel is None or not kernel(addresses, train, eps):
        found, of_weight, of_bias = aten.native_batch_norm_backward(gradient, input_, weight, *others)
        out.copy_(found)
    return out, of_weight, of_bias


def _elsewhere(gradient: Tensor, input_: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _to(gradient, input_, *others, out=torch.empty_like(input_))


_LIBRARY.impl("batch_norm_backward", _elsewhere, "CompositeExplicitAutograd")
_LIBRARY.impl("batch_norm_backward.out", _to, "CompositeExplicitAutograd")
