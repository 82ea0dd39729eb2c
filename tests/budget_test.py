"""Steps within a byte budget: it is kept, by the allocator's own count, and the numbers are those of eager PyTorch."""

from __future__ import annotations

import contextlib
import io
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from eager import PLANNING_SECONDS, EagerTestCase, sgd
from torch import Tensor, nn
from torch.nn import functional as F

import olla
from olla import InfeasibleError, InvalidBudgetError
from olla.fit.budget import bytes_of
from olla.graph.plan import extra_runs
from olla.show.draw import draw_frontier

STEPS = 8  # enough to settle


class Block(nn.Module):
    """What a network for images is made of: an in-place activation, a batch norm, a dropout, a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(F.relu(self.norm(self.convolution(x)), inplace=True))


def images() -> Tensor:
    return torch.randn(4, 8, 16, 16)


def labels() -> Tensor:
    return torch.randint(0, 8, (4,))


def network() -> nn.Module:
    return nn.Sequential(*(Block(8) for _ in range(6)), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class BudgetTest(EagerTestCase):
    def total(self, plan: olla.Plan) -> int:
        return plan.persistent_bytes + plan.peak_bytes

    def test_the_budget_is_kept_and_the_numbers_are_the_same(self) -> None:
        for make_optimizer in (sgd, torch.optim.Adam):
            for share in (0.8, 0.6):
                torch.manual_seed(0)
                step = self.assert_training_same(
                    network(), images, loss_fn=F.cross_entropy, targets=labels, make_optimizer=make_optimizer,
                    memory_budget=share, steps=STEPS,
                )  # fmt: skip
                measured = step.measure(images(), targets=labels())
                plan = step.plan
                budget = share * (plan.persistent_bytes + measured.baseline_peak_bytes)
                self.assertLessEqual(plan.persistent_bytes + measured.peak_bytes, budget)
                self.assertTrue(measured.exact)
                self.assertEqual(measured.arena.missed, 0)
                self.assertGreater(len(plan.recomputed), 0)
                self.assertGreaterEqual(plan.extra_seconds, plan.extra_seconds_lower_bound)
                self.assertIn("ops again", str(step.report()))

    def test_a_language_model(self) -> None:
        import transformers

        config = transformers.GPT2Config(
            n_layer=3, n_embd=32, n_head=2, vocab_size=101, n_positions=32, use_cache=False
        )
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config)

        def inputs() -> dict[str, Any]:
            ids = torch.randint(0, 101, (4, 32))
            return {"input_ids": ids, "labels": ids}

        plain = olla.plan(model, inputs(), optimizer=sgd(model.parameters()), place=False)
        budget = plain.persistent_bytes + plain.peak_bytes * 7 // 10
        step = self.assert_training_same(model, inputs, make_optimizer=sgd, memory_budget=budget, steps=STEPS)
        measured = step.measure(**inputs())
        self.assertLessEqual(plain.persistent_bytes + measured.peak_bytes, budget)
        self.assertGreater(len(step.plan.recomputed), 0)

    def test_what_does_not_fit_names_what_does(self) -> None:
        model = network()
        optimizer = sgd(model.parameters())
        before = {name: value.clone() for name, value in model.state_dict().items()}
        arguments: dict[str, Any] = {"loss_fn": F.cross_entropy, "targets": labels(), "optimizer": optimizer}
        arguments["time_limit"] = PLANNING_SECONDS
        with self.assertRaisesRegex(InfeasibleError, "the smallest budget is") as caught:
            olla.optimize(model, images(), **arguments, memory_budget=1000)
        self.assert_same(dict(model.state_dict()), before, "the model")
        least = caught.exception.best_bytes
        plan = olla.plan(model, images(), **arguments, memory_budget=least)
        self.assertLessEqual(self.total(plan), least)
        with self.assertRaisesRegex(InfeasibleError, "of which .* live across steps"):
            olla.plan(model, images(), **arguments, memory_budget=plan.persistent_bytes + 1)

    def test_a_bad_budget_is_refused_before_anything_happens(self) -> None:
        for budget in (0, -1, 0.0, -0.5, "lots", "6 GB of memory", "-3MB", "", float("nan"), True, [1]):
            with self.subTest(budget=budget), self.assertRaises(InvalidBudgetError):
                olla.optimize(nn.Linear(2, 2), torch.ones(2), memory_budget=budget)

    def test_budgets_can_be_written_in_many_ways(self) -> None:
        for budget, size in {
            123: 123, 0.5: 500, 1.0: 1000, "50%": 500, "6GiB": 6 * 2**30, "1.5 MB": 1_500_000, "2KiB": 2048,
            "700": 700, "3 B": 3, "1kB": 1000,
        }.items():  # fmt: skip
            self.assertEqual(bytes_of(budget, 1000), size, budget)
        self.assertEqual(bytes_of(1, 1000), 1)  # a whole number is bytes

    def test_the_frontier_falls_and_can_be_printed_and_drawn(self) -> None:
        model = network()
        found = olla.frontier(
            model, images(), loss_fn=F.cross_entropy, targets=labels(), optimizer=sgd(model.parameters()), points=6,
            time_limit=PLANNING_SECONDS,
        )  # fmt: skip
        schedules = found.schedules
        self.assertGreater(len(schedules), 3)
        self.assertEqual((schedules[0].extra_seconds, extra_runs(schedules[0].order)), (0.0, ()))
        for one, next_one in pairwise(schedules):
            self.assertLess(next_one.peak_bytes, one.peak_bytes)
            self.assertGreaterEqual(next_one.extra_seconds, one.extra_seconds)
        self.assertEqual(len(str(found).splitlines()), 1 + len(schedules))
        with tempfile.TemporaryDirectory() as folder:
            picture = Path(folder) / "frontier.png"
            draw_frontier(found, picture)
            self.assertTrue(picture.read_bytes().startswith(b"\x89PNG"))

    def test_a_curve_has_two_ends(self) -> None:
        with self.assertRaisesRegex(olla.InvalidBudgetError, "points is 1: .* at least 2"):
            olla.frontier(nn.Linear(2, 2), torch.ones(2), points=1)

    def test_what_runs_within_its_budget_anyway_is_left_alone(self) -> None:
        with contextlib.redirect_stderr(io.StringIO()):
            plan = olla.plan(nn.Linear(8, 8), torch.ones(2, 8), memory_budget="1GiB")
        self.assertEqual((plan.recomputed, plan.extra_seconds), ((), 0.0))
