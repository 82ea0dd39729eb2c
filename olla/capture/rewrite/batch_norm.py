"""Batch norms on the CPU in parts, which PyTorch's operators do at once.

Normalizing is a part of its own: it takes a third of the time, the statistics the rest, and only it runs again where a
budget asks for it. The gradient of the input is in memory once, or not at all: PyTorch's operator allocates it, and
then again in the layout that its kernel writes. Called directly, the kernel writes where it is told, also over the
gradient that it is given, or over the input.
"""

from __future__ import annotations

import logging
import operator
import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, ops

from olla.capture.rewrite.calls import part_of, value_of
from olla.compiling import Library, load_operators, vectors

__all__ = [
    "BATCH_NORM_BACKWARD",
    "BATCH_NORM_BACKWARD_OUT",
    "allocate_gradients_of_batch_norms_once",
    "split_batch_norms",
]

aten = ops.aten
log = logging.getLogger(__name__)

# PyTorch's header declares the kernels of several processors, which are those that PyTorch was compiled for.
_FLAGS = {"x86_64": ("-O3", "-DHAVE_AVX2_CPU_DEFINITION", "-DHAVE_AVX512_CPU_DEFINITION")}
_LAYOUTS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)

_BACKWARD = (
    "Tensor gradient, Tensor input, Tensor? weight, Tensor? running_mean, Tensor? running_var, Tensor? save_mean, "
    "Tensor? save_invstd, bool train, float eps, bool[3] output_mask"
)
_LIBRARY = torch.library.Library("olla", "FRAGMENT")
_LIBRARY.define(
    "batch_norm_statistics(Tensor input, Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, float eps)"
    " -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "batch_norm_normalize(Tensor input, Tensor? weight, Tensor? bias, Tensor save_mean, Tensor save_invstd) -> Tensor"
)
_LIBRARY.define(f"batch_norm_backward({_BACKWARD}) -> (Tensor, Tensor, Tensor)")
_LIBRARY.define(f"batch_norm_backward.out({_BACKWARD}, *, Tensor(a!) out) -> (Tensor(a!), Tensor, Tensor)")
BATCH_NORM_STATISTICS = ops.olla.batch_norm_statistics.default
BATCH_NORM_NORMALIZE = ops.olla.batch_norm_normalize.default
BATCH_NORM_BACKWARD = ops.olla.batch_norm_backward.default
BATCH_NORM_BACKWARD_OUT = ops.olla.batch_norm_backward.out


def split_batch_norms(graph: fx.Graph) -> None:
    """Let each batch norm on the CPU that is in training be two calls: its statistics, and what depends on them."""
    for node in graph.find_nodes(op="call_function", target=aten.native_batch_norm.default):
        if _is_splittable(node) and _has_kernels() and _statistics_keep_the_bits():
            _split(graph, node)


def _is_splittable(node: fx.Node) -> bool:
    """Whether PyTorch's operator would compute statistics of single precision on these tensors as they are."""
    input_, *others = map(_value, node.args[:5])
    return bool(
        node.args[5]
        and input_.device.type == "cpu"
        and _is_dense(input_)
        and all(tensor.dtype == torch.float32 for tensor in (input_, *others) if tensor is not None)
        and all(tensor.is_contiguous() for tensor in others if tensor is not None)
        and all(user.target is operator.getitem for user in node.users)
    )


def _split(graph: fx.Graph, node: fx.Node) -> None:
    input_, weight, bias, running_mean, running_var, _, momentum, eps = node.args
    normalized, *statistics = node.meta["val"]
    with graph.inserting_before(node):
        both = graph.call_function(BATCH_NORM_STATISTICS, (input_, running_mean, running_var, momentum, eps))
        both.meta = {**node.meta, "val": tuple(statistics)}
        parts = [part_of(both, index) for index in range(2)]
        result = graph.call_function(BATCH_NORM_NORMALIZE, (input_, weight, bias, *parts))
        result.meta = {**node.meta, "val": normalized}
    for user in list(node.users):
        index = user.args[1]
        assert isinstance(index, int)
        user.replace_all_uses_with([result, *parts][index])
        graph.erase_node(user)
    graph.erase_node(node)


