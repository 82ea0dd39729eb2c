"""Sums of gradients of selections and slices, written part by part, have the same bits."""

from __future__ import annotations

import unittest
from collections.abc import Callable, Sequence

import torch
from eager import EagerTestCase, bits, sgd
from torch import Tensor, nn, ops

from olla.capture.rewrite.disjoint_sum import Place, disjoint_sum

SPECIAL = [0.0, -0.0, float("nan"), -float("nan"), float("inf"), -float("inf"), 1e-40, -1e-40, 6e-8, -6e-8, 1.0, -2.5]


class Layer(nn.Module):
    """A matrix product, and then what is tested."""

    def __init__(self, sizes: Sequence[int], function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.sizes, self.function = nn.Linear(6, 48), sizes, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x).view(-1, *self.sizes))


class KernelTest(unittest.TestCase):
    def test_zeros_added_to_a_part_leave_its_bits_but_for_the_sign_of_zero(self) -> None:
        places: list[Place] = [(slice(None), 0), (slice(None), 2), (slice(None), 1)]
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            values = torch.tensor(SPECIAL * 11, dtype=dtype)
            parts = [values, values.flip(0), values.roll(5)]
            scattered = [
                ops.aten.select_backward(part, [len(values), 3], 1, place[1])
                for part, place in zip(parts, places, strict=True)
            ]
            expected = scattered[0] + scattered[1] + scattered[2]
            made = disjoint_sum(parts, places, [len(values), 3])
            self.assertTrue(torch.equal(made.isnan(), expected.isnan()))
            number = ~expected.isnan()
            self.assertTrue(torch.equal(bits(made[number]), bits(expected[number])))
            stacked = torch.stack([parts[0], parts[2], parts[1]], 1)
            self.assertFalse(torch.equal(bits(stacked[number]), bits(expected[number])))  # -0 stays -0


class DisjointSumTest(EagerTestCase):
    def check(self, sizes: Sequence[int], function: Callable[[Tensor], Tensor]) -> list[str]:
        """The backward calls that put parts into zeros or together."""
        torch.manual_seed(0)
        step = self.assert_training_same(Layer(sizes, function), lambda: torch.randn(8, 6), make_optimizer=sgd, steps=3)
        names = ("disjoint_sum", "select_backward", "slice_backward")
        lines = step.code.replace(".default(", "(").splitlines()
        return [name for line in lines for name in names if f"{name}(" in line]

    def test_selections(self) -> None:
        def attention(x: Tensor) -> Tensor:
            query, key, value = x[:, 0], x[:, 1], x[:, -1]
            return (query @ key.mT).softmax(-1) @ value

        self.assertEqual(self.check((3, 4, 4), attention), ["disjoint_sum"])

    def test_every_step_of_a_sequence(self) -> None:
        self.assertEqual(self.check((12, 4), lambda x: sum(x[:, i] ** (i + 1) for i in range(12))), ["disjoint_sum"])

    def test_slices_of_unequal_size(self) -> None:
        self.assertEqual(self.check((48,), lambda x: x[:, :10].exp().sum() + x[:, 10:].sin().sum()), ["disjoint_sum"])

    def test_slices_in_two_dimensions_as_when_patches_are_merged(self) -> None:
        def merge(x: Tensor) -> Tensor:
            parts = (x[:, i::2, j::2].pow(2 + i + j) for j in (0, 1) for i in (0, 1))
            return torch.cat([*parts], -1)

        self.assertEqual(self.check((4, 4, 3), merge), ["disjoint_sum"])

    def test_a_selection_of_a_slice(self) -> None:
        def parts(x: Tensor) -> Tensor:
            return x[:, 0].exp() + x[:, 1:][:, 0] ** 2 + x[:, 1:][:, 1] ** 3

        self.assertNotIn("disjoint_sum", self.check((3, 16), parts))

    def test_what_overlaps_or_leaves_a_gap_is_added_as_before(self) -> None:
        self.assertNotIn("disjoint_sum", self.check((3, 16), lambda x: x[:, 0].exp() + x[:, 1].sin()))
        self.assertNotIn("disjoint_sum", self.check((48,), lambda x: x[:, :30].exp() + x[:, 18:].sin()))

    def test_other_terms_are_added_as_before(self) -> None:
        found = self.check((2, 24), lambda x: (x[:, 0].exp() + x[:, 1].sin()).sum() + x.cos().sum())
        self.assertIn(found, (["disjoint_sum"], ["select_backward"] * 2))
        self.assertEqual(self.check((2, 24), lambda x: (x.exp() + x.exp()) * 2), [])


if __name__ == "__main__":
    unittest.main()
