"""Batch norms in parts have the same bits as whole; their gradients are in memory once, or not at all."""

from __future__ import annotations

import itertools
import os
import unittest
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from eager import EagerTestCase, bits, sgd
from torch import Tensor, nn, ops

import olla
from olla.capture.rewrite import batch_norm
from olla.capture.rewrite.batch_norm import (
    BATCH_NORM_BACKWARD,
    BATCH_NORM_BACKWARD_OUT,
    BATCH_NORM_NORMALIZE,
    BATCH_NORM_STATISTICS,
)
from olla.torch_private import cpu_allocations

aten = ops.aten
SHAPES = [(6, 5), (4, 3, 7), (2, 64, 9, 9), (3, 17, 5, 1), (8, 130, 1, 1), (2, 4, 3, 5, 2)]
DTYPES = [(torch.float32,) * 2, (torch.float64,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)]
HAS_KERNEL = batch_norm._has_kernels()


def calls() -> Iterator[list[Any]]:
    """Arguments of backward calls of several shapes, layouts and dtypes, in training and not."""
    for shape, (dtype, of_weight), train, is_last in itertools.product(SHAPES, DTYPES, (True, False), (False, True)):
        torch.manual_seed(0)
        layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape) if is_last else 0)
        x, gradient = (torch.randn(shape).to(dtype) for _ in range(2))
        if layout:
            x, gradient = (tensor.contiguous(memory_format=layout) for tensor in (x, gradient))
        weight, bias, mean, variance = (torch.rand(shape[1]).to(of_weight) for _ in range(4))
        _, *saved = aten.native_batch_norm(x, weight, bias, mean, variance, train, 0.1, 1e-5)
        yield [gradient, x, weight, mean, variance, *saved, train, 1e-5, [True] * 3]


