"""A GradScaler decides by values: inside a step it is refused, and outside it works as in eager PyTorch."""

from __future__ import annotations

import copy
import unittest
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from eager import EagerTestCase, Side, sgd, side
from torch import Tensor, nn, optim
from torch.nn import functional as F

import olla

TARGETS = torch.tensor([0, 3, 1, 2])


class ScalerTestCase(EagerTestCase):
    def make(self, optimizer: Callable[[Any], optim.Optimizer] = sgd) -> Side:
        torch.manual_seed(0)
        self.batches = [torch.randn(4, 8) for _ in range(10)]
        self.batches[4] *= torch.inf
        return side(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)), optimizer)

    def scaler(self, **options: Any) -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3, **options)


def train(trained: Side, scaler: torch.amp.GradScaler, inputs: Tensor) -> Tensor:
    """A step as PyTorch's documentation has it."""
    trained.optimizer.zero_grad()
    loss = F.cross_entropy(trained.model(inputs), TARGETS)
    scaler.scale(loss).backward()
    scaler.step(trained.optimizer)
    scaler.update()
    return loss.detach()


class InsideTest(ScalerTestCase):
    def test_it_is_refused_and_nothing_is_changed(self) -> None:
        fused = partial(optim.AdamW, fused=True)  # asks for no value in Python: it was planned, and gave other numbers
        for make in (sgd, optim.Adam, fused):
            for used_before in (False, True):
                with self.subTest(optimizer=make, used_before=used_before):
                    trained, scaler = self.make(make), self.scaler()
                    if used_before:
                        train(trained, scaler, self.batches[0])
                    before = copy.deepcopy([trained.model.state_dict(), trained.optimizer.state_dict()])
                    scales = copy.deepcopy(scaler.state_dict())
                    with self.assertRaisesRegex(olla.CaptureError, r"GradScaler at .*scaler_test\.py:\d+, which skips"):
                        olla.optimize_step(
                            partial(train, trained, scaler),
                            (self.batches[0],),
                            model=trained.model,
                            optimizer=trained.optimizer,
                        )
                    after = [trained.model.state_dict(), trained.optimizer.state_dict()]
                    self.assert_same(after, before, "model and optimizer")
                    self.assertEqual(scaler.state_dict(), scales)
                    train(trained, scaler, self.batches[1])  # it works on

    def test_each_of_its_methods_is_refused(self) -> None:
        trained, scaler = self.make(), self.scaler()
        scaler.scale(torch.ones(()))
        for use in (
            lambda loss: scaler.scale([loss])[0].backward(),
            lambda loss: (loss.backward(), scaler.unscale_(trained.optimizer)),
            lambda loss: (loss.backward(), scaler.step(trained.optimizer)),
            lambda loss: (loss.backward(), scaler.update(2.0)),
        ):

            def step(inputs: Tensor, use: Callable[[Tensor], object] = use) -> None:
                use(trained.model(inputs).sum())

            with self.assertRaisesRegex(olla.CaptureError, "torch.amp.GradScaler"):
                olla.optimize_step(step, (self.batches[0],), model=trained.model, optimizer=trained.optimizer)

    def test_one_that_is_off_does_nothing(self) -> None:
        planned, scaler = self.make(), self.scaler(enabled=False)
        eager = planned.copy()
        with olla.optimize_step(
            partial(train, planned, scaler), (self.batches[0],), model=planned.model, optimizer=planned.optimizer
        ) as step:
            for inputs in self.batches[:4]:
                self.assert_same(step(inputs), train(eager, scaler, inputs), "loss")
        self.assert_sides_same(planned, eager)


class OutsideTest(ScalerTestCase):
    def test_overflows_are_skipped_and_scales_are_those_of_eager_pytorch(self) -> None:
        for make in (sgd, partial(optim.AdamW, fused=True)):
            with self.subTest(optimizer=make):
                self.check(make)

    def check(self, make: Callable[[Any], optim.Optimizer]) -> None:
        planned, scaler, same, one = self.make(make), self.scaler(), self.scaler(), torch.ones(())
        eager = planned.copy()

        def backward(inputs: Tensor, scale: Tensor) -> Tensor:
            loss = F.cross_entropy(planned.model(inputs), TARGETS)
            (loss * scale).backward()
            return loss.detach()

        scales = set()
        with olla.optimize_step(backward, (self.batches[0], scaler.scale(one)), model=planned.model) as step:
            for index, inputs in enumerate(self.batches):
                before = copy.deepcopy(planned.model.state_dict())
                planned.optimizer.zero_grad()
                loss = step(inputs, scaler.scale(one))
                scaler.step(planned.optimizer)
                scaler.update()
                self.assert_same(loss, train(eager, same, inputs), "loss")
                self.assert_sides_same(planned, eager)
                self.assertEqual(scaler.state_dict(), same.state_dict())
                is_skipped = all(torch.equal(p, before[name]) for name, p in planned.model.state_dict().items())
                self.assertEqual(is_skipped, index == 4)
                scales.add(scaler.get_scale())
        self.assertEqual(scales, {2.0**8, 2.0**9})  # it grew, and shrank


if __name__ == "__main__":
    unittest.main()
