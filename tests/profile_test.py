"""Memory operator by operator."""

from __future__ import annotations

import unittest

import torch
from torch import nn

from olla.graph.events import Allocate, Release
from olla.measure.caching_allocator import replay
from olla.measure.profile import OpMemory, profile
from olla.torch_private import cpu_allocations

CPU = torch.device("cpu")


class ProfileTest(unittest.TestCase):
    def test_every_operator_with_what_was_allocated_while_it_ran(self) -> None:
        x = torch.ones(256)

        def call() -> None:
            a = torch.relu(x)  # 1024 bytes
            b = a.view(16, 16)
            c = torch.add(b, b)
            del a, b
            c.neg_()

        profiled = profile(call, CPU)
        self.assertEqual(
            profiled.ops,
            (
                OpMemory("aten.relu.default", 1024, None),
                OpMemory("aten.view.default", 1024, None),
                OpMemory("aten.add.Tensor", 2048, None),
                OpMemory("aten.neg_.default", 1024, None),
            ),
        )
        self.assertEqual(profiled.events, (Allocate(0, 1024), Allocate(1, 1024), Release(0), Release(1)))
        self.assertEqual((profiled.peak_allocated_bytes, profiled.peak_reserved_bytes), (2048, None))
        self.assertEqual(replay(profiled.events).peak_allocated_bytes, 2048)

    def test_the_peak_of_a_training_step_is_that_of_the_allocator(self) -> None:
        model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
        x = torch.randn(32, 64)

        def step() -> None:
            model.zero_grad()
            model(x).sum().backward()

        step()
        profiled = profile(step, CPU)
        model.zero_grad()
        allocations = cpu_allocations(step)
        peak = max(sum(allocations[: i + 1]) for i in range(len(allocations)))
        self.assertEqual(profiled.peak_allocated_bytes, peak)
        self.assertIn("aten.mm.default", [op.op for op in profiled.ops])
