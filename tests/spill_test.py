"""Steps whose storages are away for a while give what eager PyTorch gives, within the bytes that were planned."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from eager import EagerTestCase, sgd
from torch import Tensor, nn
from torch.nn import functional as F

import olla
from olla import Graph, Plan, Schedule, planning
from olla.graph.check import check
from olla.graph.lifetimes import Spill, peak_bytes

TRIES = 300  # places where an op is run again, or a storage sent away, if that is allowed


def at_random(graph: Graph, seconds: Any, options: Any) -> Schedule:
    """Program order with ops that run again and storages that are away."""
    draw = random.Random(0)

    def allowed(order: tuple[int, ...], spills: tuple[Spill, ...]) -> bool:
        try:
            found = Schedule(order, peak_bytes(graph, order, spills), 0, "at random", 0.0, spills)
        except olla.InvalidPlanError:
            return False
        return not check(graph, Plan.of(graph, found))

    order, spills = tuple(range(len(graph.ops))), ()
    for _ in range(TRIES):
        place = draw.randint(1, len(order))
        again = (*order[:place], draw.choice(order[:place]), *order[place:])
        order = again if allowed(again, ()) else order
    storages = [index for index, storage in enumerate(graph.storages) if not storage.persistent]
    for _ in range(5 * TRIES):
        away = draw.randint(1, len(order) - 1)
        one = Spill(draw.choice(storages), away, min(len(order), draw.randint(away + 1, away + 20)))
        more = tuple(sorted({*spills, one}))
        spills = more if allowed(order, more) else spills
    return Schedule(order, peak_bytes(graph, order, spills), 0, "at random", 0.0, spills)


class Convolutions(nn.Module):
    """Batch norms, dropouts, in-place activations and views."""

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
        first, rest = x.chunk(2)
        x = torch.cat([rest, first]).transpose(1, 2).flatten(1)
        return self.last(F.silu(x, inplace=True))


class Words(nn.Module):
    """A transformer whose last layer has the weights of its first one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(23, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.head = nn.Linear(16, 23, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(ids))).transpose(1, 2)


def images() -> Tensor:
    return torch.randn(4, 3, 4, 4)


def ids() -> Tensor:
    return torch.randint(0, 23, (3, 7))


def deep(width: int = 64) -> nn.Module:
    """Activations that wait for the backward pass, and weights that are small beside them."""
    return nn.Sequential(*(part for _ in range(8) for part in (nn.Linear(width, width), nn.Tanh())))


class SpillTest(EagerTestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def tearDown(self) -> None:
        self.assertEqual(list(self.folder.iterdir()), [])

    def budgeted(self, share: float = 0.5, **options: Any) -> tuple[olla.Step, Callable[[], Tensor]]:
        """A step that spills, and what runs it once."""
        torch.manual_seed(0)
        model, x = deep(), torch.randn(512, 64)
        optimizer = sgd(model.parameters())
        with mock.patch("olla.planning.recompute", side_effect=olla.InfeasibleError("no", 0, 0)):
            step = olla.optimize(model, x, optimizer=optimizer, memory_budget=share, spill_dir=self.folder, **options)
        self.addCleanup(step.close)
        return step, lambda: step(x)


class RandomPlansTest(SpillTest):
    def same(self, model: nn.Module, inputs: Callable[[], Any], targets: Callable[[], Tensor]) -> Plan:
        torch.manual_seed(0)
        with mock.patch.object(planning, "_ordered", at_random):
            step = self.assert_training_same(
                model, inputs, loss_fn=F.cross_entropy, targets=targets, spill_dir=self.folder
            )
            measured = step.measure(inputs(), targets=targets())
        self.assertTrue(measured.exact, (measured.peak_bytes, measured.planned_bytes))
        self.assertEqual(measured.arena.missed, 0)
        self.assertGreater(measured.spilled_bytes, 0)
        plan = step.plan
        self.assertGreater(len(plan.spills), 20)
        self.assertGreater(len(plan.recomputed), 10)
        return plan

    def test_a_network_for_images(self) -> None:
        self.same(Convolutions(), images, lambda: torch.randint(0, 10, (4,)))

    def test_a_transformer(self) -> None:
        self.same(Words(), ids, ids)


if __name__ == "__main__":
    import unittest

    unittest.main()
