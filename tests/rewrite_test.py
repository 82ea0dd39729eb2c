from __future__ import annotations

import re
import unittest
from unittest import mock

import torch
from eager import EagerTestCase
from torch import Tensor, nn

import olla
from olla.capture.rewrite import weight_gradient as slicing
from olla.capture.rewrite.weight_gradient import weight_gradient


class WeightGradientTest(EagerTestCase):
    """The gradient of a convolution's weight in slices has the bits of the whole, where it is used."""

    def check(self, batch: int, channels: int, outputs: int, size: int, kernel: int, stride: int) -> None:
        torch.manual_seed(0)
        x = torch.randn(batch, channels, size, size)
        weight = torch.randn(outputs, channels, kernel, kernel)
        padding = [kernel // 2] * 2
        out = torch.nn.functional.conv2d(x, weight, stride=stride, padding=padding)
        gradient = torch.randn_like(out)
        _, whole, _ = torch.ops.aten.convolution_backward(
            gradient, x, weight, None, [stride] * 2, padding, [1, 1], False, [0, 0], 1, [False, True, False]
        )
        for slices in (1, 2, 4, 8):
            sliced = weight_gradient(gradient, x, weight, [stride] * 2, padding, [1, 1], slices)
            torch.testing.assert_close(sliced, whole)  # always close; equal bits are checked before it is used

    def test_shapes_of_resnets(self) -> None:
        self.check(1, 512, 512, 7, 3, 1)
        self.check(2, 256, 512, 14, 3, 2)
        self.check(1, 1024, 2048, 7, 1, 1)

    def layer(self) -> nn.Module:
        return nn.Sequential(nn.Conv2d(256, 512, 3, padding=1), nn.ReLU(), nn.Conv2d(512, 256, 3, padding=1))

    def test_a_large_weight_is_taken_apart_and_the_step_stays_the_same(self) -> None:
        def inputs() -> Tensor:
            return torch.randn(1, 256, 5, 5)

        step = self.assert_training_same(self.layer(), inputs, steps=3)
        self.assertEqual(step.code.count("weight_gradient("), 2)

    def test_slices_are_as_large_as_there_is_room_for(self) -> None:
        for outputs, slices in ((256, [1, 8]), (384, [1, 4]), (512, [1, 1])):  # the peak is at the last layer's update
            layers = (nn.Conv2d(256, 512, 3, padding=1), nn.ReLU(), nn.Conv2d(512, 512, 3, padding=1))
            model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(512 * 5 * 5, outputs))
            with mock.patch.object(slicing, "_keeps_bits", return_value=True):
                optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
                step = olla.optimize(model, torch.randn(1, 256, 5, 5), optimizer=optimizer)
                for _ in range(4):  # until it is known what convolutions allocate
                    step(torch.randn(1, 256, 5, 5))
            found = re.findall(r"weight_gradient\(.*?(\d)\)", step.code)
            self.assertEqual([int(number) for number in found], slices, outputs)

    def test_it_is_not_used_where_the_bits_differ(self) -> None:
        keeps_bits = slicing._keeps_bits
        slicing._keeps_bits = lambda *_: False  # type: ignore[assignment]
        try:
            step = self.assert_training_same(self.layer(), lambda: torch.randn(1, 256, 5, 5), steps=2)
        finally:
            slicing._keeps_bits = keeps_bits
        calls = [line.split(";")[0] for line in step.code.splitlines() if "weight_gradient(" in line]
        self.assertEqual([call.rstrip()[-3:] for call in calls], [" 1)", " 1)"])

    def test_small_weights_and_large_images_are_left_alone(self) -> None:
        for model, x in (
            (nn.Conv2d(16, 64, 3), torch.randn(1, 16, 8, 8)),
            (nn.Conv2d(256, 512, 3), torch.randn(1, 256, 64, 64)),
        ):
            step = olla.optimize(model, x, optimizer=torch.optim.SGD(model.parameters()))
            self.assertNotIn("weight_gradient(", step.code)


if __name__ == "__main__":
    unittest.main()
