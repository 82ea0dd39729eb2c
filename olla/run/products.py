"""Matrix products on the CPU by oneDNN, where it takes less time than MKL for the same bits.

PyTorch has MKL multiply matrices of single precision, and MKL leaves AVX-512 unused on processors that are not
Intel's: oneDNN, which PyTorch brings along for convolutions, takes half of the time there. Both add up products one
after the other, MKL 192 at most (or half of what is less than twice as much), whose sum it adds to the result. So
oneDNN is given as many at a time, and adds their sum, too. That this gives the same bits, in less time, is not taken
for granted: it is tried out for each shape, layout and number of threads. (Of the inner dimensions up to 420, odd ones
between 192 and 384 have other bits, and stay MKL's.) Of several NaNs, one of another sign may be handed on.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, ops
from torch.utils.flop_counter import mm_flop, register_flop_formula

from olla.capture.rewrite.calls import value_of
from olla.compiling import Library, load_operators
from olla.torch_private import OpOverload, real_tensors

__all__ = ["BY_ONEDNN", "choose_products", "restore_products"]

log = logging.getLogger(__name__)

_LIBRARY = torch.library.Library("olla", "FRAGMENT")
_LIBRARY.define("mm(Tensor one, Tensor other, int threads) -> Tensor")
_LIBRARY.define("addmm(Tensor bias, Tensor one, Tensor other, int threads) -> Tensor")
BY_ONEDNN: Mapping[OpOverload, OpOverload] = {
    ops.aten.mm.default: ops.olla.mm.default,
    ops.aten.addmm.default: ops.olla.addmm.default,
}

# How many operations they are, for estimates of their time.
register_flop_formula(ops.olla.mm)(lambda one, other, *_, **__: mm_flop(one, other))
register_flop_formula(ops.olla.addmm)(lambda _, one, other, *__, **___: mm_flop(one, other))

_WORTH_IT = 2**23  # multiplications of a product below which calls, not kernels, take the time
_FASTER = 0.9  # of MKL's time, else it stays
_SOON = 0.05  # seconds below which one run each does not tell which is faster
_RUNS = 3

_OPERATORS = Library(Path(__file__).with_suffix(".cpp"), links=("c10", "torch_cpu"))

Layout = tuple[tuple[int, ...], tuple[int, ...], int]  # shape, strides and offset of a tensor


def choose_products(nodes: Iterable[fx.Node]) -> None:
    """Let oneDNN do the matrix products among ``nodes`` that it does faster, with the same bits, on this machine."""
    if not torch.backends.mkldnn.enabled:  # PyTorch's name for oneDNN
        return
    for node in nodes:
        target, threads = node.target, torch.get_num_threads()
        if isinstance(target, OpOverload) and target in BY_ONEDNN and _is_known(node) and _may_be_faster():
            layouts = tuple(_layout(value_of(argument)) for argument in node.args)
            if _is_faster(target, layouts, threads):
                node.target, node.args = BY_ONEDNN[target], (*node.args, threads)


def restore_products(nodes: Iterable[fx.Node]) -> bool:
    """Let MKL do them again, which copies no parts of matrices; whether there were any."""
    by_mkl: dict[Any, OpOverload] = {theirs: target for target, theirs in BY_ONEDNN.items()}
    found = [node for node in nodes if node.target in by_mkl]
    for node in found:
        node.target, node.args = by_mkl[node.target], node.args[:-1]
    if found:
        log.warning("matrix products are MKL's again, which hold less while they run")
    return bool(found)


def _is_known(node: fx.Node) -> bool:
    """Whether the call multiplies large dense matrices of single precision on the CPU, without a factor besides."""
    values = list(map(value_of, node.args))
    (rows, depth), (_, columns) = values[-2].shape, values[-1].shape
    return (
        not node.kwargs
        and rows * depth * columns >= _WORTH_IT
        and all(value.dtype == torch.float32 and value.device.type == "cpu" for value in values)
        and all(value.layout == torch.strided for value in values)
    )


@cache
def _may_be_faster() -> bool:
    """Whether the processor has AVX-512, and MKL leaves it unused."""
    return (
        platform.machine() == "x86_64"
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and not _is_of_intel()
        and load_operators(_OPERATORS, "MKL multiplies all matrices")
    )


def _is_of_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return True  # for all that is known


@cache
def _is_faster(target: OpOverload, layouts: tuple[Layout, ...], threads: int) -> bool:
    """Whether oneDNN multiplies random matrices of these layouts in less time, and with the same bits."""
    generator = torch.Generator().manual_seed(0)
    with real_tensors(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        given = [_random(layout, generator) for layout in layouts]
        mkl, onednn = partial(target, *given), partial(BY_ONEDNN[target], *given, threads)
        found, seconds = _timed(onednn)
        expected, limit = _timed(mkl)
        same = torch.equal(found.view(torch.int32), expected.view(torch.int32))
        del found, expected
        if same and limit < _SOON:
            for _ in range(_RUNS):
                seconds, limit = min(seconds, _timed(onednn)[1]), min(limit, _timed(mkl)[1])
    log.info("%s of %s: bits %s, %.2f of MKL's time", target, layouts, same, seconds / limit)
    return same and seconds < _FASTER * limit


def _timed(call: Callable[[], Tensor]) -> tuple[Tensor, float]:
    started = time.perf_counter()
    result = call()
    return result, time.perf_counter() - started


def _layout(tensor: Tensor) -> Layout:
    return tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset())


def _random(layout: Layout, generator: torch.Generator) -> Tensor:
    shape, strides, offset = layout
    extent = 1 + offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    numbers = torch.randn(extent, generator=generator, dtype=torch.float32, device="cpu")
    return numbers.as_strided(shape, strides, offset)
