"""Steps in which ops run again, at random places where the checker allows it, give what eager PyTorch gives."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from eager import EagerTestCase, sgd
from torch import Tensor, nn
from torch.nn import functional as F

from olla import Graph, Plan, Schedule, planning
from olla.graph.check import check
from olla.graph.lifetimes import peak_bytes

TRIES = 300  # places where an op is run again, if that is allowed


def with_repeats(graph: Graph, *_: Any) -> Schedule:
    """Program order with ops that run again."""
    draw = random.Random(0)
    order = tuple(range(len(graph.ops)))
    for _ in range(TRIES):
        place = draw.randint(1, len(order))
        candidate = (*order[:place], draw.choice(order[:place]), *order[place:])
        found = Schedule(candidate, peak_bytes(graph, candidate), 0, "at random", 0.0)
        if not check(graph, Plan.of(graph, found)):
            order = candidate
    return Schedule(order, peak_bytes(graph, order), 0, "at random", 0.0)


class Net(nn.Module):
    """Batch norms, dropouts, in-place activations and views, all of which could go wrong when they run again."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Linear(8 * 16, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(images)), inplace=True)
        x = F.dropout(x, 0.3)
        x = F.dropout2d(self.second(x) + x, 0.2)
        x = torch.rand_like(x) * x
        first, rest = x.chunk(2)
        x = torch.cat([rest, first]).transpose(1, 2).flatten(1)
        return self.last(F.silu(x, inplace=True))


class RepeatTest(EagerTestCase):
    def same(self, model: nn.Module, make_optimizer: Callable[[Any], Any]) -> Plan:
        torch.manual_seed(0)
        with mock.patch.object(planning, "_ordered", with_repeats):
            step = self.assert_training_same(
                model,
                lambda: torch.randn(4, 3, 4, 4),
                loss_fn=F.cross_entropy,
                targets=lambda: torch.randint(0, 10, (4,)),
                make_optimizer=make_optimizer,
            )
            measured = step.measure(torch.randn(4, 3, 4, 4), targets=torch.randint(0, 10, (4,)))
        self.assertTrue(measured.exact, (measured.peak_bytes, measured.planned_bytes))
        self.assertEqual(measured.arena.missed, 0)
        return step.plan

    def test_everything_that_may_run_again_gives_the_same_bits(self) -> None:
        for make_optimizer in (sgd, torch.optim.Adam):
            plan = self.same(Net(), make_optimizer)
            self.assertGreater(len(plan.recomputed), 30)