@unittest.skipUnless(HAS_KERNEL, "the kernel cannot be called here")
class KernelTest(unittest.TestCase):
    def test_it_gives_the_same_bits_wherever_it_writes(self) -> None:
        for arguments in calls():
            gradient, x, *_ = arguments
            expected = aten.native_batch_norm_backward(*arguments)
            over = [gradient.clone(), x.clone(), torch.full_like(x, 7)]
            for place, out in enumerate(over):
                given = [over[0] if place == 0 else gradient, over[1] if place == 1 else x, *arguments[2:]]
                with self.subTest(shape=x.shape, dtype=x.dtype, stride=x.stride(), train=arguments[7], over=place):
                    found = BATCH_NORM_BACKWARD_OUT(*given, out=out)
                    self.assertEqual(found[0].data_ptr(), out.data_ptr())
                    self.assert_same(found, expected)
            self.assert_same(BATCH_NORM_BACKWARD(*arguments), expected)

    def assert_same(self, found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
        for one, other in zip(found, expected, strict=True):
            self.assertEqual((one.dtype, one.stride()), (other.dtype, other.stride()))
            self.assertTrue(torch.equal(bits(one), bits(other)))

    def test_it_allocates_what_it_returns(self) -> None:
        gradient, x, *others = next(calls())
        x, gradient = (torch.randn(64, 5, 40, 40) for _ in range(2))
        kept: list[Any] = []
        for target, named, large in (
            (aten.native_batch_norm_backward, {}, 2),
            (BATCH_NORM_BACKWARD, {}, 1),
            (BATCH_NORM_BACKWARD_OUT, {"out": gradient}, 0),
        ):
            allocated = cpu_allocations(
                lambda target=target, named=named: kept.append(target(gradient, x, *others, **named))
            )
            self.assertEqual(sum(size >= x.nbytes for size in allocated), large, target)

    def test_other_layouts_than_were_traced_go_to_the_operator(self) -> None:
        gradient, x, *others = next(call for call in calls() if call[1].dim() == 4)
        mixed = gradient.contiguous(memory_format=torch.channels_last)
        self.assertNotEqual(mixed.stride(), x.stride())
        expected = aten.native_batch_norm_backward(mixed, x, *others)
        self.assert_same(BATCH_NORM_BACKWARD(mixed, x, *others), expected)


@unittest.skipUnless(HAS_KERNEL, "the kernels cannot be called here")
class PartsTest(unittest.TestCase):
    def test_they_give_the_bits_of_the_whole(self) -> None:
        torch.manual_seed(0)
        shapes = [*SHAPES, (1, 8, 33), (2, 24, 3, 3), (5, 1, 2, 2)]
        for shape, layout, affine, tracked, momentum in itertools.product(
            shapes, (torch.contiguous_format, torch.channels_last), (True, False), (True, False), (0.1, 1 / 3)
        ):
            x = 3 + torch.randn(shape)
            if len(shape) == 4:
                x = x.contiguous(memory_format=layout)
            weight, bias = (torch.randn(shape[1]) if affine else None for _ in range(2))
            running = [torch.rand(shape[1]) if tracked else None for _ in range(2)]
            ours = [tensor.clone() if tracked else None for tensor in running]
            with self.subTest(shape=shape, stride=x.stride(), affine=affine, tracked=tracked, momentum=momentum):
                expected = aten.native_batch_norm(x, weight, bias, *running, True, momentum, 1e-5)
                statistics = BATCH_NORM_STATISTICS(x, *ours, momentum, 1e-5)
                found = BATCH_NORM_NORMALIZE(x, weight, bias, *statistics)
                self.assertEqual(found.stride(), expected[0].stride())
                pairs = zip((found, *statistics, *ours), (*expected, *running), strict=True)
                for one, other in pairs:
                    self.assertTrue(one is other is None or torch.equal(bits(one), bits(other)))

    def test_other_statistics_than_those_of_pytorch_are_noticed(self) -> None:
        def biased(*given: Any) -> tuple[Tensor, ...]:
            mean, invstd = BATCH_NORM_STATISTICS(*given)
            return mean, torch.nextafter(invstd, invstd + 1)

        keep = batch_norm._statistics_keep_the_bits
        keep.cache_clear()
        self.addCleanup(keep.cache_clear)
        with mock.patch.object(batch_norm, "BATCH_NORM_STATISTICS", biased):
            self.assertFalse(keep())
            names = [op.name for op in olla.to_graph(Norms(), torch.randn(4, 8, 16, 16)).ops]
            self.assertIn("aten.native_batch_norm.default", names)
        keep.cache_clear()
        torch.set_default_dtype(torch.float64)
        self.addCleanup(torch.set_default_dtype, torch.float32)
        self.assertTrue(keep())


class Norms(nn.Sequential):
    """Nothing that has a workspace. The first of the norms has no gradient of its input."""

    def __init__(self) -> None:
        super().__init__(*(nn.Sequential(nn.BatchNorm2d(8), nn.Tanh()) for _ in range(4)))


class StepTest(EagerTestCase):
    def setUp(self) -> None:
        torch.manual_seed(0)

    def images(self) -> Tensor:
        return torch.randn(4, 8, 16, 16)

    def trained(self, model: nn.Module) -> tuple[olla.Step, olla.Measurement]:
        step = self.assert_training_same(model, self.images)
        measured = step.measure(self.images())
        self.assertTrue(measured.exact)
        self.assertAlmostEqual(measured.baseline_peak_bytes, step.plan.baseline_peak_bytes, delta=8)  # a number more
        return step, measured

    @unittest.skipUnless(HAS_KERNEL, "the kernel cannot be called here")
    def test_a_step_needs_less_and_learns_the_same(self) -> None:
        step, measured = self.trained(Norms())
        self.assertEqual(step.code.count("olla.batch_norm_backward.out("), 3)
        self.assertLess(measured.peak_bytes, measured.baseline_peak_bytes - 2 * self.images().nbytes)

    @unittest.skipUnless(HAS_KERNEL, "the kernel cannot be called here")
    def test_only_normalizing_runs_again(self) -> None:
        model = nn.Sequential(nn.Tanh(), Norms())
        curve = olla.frontier(model, self.images(), optimizer=sgd(model.parameters()))
        budget = curve.persistent_bytes + curve.schedules[-1].peak_bytes
        code = self.assert_training_same(model, self.images, memory_budget=budget).code
        self.assertEqual(code.count("olla.batch_norm_statistics.default("), 4)
        self.assertGreater(code.count("olla.batch_norm_normalize.default("), 4)

    def test_what_is_not_of_single_precision_or_not_in_training_stays_whole(self) -> None:
        for model, images in (
            (Norms().double(), self.images().double()),
            (Norms().eval(), self.images()),
            (Norms().bfloat16(), self.images().bfloat16()),
        ):
            names = [op.name for op in olla.to_graph(model, images).ops]
            self.assertNotIn("olla.batch_norm_statistics.default", names)
            self.assertTrue([name for name in names if "batch_norm" in name])

    def test_without_a_compiler_the_operator_stays(self) -> None:
        batch_norm._has_kernels.cache_clear()
        self.addCleanup(batch_norm._has_kernels.cache_clear)
        with mock.patch.dict(os.environ, {"CXX": "/nowhere/compiler", "XDG_CACHE_HOME": "/nowhere"}):
            model = Norms()
            graph = olla.to_graph(model, self.images(), optimizer=sgd(model.parameters()))
        names = [op.name for op in graph.ops]
        self.assertEqual(sum(name.startswith("aten.native_batch_norm_backward") for name in names), 4)
        self.assertFalse([name for name in names if name.startswith("olla.")], names)

    def test_what_the_kernel_is_not_called_for_is_left_alone(self) -> None:
        class Transposed(nn.BatchNorm2d):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x.transpose(2, 3))

        for left_alone in (Transposed(8), nn.BatchNorm2d(8, affine=False)):
            model = nn.Sequential(nn.Conv2d(8, 8, 1), left_alone, nn.Tanh())  # its input has a gradient
            step = self.assert_training_same(model, self.images)
            self.assertEqual(step.code.count("aten.native_batch_norm_backward."), 1)
            self.assertNotIn("olla.batch_norm_backward", step.code)


if __name__ == "__main__":
    unittest.main()
