"""Gradients of embeddings, added row by row to that of a head which shares the weight, have the same bits."""

from __future__ import annotations

import itertools
import unittest
from functools import partial
from typing import Any

import torch
from eager import EagerTestCase, bits, sgd
from torch import Tensor, nn, ops
from torch.nn import functional as F

import olla
from olla.capture.rewrite.embedding_sum import EMBEDDING_SUM, EMBEDDING_SUM_OUT, bytes_of_tokens
from olla.torch_private import cpu_allocations

ROWS, COLUMNS = 60, 16
SPECIAL = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-40, -1e-40, 6e-8, 1.0, -2.5]


def tokens() -> Tensor:
    """Some that are the same, more than twice, and the last row."""
    return torch.tensor([[3, 59, 3, 0, 7, 3, 11], [0, 8, 7, 59, 3, 20, 21]])


class KernelTest(unittest.TestCase):
    def test_rows_have_the_bits_of_the_sum(self) -> None:
        dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
        for dtype, padding_idx, transposed in itertools.product(dtypes, (-1, 3, 40), (False, True)):
            torch.manual_seed(0)
            other = torch.randn(COLUMNS, ROWS).t() if transposed else torch.randn(ROWS, COLUMNS)
            gradient = torch.randn(2, 7, COLUMNS)
            for flat, step in ((other, 7), (gradient, 5)):
                for number, special in enumerate(SPECIAL * 4):
                    flat[..., number * step % flat.shape[-2], number % COLUMNS] = special
            other, gradient = other.to(dtype), gradient.to(dtype)
            given = (gradient, tokens(), padding_idx)
            expected = other + ops.aten.embedding_dense_backward(gradient, tokens(), ROWS, padding_idx, False)
            made = EMBEDDING_SUM(other, *given)
            over = other.clone()
            self.assertIs(EMBEDDING_SUM_OUT(over, *given, out=over), over)
            with self.subTest(dtype=dtype, padding_idx=padding_idx, transposed=transposed):
                self.assertTrue(expected.isnan().any() and expected.isinf().any())
                for found in (made, over):
                    self.assertEqual(found.stride(), expected.stride())
                    self.assertTrue(torch.equal(found.isnan(), expected.isnan()))
                    number = ~expected.isnan()
                    self.assertTrue(torch.equal(bits(found[number]), bits(expected[number])))

    def test_the_workspace_is_as_foreseen(self) -> None:
        for transposed in (False, True):
            other = torch.zeros(768, 5000).t() if transposed else torch.zeros(5000, 768)
            gradient, indices = torch.ones(1, 128, 768), torch.randint(0, 5000, (1, 128))
            sizes = cpu_allocations(partial(EMBEDDING_SUM_OUT, other, gradient, indices, -1, out=other))
            self.assertAlmostEqual(max(itertools.accumulate(sizes)) / bytes_of_tokens(gradient, indices), 1, delta=0.01)


class Tied(nn.Module):
    """A language model without layers, whose head is its embedding."""

    def __init__(self, rows: int = 300, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows, COLUMNS, **options)
        self.head = nn.Linear(COLUMNS, rows, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens).tanh()).flatten(0, 1)


class StepTest(EagerTestCase):
    def train(self, model: nn.Module, count: int = 12) -> olla.Step:
        def batch() -> Tensor:
            return torch.randint(0, 30, (2, count))  # few, so that some are the same, others in each step

        def targets() -> Tensor:
            return torch.randint(0, 300, (2 * count,))

        step = self.assert_training_same(model, batch, loss_fn=F.cross_entropy, targets=targets, make_optimizer=sgd)
        self.assertTrue(step.measure(batch(), targets=targets()).exact)
        return step

    def test_a_head_that_shares_the_weight(self) -> None:
        for model in (Tied(), Tied(padding_idx=5)):
            step = self.train(model)
            self.assertIn("embedding_sum.out", step.code)
            self.assertNotIn("embedding_dense_backward", step.code)

    def test_the_gradient_is_there_once(self) -> None:
        model = Tied(20_000)
        inputs, targets = torch.randint(0, 20_000, (1, 3)), torch.randint(0, 20_000, (3,))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        plan = olla.plan(model, inputs, loss_fn=F.cross_entropy, targets=targets, optimizer=optimizer)
        weight = model.head.weight.nbytes
        self.assertLess(plan.peak_bytes, 1.5 * weight)
        self.assertGreater(plan.baseline_peak_bytes, 1.9 * weight)

    def test_others_stay(self) -> None:
        for model, count in ((Tied(scale_grad_by_freq=True), 12), (Tied(), 40)):
            self.assertIn("embedding_dense_backward", self.train(model, count).code)


if __name__ == "__main__":
    unittest.main()
