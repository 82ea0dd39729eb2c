"""The main job with nothing but torch: the one test that also runs on other versions of it."""

from __future__ import annotations

import torch
from eager import EagerTestCase, sgd
from torch import Tensor, nn
from torch.nn import functional as F


class SmokeTest(EagerTestCase):
    def test_a_small_network_trains_as_in_eager_pytorch_in_less_memory(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Flatten(),
            *(nn.Linear(288, 288) for _ in range(6)),
        )

        def images() -> Tensor:
            return torch.randn(2, 3, 8, 8)

        def labels() -> Tensor:
            return torch.randint(0, 288, (2,))

        for optimizer in (sgd, torch.optim.Adam):
            step = self.assert_training_same(
                model, images, loss_fn=F.cross_entropy, targets=labels, make_optimizer=optimizer
            )
            measured = step.measure(images(), targets=labels())
            self.assertGreater(measured.saving, 0.4)
            self.assertTrue(measured.exact, (measured.peak_bytes, measured.planned_bytes, step._current.not_executed))
            self.assertEqual((measured.arena.missed, measured.arena.escapes), (0, 0))

    def test_a_budget_is_kept_and_the_numbers_stay(self) -> None:
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.LayerNorm(32)) for _ in range(6)]

        def rows() -> Tensor:
            return torch.randn(512, 32)

        step = self.assert_training_same(nn.Sequential(*blocks), rows, memory_budget=0.5)
        measured, persistent = step.measure(rows()), step.plan.persistent_bytes
        self.assertTrue(measured.exact, (measured.peak_bytes, measured.planned_bytes))
        self.assertGreater(len(step.plan.order), len(set(step.plan.order)))  # some run again
        self.assertLessEqual(persistent + measured.peak_bytes, 0.5 * (persistent + measured.baseline_peak_bytes))

    def test_a_transformer_infers_as_in_eager_pytorch(self) -> None:
        torch.manual_seed(0)
        model = nn.Transformer(32, 2, 1, 1, 64)
        self.assert_inference_same(model, lambda: (torch.randn(5, 2, 32), torch.randn(7, 2, 32)))
