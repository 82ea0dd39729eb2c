"""Collectives start in one order on all ranks, and that order is one that costs no bytes."""

from __future__ import annotations

import random
import unittest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import olla
from olla import planning
from olla.capture.chain import chained, collectives, unchained
from olla.capture.lower import Lowered
from olla.capture.program import Program
from olla.graph.check import verify
from olla.graph.graph import Graph
from olla.graph.lifetimes import eager_peak_bytes, peak_bytes
from olla.order.schedule import program_order


class ChainTest(unittest.TestCase):
    """In a group of one process: what is planned is the same in a larger one."""

    def setUp(self) -> None:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        self.addCleanup(dist.destroy_process_group)
        torch.manual_seed(0)

    def program(self, model: nn.Module, halves: int = 1) -> tuple[Program, tuple[Any, ...]]:
        """A training step; with two halves, gradients are averaged twice, each after a backward pass of its own."""
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def train(inputs: Tensor, targets: Tensor) -> None:
            optimizer.zero_grad()
            for x, y in zip(inputs.chunk(halves), targets.chunk(halves), strict=True):
                F.cross_entropy(model(x), y).backward()
                olla.average_gradients(model.parameters(), dist.group.WORLD)
            optimizer.step()

        program = Program(train, {"model": model}, (optimizer,), process_group=dist.group.WORLD)
        return program, (torch.randn(4, 3, 64, 64), torch.randint(0, 10, (4,)))

    def lowered(self, model: nn.Module, halves: int = 1) -> Lowered:
        program, args = self.program(model, halves)
        return planning.capture(program, args, {}, planning.Options(progress=False))[1]

    def test_the_chain_of_resnet18_costs_nothing(self) -> None:
        import torchvision

        program, args = self.program(torchvision.models.resnet18(num_classes=10))
        options = planning.Options(progress=False)
        _, lowered = planning.capture(program, args, {}, options)
        drafted = planning.draft(program, args, {}, options)
        free, as_written = olla.schedule(unchained(lowered)), olla.schedule(lowered.graph)
        self.assertEqual(drafted.plan.peak_bytes, free.peak_bytes)
        self.assertLess(drafted.plan.peak_bytes, 0.9 * as_written.lower_bound_bytes)
        self.assertEqual(eager_peak_bytes(drafted.lowered.graph), eager_peak_bytes(lowered.graph))
        starts = collectives(drafted.lowered)
        self.assertEqual([op for op in drafted.plan.order if op in starts], starts)
        self.assertEqual(len(starts), len([*program.parameters]))

    def test_every_order_without_the_chain_is_one_of_the_step_with_it(self) -> None:
        for halves in (1, 2):
            lowered = self.lowered(small(), halves)
            free = unchained(lowered)
            self.assertEqual(len(collectives(lowered)), 4 * halves)
            for seed in range(8):
                order = any_order(free, random.Random(seed))
                found = chained(lowered, order)
                ids = {node: op for op, node in enumerate(found.nodes)}
                same = [ids[lowered.nodes[op]] for op in order]
                peak = peak_bytes(free, order)
                plan = olla.Schedule(tuple(same), peak, 0, "any", 0.0)
                verify(found.graph, olla.Plan.of(found.graph, plan))
                starts = collectives(found)
                self.assertEqual([op for op in same if op in starts], starts)

    def test_the_chain_as_it_is_changes_nothing(self) -> None:
        lowered = self.lowered(small())
        self.assertEqual(chained(lowered, program_order(lowered.graph).order), lowered)


def small() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 16), nn.Tanh(), nn.Linear(16, 10))


def any_order(graph: Graph, rng: random.Random) -> list[int]:
    """A legal order, drawn."""
    missing = [len(ops) for ops in graph.predecessors]
    ready, order = [op for op, count in enumerate(missing) if not count], []
    while ready:
        order.append(ready.pop(rng.randrange(len(ready))))
        for op in graph.successors[order[-1]]:
            missing[op] -= 1
            if not missing[op]:
                ready.append(op)
    return order


if __name__ == "__main__":
    unittest.main()
