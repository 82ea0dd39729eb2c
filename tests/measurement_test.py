from __future__ import annotations

import unittest
from functools import partial
from unittest import mock

import torch
from eager import sgd
from torch import Tensor, nn

import olla
from olla.measure import measurement
from olla.measure.measurement import measure

CPU = torch.device("cpu")


class MeasurementTest(unittest.TestCase):
    def test_the_peak_is_exact_to_the_byte(self) -> None:
        def known() -> None:
            first = torch.empty(1000, dtype=torch.uint8)
            second = torch.empty(5000, dtype=torch.uint8)
            del first
            third = torch.empty(3000, dtype=torch.uint8)
            del second, third

        def smaller() -> None:
            torch.empty(700, dtype=torch.uint8)

        measured = measure(smaller, known, device=CPU, planned_bytes=700)
        self.assertEqual((measured.baseline_peak_bytes, measured.peak_bytes), (8000, 700))
        self.assertTrue(measured.exact)
        self.assertAlmostEqual(measured.saving, 1 - 700 / 8000)
        self.assertGreater(measured.step_seconds, 0)
        self.assertGreater(measured.time_ratio, 0)

    def test_a_wrong_plan_is_not_exact(self) -> None:
        measured = measure(lambda: torch.empty(8), lambda: None, device=CPU, planned_bytes=31)
        self.assertEqual((measured.peak_bytes, measured.exact), (32, False))

    def test_both_steps_run_equally_often_and_less_often_if_they_take_long(self) -> None:
        for long, pairs in ((10.0, 9), (0.0, 5)):
            calls: list[str] = []
            with mock.patch.object(measurement, "_LONG", long):
                measure(partial(calls.append, "planned"), partial(calls.append, "eager"), device=CPU, planned_bytes=0)
            self.assertEqual((calls.count("planned"), calls.count("eager")), (pairs + 2, pairs + 2))

    def test_updating_early_saves_what_the_plan_says(self) -> None:
        model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8)))
        x = torch.randn(4, 256)
        step = olla.optimize(model, x, optimizer=sgd(model.parameters()))
        measured = step.measure(x)
        self.assertGreater(measured.saving, 0.6)
        self.assertLess(abs(measured.peak_bytes / step.plan.peak_bytes - 1), 0.05)

    def test_what_measuring_runs_is_the_user_s_own_step(self) -> None:
        class Wasteful(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(8, 8)

            def forward(self, x: Tensor) -> Tensor:
                kept = [x.repeat(100, 1) for _ in range(5)]
                return self.layer(x) + kept[0][: len(x)]

        x = torch.randn(4, 8)
        step = olla.optimize(Wasteful().eval(), x)
        self.assertGreater(step.measure(x).baseline_peak_bytes, 5 * 100 * 4 * 8 * 4)
