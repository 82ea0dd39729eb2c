"""Products with subnormal numbers have the bits of sums rounded at each addition, which are MKL's; steps use them."""

from __future__ import annotations

import itertools
import math
import unittest
from fractions import Fraction
from functools import reduce
from typing import Any
from unittest import mock

import torch
from eager import EagerTestCase
from torch import Tensor, fx, nn, ops
from torch.nn import functional as F

import olla
from olla.run import products
from olla.run.products import choose_products
from olla.torch_private import trace_fake

aten = ops.aten
THREADS = torch.get_num_threads()
UNIT = 2.0**-149  # the least of all floats
COLUMNS = 32  # that are added up together

can_be_called = unittest.skipUnless(products._has_ours(), "the processor has no vectors, or there is no compiler")
any_time = mock.patch.object(products, "_FASTER", float("inf"))  # bits decide alone
are_slow = unittest.skipUnless(products._subnormals_are_slow(), "subnormal numbers are not slow, or ours not there")


def added(sum_: float, a: float, b: float) -> float:
    """``sum_ + a * b`` in single precision: the float next to it, of two as near the even one."""
    exact = Fraction(a) * Fraction(b) + Fraction(sum_)
    if not exact:
        return a * b + sum_  # zero, of the right sign
    exponent = abs(exact.numerator).bit_length() - exact.denominator.bit_length()
    exponent -= abs(exact) < Fraction(2) ** exponent
    unit = Fraction(2) ** max(exponent - 23, -149)
    return math.copysign(round(exact / unit) * unit, exact)


def one_by_one(one: Tensor, other: Tensor) -> Tensor:
    """The product of two matrices, each sum rounded at each addition, and nowhere else."""
    columns = other.t().tolist()
    sums = [
        [reduce(lambda s, ab: added(s, *ab), zip(row, c, strict=True), 0.0) for c in columns] for row in one.tolist()
    ]
    return torch.tensor(sums, dtype=torch.float32)


