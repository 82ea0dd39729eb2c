"""Calls that do nothing are not in the step, and it stays the same."""

from __future__ import annotations

import unittest

import torch
from eager import EagerTestCase
from torch import Tensor, nn

import olla


class NeedlessTest(EagerTestCase):
    def setUp(self) -> None:
        torch.manual_seed(0)

    def test_saved_tensors_and_the_reserves_of_batch_norms(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten(), nn.Softmax(1))
        step = self.assert_training_same(model, lambda: torch.randn(4, 3, 8, 8), steps=3)
        self.assertNotIn("aten.alias", step.code)
        self.assertNotIn("aten.empty", step.code)

    def test_an_alias_that_is_a_result_is_a_tensor_of_its_own(self) -> None:
        class Twice(nn.Linear):
            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                y = super().forward(x)
                return y, y.detach()

        model, x = Twice(4, 4).eval(), torch.randn(2, 4)
        with olla.optimize(model, x) as step:
            for _ in range(4):
                one, other = step(x)
                self.assertIsNot(one, other)
                self.assertEqual(one.data_ptr(), other.data_ptr())
                self.assert_same(other, model(x)[1].detach(), "alias")

    def test_an_alias_keeps_its_shape_when_what_it_is_of_is_reshaped(self) -> None:
        class Reshaping(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                y = super().forward(x)
                kept = y.detach()
                y.t_()
                return kept @ y

        model, x = Reshaping(3, 5).eval(), torch.randn(2, 3)
        with olla.optimize(model, x) as step, torch.no_grad():
            for _ in range(4):
                self.assert_same(step(x), model(x), "output")


if __name__ == "__main__":
    unittest.main()
