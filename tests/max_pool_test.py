"""Max pools that keep bytes have the bits of PyTorch's, and a step with them needs less."""

from __future__ import annotations

import itertools
import math
import os
import unittest
from collections.abc import Iterator
from unittest import mock

import torch
from compile_test import CompiledTestCase
from eager import EagerTestCase, bits, sgd
from torch import Tensor, nn, ops

import olla
from olla.backend.backend import olla as olla_backend
from olla.capture.rewrite import max_pool
from olla.capture.rewrite.max_pool import MAX_POOL, MAX_POOL_BACKWARD, MAX_POOL_WITH_PLACES

aten = ops.aten
HAS_KERNELS = max_pool._has_kernels()

SHAPES = [(2, 5, 14, 14), (3, 28, 28), (1, 2, 33, 50), (4, 1, 9, 16), (1, 1, 1, 1), (2, 3, 40, 112)]
KERNELS = [(1, 1), (2, 2), (3, 3), (3, 2), (5, 1), (8, 8), (15, 17)]
STRIDES = [(1, 1), (2, 2), (3, 3), (2, 1), (5, 4)]
PADDINGS = [(0, 0), (1, 1), (1, 0), (4, 3)]

Pair = tuple[int, int]


def windows() -> Iterator[tuple[tuple[int, ...], Pair, Pair, Pair, bool]]:
    """Those that PyTorch takes."""
    for shape, kernel, stride, padding, ceil_mode in itertools.product(
        SHAPES, KERNELS, STRIDES, PADDINGS, (False, True)
    ):
        fits = zip(shape[-2:], kernel, padding, strict=True)
        if all(2 * pad <= size <= image + 2 * pad for image, size, pad in fits):
            yield shape, kernel, stride, padding, ceil_mode


def images(shape: tuple[int, ...]) -> Iterator[Tensor]:
    """Numbers; few of them, so that many are the largest; and what is no number, or less than all."""
    yield torch.randn(shape)
    yield torch.randn(shape).round().copysign(torch.randn(shape))
    odd = torch.tensor([math.nan, -math.nan, -math.inf, math.inf, 1.0, -0.0])
    yield odd[torch.multinomial(torch.tensor([1.0, 1, 20, 1, 2, 2]), math.prod(shape), replacement=True)].view(shape)


@unittest.skipUnless(HAS_KERNELS, "the kernels cannot be called here")
class KernelTest(unittest.TestCase):
    def test_they_give_the_bits_of_pytorch(self) -> None:
        torch.manual_seed(0)
        for shape, kernel, stride, padding, ceil_mode in windows():
            for number, image in enumerate(images(shape)):
                expected, indices = aten.max_pool2d_with_indices(image, kernel, stride, padding, [1, 1], ceil_mode)
                given = (kernel, stride, padding, expected.shape[-2:])
                maxima, places = MAX_POOL_WITH_PLACES(image, *given)
                gradient = torch.randn_like(expected)
                of_image = MAX_POOL_BACKWARD(gradient, places, *given[:3], shape[-2:])
                expected_gradient = aten.max_pool2d_with_indices_backward(
                    gradient, image, kernel, stride, padding, [1, 1], ceil_mode, indices
                )
                with self.subTest(shape, kernel=kernel, stride=stride, padding=padding, ceil=ceil_mode, image=number):
                    for found in (maxima, MAX_POOL(image, *given)):
                        self.assertTrue(torch.equal(bits(found), bits(expected)))
                    self.assertTrue(torch.equal(bits(of_image), bits(expected_gradient)))

    def test_gradients_that_are_not_contiguous(self) -> None:
        image, gradient = torch.randn(2, 3, 8, 8), torch.randn(4, 4, 3, 2).permute(3, 2, 0, 1)
        _, places = MAX_POOL_WITH_PLACES(image, [2, 2], [2, 2], [0, 0], [4, 4])
        found = MAX_POOL_BACKWARD(gradient, places, [2, 2], [2, 2], [0, 0], [8, 8])
        expected = MAX_POOL_BACKWARD(gradient.contiguous(), places, [2, 2], [2, 2], [0, 0], [8, 8])
        self.assertTrue(torch.equal(found, expected))


