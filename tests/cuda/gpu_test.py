"""What can only be checked on a GPU: the arena in front of the caching allocator, under real kernels."""

from __future__ import annotations

import copy
import unittest
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F

import olla
from olla import planning
from olla.fit.spill import Bandwidth
from olla.measure.profile import profile


@unittest.skipUnless(torch.cuda.is_available(), "needs a GPU and a CUDA build of PyTorch")
class GpuTest(unittest.TestCase):
    def setUp(self) -> None:
        torch.use_deterministic_algorithms(True, warn_only=True)
        self.addCleanup(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(32 * 64, 10),
        ).cuda()  # fmt: skip
        self.x, self.y = torch.randn(16, 3, 64, 64, device="cuda"), torch.randint(0, 10, (16,), device="cuda")

    def planned(self) -> olla.Step:
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        step = olla.optimize(self.model, self.x, loss_fn=F.cross_entropy, targets=self.y, optimizer=optimizer)
        self.addCleanup(step.close)
        return step

    def settled(self) -> olla.Step:
        step = self.planned()
        for _ in range(5):
            step(self.x, targets=self.y)
        self.assertEqual(step._current.not_executed, "")
        self.assertIsNotNone(step._current.replay)
        return step

    def test_steps_equal_eager_bit_by_bit(self) -> None:
        eager = copy.deepcopy(self.model)
        optimizer = torch.optim.SGD(eager.parameters(), lr=0.01, momentum=0.9)
        step = self.planned()
        for number in range(8):
            optimizer.zero_grad()
            loss = F.cross_entropy(eager(self.x), self.y)
            loss.backward()
            optimizer.step()
            self.assertTrue(torch.equal(step(self.x, targets=self.y), loss), f"loss of step {number}")
            for (name, a), b in zip(self.model.state_dict().items(), eager.state_dict().values(), strict=True):
                self.assertTrue(torch.equal(a, b), f"{name} after step {number}")

    def test_twenty_steps_miss_no_planned_address(self) -> None:
        step = self.settled()
        for _ in range(20):
            step(self.x, targets=self.y)
            counts = step._current.replay.counts
            self.assertEqual((counts.missed, counts.escapes), (0, 0))
            self.assertGreater(counts.hits, 20)

    def test_the_planned_peak_is_that_of_the_caching_allocator_without_fragmentation(self) -> None:
        step = self.settled()
        measured = step.measure(self.x, targets=self.y)
        self.assertTrue(measured.exact, (measured.peak_bytes, measured.planned_bytes))
        self.assertLess(step.plan.fragmentation, 0.001)
        self.assertLessEqual(measured.peak_bytes, measured.baseline_peak_bytes)
        execution = step._current
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(self.x, targets=self.y)
        torch.cuda.synchronize()
        peak = torch.cuda.memory_stats()["allocated_bytes.all.peak"] - before + execution.arena.arena_bytes
        self.assertAlmostEqual(peak, execution.planned_bytes, delta=512)

    def test_a_step_on_another_stream_is_right_and_gets_an_arena_of_that_stream(self) -> None:
        net = olla.optimize(self.model.eval(), self.x)
        self.addCleanup(net.close)
        expected = [net(self.x) for _ in range(4)][-1]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), self.assertLogs("olla", "WARNING"):
            found = [net(self.x) for _ in range(8)]
        torch.cuda.current_stream().wait_stream(stream)
        for result in found:
            self.assertTrue(torch.equal(result, expected))
        self.assertEqual(net._current.replay.counts.missed, 0)

    def test_a_step_that_spills_to_the_host_equals_eager_within_its_budget(self) -> None:
        eager = copy.deepcopy(self.model)
        optimizer, own = (torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9) for m in (eager, self.model))
        free = olla.plan(self.model, self.x, loss_fn=F.cross_entropy, targets=self.y, optimizer=own, place=False)
        budget = free.persistent_bytes + free.peak_bytes * 9 // 10
        with mock.patch.object(planning, "measured_bandwidth", return_value=Bandwidth(1e18, 1e18)):
            step = olla.optimize(
                self.model, self.x, loss_fn=F.cross_entropy, targets=self.y, optimizer=own,
                memory_budget=budget, spill_dir="host",
            )  # fmt: skip
            self.addCleanup(step.close)
            for number in range(8):
                optimizer.zero_grad()
                loss = F.cross_entropy(eager(self.x), self.y)
                loss.backward()
                optimizer.step()
                self.assertTrue(torch.equal(step(self.x, targets=self.y), loss), f"loss of step {number}")
                for (name, a), b in zip(self.model.state_dict().items(), eager.state_dict().values(), strict=True):
                    self.assertTrue(torch.equal(a, b), f"{name} after step {number}")
            measured = step.measure(self.x, targets=self.y)
        self.assertGreater(measured.spilled_bytes, 0)
        self.assertGreater(measured.spill_seconds, 0)
        self.assertTrue(measured.exact, (measured.peak_bytes, measured.planned_bytes))
        self.assertEqual(measured.arena.missed, 0)

    def test_the_arena_is_given_back(self) -> None:
        step = self.settled()
        before = torch.cuda.memory_allocated()
        arena_bytes = step._current.arena.arena_bytes
        step.close()
        self.assertGreaterEqual(before - torch.cuda.memory_allocated(), arena_bytes)

    def test_the_profile_is_that_of_memory_stats(self) -> None:
        def call() -> None:
            a = torch.empty(2**20, device="cuda", dtype=torch.uint8)
            b = a + 1
            del a, b

        profiled = profile(call, torch.device("cuda"))
        self.assertEqual([op.allocated_bytes for op in profiled.ops], [2**20, 2**21])
        self.assertGreaterEqual(profiled.peak_reserved_bytes or 0, 0)
