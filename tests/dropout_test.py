"""Dropout that keeps bytes draws the same random numbers and computes the same bits."""

from __future__ import annotations

import unittest
from typing import Any
from unittest import mock

import torch
from eager import EagerTestCase, bits, sgd
from torch import Tensor, nn
from torch.nn import functional as F

import olla
from olla.capture.rewrite import dropout
from olla.capture.rewrite.dropout import DROPOUT, DROPOUT_OUT, bytes_of_piece
from olla.graph.lifetimes import eager_peak_bytes, peak_bytes
from olla.torch_private import cpu_allocations

SPECIAL = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-40, -1e-40, 6e-8, 1.0, -2.5]


class KernelTest(unittest.TestCase):
    def test_bytes_are_drawn_from_the_same_random_numbers(self) -> None:
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            for numbers in (torch.empty(1001, dtype=dtype), torch.empty(70, 30, 500, dtype=dtype).transpose(0, 2)):
                for share in (0.9, 0.5, 0.123):
                    torch.manual_seed(1)
                    expected, state = torch.empty_like(numbers).bernoulli_(share), torch.get_rng_state()
                    torch.manual_seed(1)
                    kept = torch.empty_like(numbers, dtype=torch.uint8).bernoulli_(share)
                    self.assertTrue(torch.equal(kept.to(dtype), expected))
                    self.assertTrue(torch.equal(torch.get_rng_state(), state))

    def test_the_product_has_the_same_bits(self) -> None:
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            values = torch.tensor(SPECIAL * 300, dtype=dtype).reshape(20, 150)
            for input_ in (values, values.t(), torch.randn(50, 300).to(dtype)[:, ::2]):
                kept = torch.empty_like(input_, dtype=torch.uint8).bernoulli_(0.7)
                expected = input_ * kept.to(dtype).div_(0.7)
                for size in (1, 1000, 2**20):
                    with mock.patch.object(dropout, "_PIECE", size):
                        made = DROPOUT(input_, kept, 0.7)
                        over = input_.clone()
                        DROPOUT_OUT(over, kept, 0.7, out=over)
                    for result in (made, over):
                        self.assertEqual(result.stride(), expected.stride())
                        self.assertTrue(torch.equal(result.isnan(), expected.isnan()))
                        number = ~expected.isnan()
                        self.assertTrue(torch.equal(bits(result[number]), bits(expected[number])))

    def test_it_allocates_what_it_says(self) -> None:
        input_ = torch.randn(1000, 3000)
        for one in (input_, input_.t()):
            kept = torch.ones_like(one, dtype=torch.uint8)
            sizes = cpu_allocations(lambda one=one, kept=kept: DROPOUT_OUT(one, kept, 0.9, out=one))
            self.assertEqual([size for size in sizes if size > 64], [bytes_of_piece(one, kept)])


class DropoutTest(EagerTestCase):
    def block(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 600), nn.GELU(), nn.Dropout(0.2), nn.Linear(600, 64), nn.Dropout(0.1))

    def train(self, model: nn.Module, **options: Any) -> olla.Step:
        batch, loss = (lambda: torch.randn(500, 64)), {"loss_fn": F.mse_loss, "targets": lambda: torch.randn(500, 64)}
        return self.assert_training_same(model, batch, make_optimizer=sgd, steps=3, **loss, **options)

    def test_large_dropouts_keep_bytes_and_small_ones_do_not(self) -> None:
        step = self.train(self.block())
        self.assertEqual((step.code.count("olla.dropout."), step.code.count("div_.Scalar(")), (2, 1))

    def test_recomputed_dropouts_draw_the_same(self) -> None:
        model = nn.Sequential(*(self.block() for _ in range(3)))
        with self.assertRaises(olla.InfeasibleError) as caught:
            batch, training = torch.randn(500, 64), {"optimizer": sgd(model.parameters()), "loss_fn": F.mse_loss}
            olla.plan(model, batch, targets=batch.clone(), **training, memory_budget=1, place=False)
        step = self.train(model, memory_budget=caught.exception.best_bytes + 2**14)
        self.assertIn("replay(", step.code)
        self.assertGreater(step.code.count("olla.dropout."), 2 * 3)  # once forward and once backward, and again

    def test_attention_keeps_bytes(self) -> None:
        class Attention(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(16, 48)

            def forward(self, x: Tensor) -> Tensor:
                query, key, value = self.linear(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
                return F.scaled_dot_product_attention(query, key, value, dropout_p=0.1)

        step = self.assert_training_same(Attention(), lambda: torch.randn(4, 256, 16), make_optimizer=sgd, steps=2)
        self.assertEqual(step.code.count("olla.dropout."), 2)

    def test_an_expanded_gradient_has_the_same_bits(self) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(16, 2000)

            def forward(self, x: Tensor) -> Tensor:
                return F.dropout(self.linear(x), 0.5).sum()  # the gradient is one number, expanded

        step = self.assert_training_same(Model(), lambda: torch.randn(200, 16), make_optimizer=sgd, steps=2)
        self.assertEqual(step.code.count("olla.dropout."), 2)

    def test_the_baseline_is_what_eager_pytorch_needs(self) -> None:
        model = self.block()
        captured = {"inputs": torch.randn(5000, 64), "optimizer": sgd(model.parameters())}
        graph = olla.to_graph(model, **captured)
        with mock.patch("olla.capture.trace.rewrite"):
            plain = olla.to_graph(model, **captured)
        numbers = 5000 * (600 + 64)
        eager, planned = eager_peak_bytes(plain), peak_bytes(plain, range(len(plain.ops)))
        self.assertLessEqual(abs(eager_peak_bytes(graph) - eager), dropout._PIECE)
        self.assertLessEqual(peak_bytes(graph, range(len(graph.ops))), planned - 3 * numbers + dropout._PIECE)
        self.assertEqual(sum(storage.spared for storage in graph.storages), 3 * numbers)


if __name__ == "__main__":
    unittest.main()
