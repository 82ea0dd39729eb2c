"""Matrix products on the CPU in less time than PyTorch has MKL take for them, with the same bits.

On processors that are not Intel's, MKL leaves AVX-512 unused: oneDNN, which PyTorch brings along for convolutions,
takes half of the time there. Both add up products one after the other, MKL 192 at most (or half of what is less than
twice as much), whose sum it adds to the result. So oneDNN is given as many at a time, and adds their sum, too. (Of the
inner dimensions up to 420, odd ones between 192 and 384 have other bits, and stay MKL's.) Of several NaNs, one of
another sign may be handed on.

Intel's processors, for their part, leave subnormal numbers, those below 1.2e-38, to microcode. A softmax makes 4e-44 of
a mask of -100, which Swin's shifted windows have, and the two products with its result, one forward and one backward,
took 23 to 150 times as long as without such numbers. ``subnormals.cpp`` takes 5 to 8 times as long instead.

That these give the same bits, in less time, is not taken for granted: it is tried out for each shape, layout and number
of threads.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, ops
from torch.utils.flop_counter import bmm_flop, mm_flop, register_flop_formula

from olla.capture.rewrite.calls import value_of
from olla.compiling import Library, load_operators, vectors
from olla.torch_private import OpOverload, real_tensors, storage_key

__all__ = ["BY_ONEDNN", "choose_products", "restore_products"]

log = logging.getLogger(__name__)

_LIBRARY = torch.library.Library("olla", "FRAGMENT")
_LIBRARY.define("mm(Tensor one, Tensor other, int threads) -> Tensor")
_LIBRARY.define("addmm(Tensor bias, Tensor one, Tensor other, int threads) -> Tensor")
_LIBRARY.define("bmm(Tensor one, Tensor other, int threads) -> Tensor")
BY_ONEDNN: Mapping[OpOverload, OpOverload] = {
    ops.aten.mm.default: ops.olla.mm.default,
    ops.aten.addmm.default: ops.olla.addmm.default,
}
_OURS: Mapping[OpOverload, OpOverload] = {**BY_ONEDNN, ops.aten.bmm.default: ops.olla.bmm.default}
_SOFTMAX = (ops.aten._softmax.default, ops.aten._softmax.out)

# How many operations they are, for estimates of their time.
register_flop_formula(ops.olla.mm)(lambda one, other, *_, **__: mm_flop(one, other))
register_flop_formula(ops.olla.addmm)(lambda _, one, other, *__, **___: mm_flop(one, other))
register_flop_formula(ops.olla.bmm)(lambda one, other, *_, **__: bmm_flop(one, other))

_WORTH_IT = 2**23  # multiplications of a product below which calls, not kernels, take the time
_FASTER = 0.9  # of PyTorch's time, else it stays
_SOON = 0.05  # seconds below which one run each does not tell which is faster
_RUNS = 3

_HERE, _LINKS = Path(__file__).parent, ("c10", "torch_cpu")

Layout = tuple[tuple[int, ...], tuple[int, ...], int]  # shape, strides and offset of a tensor


def choose_products(nodes: Sequence[fx.Node]) -> None:
    """Let ``nodes`` do the matrix products in other ways that are faster, with the same bits, on this machine."""
    threads = torch.get_num_threads()
    weights = {storage_key(value_of(node)) for node in nodes if node.target in _SOFTMAX}
    for node in nodes:
        if _is_for_onednn(node) or _is_for_subnormals(node, weights):
            target = node.target
            assert isinstance(target, OpOverload)
            layouts = tuple(_layout(value_of(argument)) for argument in node.args)
            if _is_faster(target, layouts, threads):
                node.target, node.args = _OURS[target], (*node.args, threads)


def restore_products(nodes: Iterable[fx.Node]) -> bool:
    """Let MKL do them again, which copies no parts of matrices; whether there were any."""
    by_mkl: dict[Any, OpOverload] = {theirs: target for target, theirs in BY_ONEDNN.items()}
    found = [node for node in nodes if node.target in by_mkl]
    for node in found:
        node.target, node.args = by_mkl[node.target], node.args[:-1]
    if found:
        log.warning("matrix products are MKL's again, which hold less while they run")
    return bool(found)


def _is_for_onednn(node: fx.Node) -> bool:
    """Whether the call multiplies large matrices."""
    uses_onednn = torch.backends.mkldnn.enabled  # PyTorch's name for it
    if node.target not in BY_ONEDNN or not uses_onednn or not _is_known(node):
        return False
    (rows, depth), (_, columns) = (value_of(argument).shape for argument in node.args[-2:])
    return rows * depth * columns >= _WORTH_IT and _onednn_may_be_faster()


def _is_for_subnormals(node: fx.Node, weights: Container[int]) -> bool:
    """Whether the call multiplies what a softmax has returned; ``weights`` are the storages of all such."""
    if node.target is not ops.aten.bmm.default or not _is_known(node):
        return False
    one = value_of(node.args[0])
    is_laid_out = one.is_contiguous() or one.mT.is_contiguous()
    return storage_key(one) in weights and is_laid_out and _subnormals_are_slow()


def _is_known(node: fx.Node) -> bool:
    """Whether the call is given dense numbers of single precision on the CPU, without a factor besides."""
    values = list(map(value_of, node.args))
    return (
        not node.kwargs
        and all(value.dtype == torch.float32 and value.device.type == "cpu" for value in values)
        and all(value.layout == torch.strided for value in values)
    )


@cache
def _onednn_may_be_faster() -> bool:
    """Whether the processor has AVX-512, and MKL leaves it unused."""
    return (
        platform.machine() == "x86_64"
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and not _is_of_intel()
        and load_operators(Library(_HERE / "products.cpp", links=_LINKS), "MKL multiplies all matrices")
    )


@cache
def _subnormals_are_slow() -> bool:
    """Whether the processor leaves subnormal numbers to microcode, which ours can spare it."""
    return _is_of_intel() and _has_ours()


@cache
def _has_ours() -> bool:
    """Whether the processor has vectors, so that products with subnormal numbers are worth it in other ways."""
    library = Library(_HERE / "subnormals.cpp", flags=("-O3", *vectors()), links=_LINKS)
    otherwise = "products with subnormal numbers take their time"
    return platform.machine() == "x86_64" and bool(vectors()) and load_operators(library, otherwise)


def _is_of_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return True  # for all that is known


@cache
def _is_faster(target: OpOverload, layouts: tuple[Layout, ...], threads: int) -> bool:
    """Whether ours multiplies random matrices of these layouts in less time, and with the same bits."""
    generator = torch.Generator().manual_seed(0)
    with real_tensors(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        given = [_random(layout, generator) for layout in layouts]
        if target not in BY_ONEDNN:
            _make_subnormal(given[0])
        theirs, ours = partial(target, *given), partial(_OURS[target], *given, threads)
        found, seconds = _timed(ours)
        expected, limit = _timed(theirs)
        same = torch.equal(found.view(torch.int32), expected.view(torch.int32))
        del found, expected
        if same and limit < _SOON:
            for _ in range(_RUNS):
                seconds, limit = min(seconds, _timed(ours)[1]), min(limit, _timed(theirs)[1])
    log.info("%s of %s: bits %s, %.2f of PyTorch's time", target, layouts, same, seconds / limit)
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


def _make_subnormal(batch: Tensor) -> None:
    """As masks do: some numbers where a row begins, others where it ends, and some rows as a whole; a few are zero."""
    half = batch.shape[2] // 2
    for part in (batch[:, ::3, :half], batch[:, 1::3, half:], batch[:, ::5]):
        part.mul_(1e-40)