class Scale(nn.Module):
    """Nothing that has a workspace."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


class Pools(nn.Sequential):
    """The input of the first pool is needed by others, too; those of the second and the third are not."""

    def __init__(self) -> None:
        super().__init__(Scale(), nn.Tanh(), *(nn.MaxPool2d(3, 1, 1) for _ in range(3)))


class StepTest(EagerTestCase):
    def setUp(self) -> None:
        torch.manual_seed(0)

    def images(self) -> Tensor:
        return torch.randn(4, 3, 40, 40)

    def names(self, model: nn.Module, x: Tensor) -> list[str]:
        return [op.name for op in olla.to_graph(model, x, optimizer=sgd(model.parameters())).ops]

    @unittest.skipUnless(HAS_KERNELS, "the kernels cannot be called here")
    def test_a_step_needs_less_and_learns_the_same(self) -> None:
        step = self.assert_training_same(Pools(), self.images)
        self.assertEqual(step.code.count("olla.max_pool2d_with_places.default("), 3)
        self.assertEqual(step.code.count("olla.max_pool2d_backward.default("), 3)
        measured = step.measure(self.images())
        self.assertTrue(measured.exact)
        self.assertAlmostEqual(measured.baseline_peak_bytes, step.plan.baseline_peak_bytes, delta=8)  # a number more
        image = self.images().nbytes
        of_indices, of_places = 3 * 2 * image, 3 * image // 4  # eight bytes, and one byte, where a number has four
        kept = 2 * image  # by eager PyTorch besides
        self.assertLessEqual(measured.peak_bytes, measured.baseline_peak_bytes - of_indices + of_places - kept)

    @unittest.skipUnless(HAS_KERNELS, "the kernels cannot be called here")
    def test_an_inference_keeps_nothing(self) -> None:
        model, x = nn.Sequential(nn.Tanh(), nn.MaxPool2d(3, 1, 1), nn.Tanh()), torch.randn(2, 3, 40, 40)
        with olla.optimize(model.eval(), x, progress=False) as step:
            self.assertTrue(torch.equal(step(x), model(x)))
            self.assertIn("olla.max_pool2d.default(", step.code)
            measured = step.measure(x)
        self.assertEqual(measured.baseline_peak_bytes, step.plan.baseline_peak_bytes)
        self.assertEqual(measured.baseline_peak_bytes, 4 * x.nbytes)  # two images, and indices of eight bytes
        self.assertEqual(measured.peak_bytes, 2 * x.nbytes)

    @unittest.skipUnless(HAS_KERNELS, "the kernels cannot be called here")
    def test_budgets_may_have_them_run_again(self) -> None:
        model = nn.Sequential(Scale(), *(nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Tanh()) for _ in range(8)))
        curve = olla.frontier(model, self.images(), optimizer=sgd(model.parameters()))
        budget = curve.persistent_bytes + curve.schedules[-1].peak_bytes
        code = self.assert_training_same(model, self.images, memory_budget=budget).code
        self.assertGreater(code.count("olla.max_pool2d_with_places.default("), 8)

    def test_what_pytorch_computes_in_another_way_or_gives_to_others_is_left_alone(self) -> None:
        class Indices(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                maxima, indices = nn.functional.max_pool2d(x, 2, return_indices=True)
                return maxima * indices

        class Transposed(nn.MaxPool2d):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x.transpose(2, 3))

        x = torch.randn(2, 4, 34, 34)
        for model, image in (
            (Indices(), x),
            (nn.MaxPool2d(3, dilation=2), x),
            (nn.MaxPool2d(17), x),
            (nn.MaxPool2d(2), x.double()),
            (nn.MaxPool2d(2), x.to(memory_format=torch.channels_last)),
            (Transposed(2), x),
        ):
            names = self.names(nn.Sequential(Scale().to(image.dtype), model), image)
            self.assertIn("aten.max_pool2d_with_indices.default", names)

    def test_without_a_compiler_the_operator_stays(self) -> None:
        max_pool._has_kernels.cache_clear()
        self.addCleanup(max_pool._has_kernels.cache_clear)
        with mock.patch.dict(os.environ, {"CXX": "/nowhere/compiler", "XDG_CACHE_HOME": "/nowhere"}):
            names = self.names(Pools(), self.images())
        self.assertEqual(names.count("aten.max_pool2d_with_indices.default"), 3)


@unittest.skipUnless(HAS_KERNELS, "the kernels cannot be called here")
class CompiledTest(CompiledTestCase):
    def test_graphs_of_torch_compile_keep_bytes_too(self) -> None:
        images = torch.randn(4, 3, 40, 40)
        self.assert_training_same(Pools(), lambda net: net(images).square().mean())
        self.assert_inference_same(Pools(), lambda net: net(images))
        peaks = [
            self.peak_of(self.step_of(Pools(), lambda net: net(images).square().mean(), backend=backend)[1])
            for backend in ("aot_eager", olla_backend)
        ]
        of_indices, of_places = 3 * 2 * images.nbytes, 3 * images.nbytes // 4
        self.assertLessEqual(peaks[1], peaks[0] - of_indices + of_places)

    def test_images_of_each_size(self) -> None:
        model = Pools()
        compiled = torch.compile(model, backend=olla_backend)
        for size in (12, 16, 23):
            images, gradients = torch.randn(2, 3, size, size), []
            for net in (model, compiled):
                net(images).square().mean().backward()
                gradients.append([parameter.grad for parameter in model.parameters()])
                model.zero_grad()
            self.assert_same(gradients[1], gradients[0], f"gradients of images of size {size}")


if __name__ == "__main__":
    unittest.main()