def allocate_gradients_of_batch_norms_once(graph: fx.Graph) -> None:
    """Let each batch norm on the CPU have the gradient of its input where it is wanted."""
    for node in graph.find_nodes(op="call_function", target=aten.native_batch_norm_backward.default):
        if _is_known(node) and _has_kernels():
            node.target = BATCH_NORM_BACKWARD


def _is_known(node: fx.Node) -> bool:
    """Whether PyTorch's operator would call the kernel on these tensors as they are, and return three of its own."""
    gradient, input_, weight, mask = *map(_value, node.args[:3]), node.args[9]
    of_input, *others = node.meta["val"]
    return bool(
        mask == [True, True, True]
        and input_.device.type == "cpu"
        and _is_dense(input_)
        and _kind(gradient) == _kind(input_) == _kind(of_input)
        and all(other.dtype == _dtype_of_others(input_, weight) for other in others)
    )


def _value(argument: Any) -> Any:
    return None if argument is None else value_of(argument)


def _is_dense(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and any(tensor.is_contiguous(memory_format=layout) for layout in _LAYOUTS)


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


def _dtype_of_others(input_: Tensor, weight: Tensor | None) -> torch.dtype:
    return input_.dtype if weight is None else weight.dtype


@cache
def _has_kernels() -> bool:
    """Whether the operators can be called, which are compiled at first use."""
    if platform.machine() not in _FLAGS:
        return False
    flags = (*_FLAGS[platform.machine()], *vectors())
    library = Library(Path(__file__).with_suffix(".cpp"), flags=flags, links=("c10", "torch_cpu"))
    return load_operators(library, "batch norms take the memory and the time that they take in eager PyTorch")


@cache
def _statistics_keep_the_bits() -> bool:
    """Whether they are those of this PyTorch, whose kernel for them is not called, but done again at less time."""
    numbers: dict[str, Any] = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float32, "device": "cpu"}
    for shape, momentum, eps in (((3, 21, 5, 7), 0.1, 1e-5), ((2, 9, 130), 0.37, 1e-3), ((4, 11, 1, 1), 0.01, 0.0)):
        input_ = 1 + torch.randn(shape, **numbers)
        running = [torch.rand(shape[1], **numbers) for _ in range(2)]
        ours = [tensor.clone() for tensor in running]
        expected = aten.native_batch_norm(input_, None, None, *running, True, momentum, eps)[1:]
        found = BATCH_NORM_STATISTICS(input_, *ours, momentum, eps)
        if not all(map(torch.equal, (*found, *ours), (*expected, *running))):
            log.info("batch norms are not split: this PyTorch computes their statistics in another way")
            return False
    return True


def _statistics_traced(input_: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return input_.new_empty(input_.shape[1]), input_.new_empty(input_.shape[1])


def _normalized_traced(input_: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(input_)


def _traced_over(_: Tensor, input_: Tensor, weight: Tensor | None, *__: Any, out: Tensor) -> tuple[Tensor, ...]:
    of_weight, of_bias = (input_.new_empty(input_.shape[1], dtype=_dtype_of_others(input_, weight)) for _ in range(2))
    return out, of_weight, of_bias


def _traced(gradient: Tensor, input_: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return _traced_over(gradient, input_, *others, out=torch.empty_like(input_))


_LIBRARY.impl("batch_norm_statistics", _statistics_traced, "Meta")
_LIBRARY.impl("batch_norm_normalize", _normalized_traced, "Meta")
_LIBRARY.impl("batch_norm_backward", _traced, "Meta")
_LIBRARY.impl("batch_norm_backward.out", _traced_over, "Meta")