def weights(batch: int, rows: int, depth: int) -> Tensor:
    """What a softmax makes of masks of -100, of some columns first or last, and of some less far away."""
    scores = torch.randn(batch, rows, depth)
    masked = (torch.arange(rows)[:, None] * 7 // rows + torch.arange(depth) * 5 // depth) % 3 == 0
    scores[masked.expand_as(scores)] -= 100
    scores[:, ::4, :3] -= torch.linspace(60, 110, 3)
    return scores.softmax(-1)


@can_be_called
class OperatorTest(EagerTestCase):
    def assert_one_by_one(self, one: Tensor, other: Tensor, what: str) -> None:
        for laid_out in (one, one.t().contiguous().t()):
            found = ops.olla.bmm(laid_out[None], other[None], THREADS)
            self.assert_same(found[0], one_by_one(one, other), f"{what}, {laid_out.stride()}")

    def test_sums_are_rounded_at_each_addition(self) -> None:
        for seed in range(4):
            torch.manual_seed(seed)
            one, other = torch.randn(12, 9), torch.randn(9, 2 * COLUMNS)
            for part in (one[:3, :5], one[3:6, 4:], one[6:8], one[8:10, ::2], one[10:, :8]):
                part *= 10 ** (-37 - 8 * torch.rand(part.shape))  # all that is subnormal, and what is just not
            self.assert_one_by_one(one, other, f"seed {seed}")
            self.assert_one_by_one(one, other * 1e-8, f"seed {seed}, small")
            self.assert_one_by_one(one, other * 1e4, f"seed {seed}, large: more than can be counted")

    def test_the_least_bit_decides_where_halves_are_rounded(self) -> None:
        # (1 + 2^-12)^2 = 1 + 2^-11 + 2^-24 is half-way between two floats, but for what was added before.
        one = torch.tensor([[n * UNIT, 1 + 2.0**-12] for n in (-3, -1, 0, 1, 3)])
        other = torch.tensor([[1.0, 0.3, 0.5, -0.5], [1 + 2.0**-12] * 4]).repeat(1, COLUMNS // 4)
        self.assert_one_by_one(one, other, "halves")
        self.assertEqual(one_by_one(one, other).unique().numel(), 2)

    def test_halves_of_units_are_rounded_to_even_ones(self) -> None:
        one = torch.tensor([[n * UNIT, m * UNIT] for n, m in itertools.product(range(-3, 4), range(-3, 4))])
        other = torch.tensor([[0.5, 1.5, -0.5, 2.5], [0.5, 0.5, 1.5, -1.5]]).repeat(1, COLUMNS // 4)
        self.assert_one_by_one(one, other, "units")

    def test_what_is_added_to_little_counts(self) -> None:
        one = torch.tensor([[2.0**-120, 2.0**-127], [1.0, 2.0**-127], [2.0**-126, -(2.0**-127)]])
        other = torch.tensor([[1.0, 1.0, 1.0, 1e-30], [1.0, 2.0**90, 2.0**127, 1.0]]).repeat(1, COLUMNS // 4)
        self.assert_one_by_one(one, other, "little")

    def test_products_have_the_bits_of_pytorch(self) -> None:
        torch.manual_seed(0)
        for batch, rows, depth, columns in ((48, 49, 49, 32), (3, 20, 33, 96), (1, 70, 180, 64)):
            one, other = weights(batch, rows, depth), torch.randn(batch, depth, columns + 4)[..., 2:-2]
            self.assertTrue(((one > 0) & (one < torch.finfo(torch.float32).tiny)).any())
            for first in (one, one.mT.contiguous().mT, weights(batch, depth, rows).mT):
                found, expected = ops.olla.bmm(first, other, THREADS), aten.bmm(first, other)
                if products._subnormals_are_slow():
                    self.assert_same(found, expected, f"{first.shape}, {first.stride()}")
                else:  # on these, MKL may add up in another order
                    torch.testing.assert_close(found, expected)

    @are_slow
    def test_special_numbers_have_them_too(self) -> None:
        one, other = weights(4, 49, 49), torch.randn(4, 49, COLUMNS)
        for number, special in enumerate((0.0, -0.0, UNIT, -1e-40, 1e-38, torch.inf, -torch.inf, torch.nan, 3e38)):
            one[1, 5 * number : 5 * number + 5, 7 * number % 49] = special
            other[2, 3 * number % 49, 3 * number : 3 * number + 3] = special
        one[3] = torch.where(torch.rand(49, 49) < 0.5, -1e-45, -0.0)  # the sums are subnormal, or zero of either sign
        found, expected = ops.olla.bmm(one, other, THREADS), aten.bmm(one, other)
        self.assertTrue(expected.isnan().any() and expected.isinf().any() and expected.isfinite().any())
        self.assert_same(found, expected, "special numbers")

    def test_the_rest_is_left_to_pytorch(self) -> None:
        one, other = weights(4, 49, 49), torch.randn(4, 49, COLUMNS)
        cases: dict[str, tuple[Tensor, Tensor, int]] = {
            "another number of threads": (one, other, THREADS + 1),
            "no subnormal numbers, but zeros": ((one - 1e-3).relu(), other, THREADS),
            "some columns too many": (one, torch.randn(4, 49, COLUMNS + 1), THREADS),
            "a part of larger matrices": (weights(4, 49, 60)[..., :49], other, THREADS),
            "columns apart": (one, torch.randn(4, COLUMNS, 49).mT, THREADS),
            "double precision": (one.double(), other.double(), THREADS),
        }
        for name, (first, second, threads) in cases.items():
            with self.subTest(name), torch.profiler.profile() as profile:
                found = ops.olla.bmm(first, second, threads)
            self.assertIn("aten::bmm", {event.key for event in profile.key_averages()})
            self.assert_same(found, aten.bmm(first, second), name)


class Attention(nn.Module):
    """Of windows, some of whose places are masked as in Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 192)
        self.out = nn.Linear(64, 5)

    def forward(self, windows: Tensor) -> Tensor:
        """Scores of shape (windows, 5), of windows of shape (windows, 49, 64)."""
        count, places, channels = windows.shape
        q, k, v = self.qkv(windows).view(count, places, 3, 2, channels // 2).permute(2, 0, 3, 1, 4)
        side_of = torch.arange(places) > 20
        masks = (side_of != side_of[:, None]) * -100.0
        attended = (q @ k.mT * 0.1 + masks).softmax(-1) @ v
        return self.out(attended.transpose(1, 2).reshape(count, places, channels).mean(1))


@are_slow
@any_time
class StepTest(EagerTestCase):
    def setUp(self) -> None:
        torch.manual_seed(0)
        self.model = Attention()

    def inputs(self) -> Tensor:
        return torch.randn(16, 49, 64)

    def targets(self) -> Tensor:
        return torch.randint(0, 5, (16,))

    def count(self, step: olla.Step) -> int:
        return sum(node.target is ops.olla.bmm.default for node in step._current.draft.lowered.nodes)

    def test_training_calls_them_forward_and_backward(self) -> None:
        step = self.assert_training_same(self.model, self.inputs, loss_fn=F.cross_entropy, targets=self.targets)
        self.assertTrue(step.measure(self.inputs(), targets=self.targets()).exact)
        self.assertEqual(self.count(step), 2)

    def test_inference_calls_them(self) -> None:
        self.assertEqual(self.count(self.assert_inference_same(self.model, self.inputs)), 1)

    def test_compiled_models_call_them(self) -> None:
        self.assertIn("olla::bmm", self.assert_compiled_same(self.model, self.inputs, self.targets))

    def test_other_products_stay(self) -> None:
        def traced(one: Tensor, other: Tensor, **options: Any) -> fx.Node:
            module = trace_fake(lambda a, b: torch.bmm(F.softmax(a, -1, **options), b), one, other)
            node = module.graph.find_nodes(op="call_function", target=aten.bmm.default)[0]
            choose_products([each for each in module.graph.nodes if each.op == "call_function"])
            return node

        one, other = torch.randn(48, 49, 49), torch.randn(48, 49, 32)
        self.assertIs(traced(one, other).target, ops.olla.bmm.default)
        self.assertIs(traced(one, other.double(), dtype=torch.float64).target, aten.bmm.default)
        node = trace_fake(torch.bmm, one, other).graph.find_nodes(op="call_function", target=aten.bmm.default)[0]
        choose_products([node])
        self.assertIs(node.target, aten.bmm.default)  # no softmax before it


if __name__ == "__main__":
    unittest.main()
