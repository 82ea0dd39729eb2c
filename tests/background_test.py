"""Steps that are planned on another thread: they run meanwhile, and follow the plan once it is there."""

from __future__ import annotations

import copy
import tempfile
import threading
import unittest
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from eager import EagerTestCase, sgd
from torch import nn
from torch.nn import functional as F

import olla
from olla import execution
from olla.errors import ExecutionError, InvalidOptionError
from olla.step import Step

X, Y = torch.randn(32, 64), torch.randn(32, 64)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Tanh())))


def planned(model: nn.Module, **options: Any) -> Step:
    return olla.optimize(
        model, X, loss_fn=F.mse_loss, targets=Y, optimizer=sgd(model.parameters()), background=True, **options
    )


class Gate:
    """Holds planners back until it is opened."""

    def __init__(self) -> None:
        self._opened = threading.Event()
        self.threads: list[str] = []

    def open(self) -> None:
        self._opened.set()

    def close(self) -> None:
        self._opened.clear()

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def held_back(*args: Any, **kwargs: Any) -> Any:
            self.threads.append(threading.current_thread().name)
            self._opened.wait(60)
            return function(*args, **kwargs)

        return held_back


@contextmanager
def gate(name: str) -> Any:
    """A gate before this stage of planning, open in the end."""
    found = Gate()
    with mock.patch.object(execution, name, found.before(getattr(execution, name))):
        try:
            yield found
        finally:
            found.open()


class BackgroundTest(EagerTestCase):
    def assert_trains_as_eager(self, model: nn.Module, step: Callable[..., Any], steps: int, eager: nn.Module) -> None:
        optimizer = self.optimizers.setdefault(id(eager), sgd(eager.parameters()))
        for _ in range(steps):
            optimizer.zero_grad()
            loss = F.mse_loss(eager(X), Y)
            loss.backward()
            optimizer.step()
            self.assertTrue(torch.equal(step(X, targets=Y), loss.detach()))
            self.assert_same(model.state_dict(), eager.state_dict(), "state")

    def setUp(self) -> None:
        self.optimizers: dict[int, torch.optim.Optimizer] = {}

    def test_steps_run_while_they_are_planned_and_then_as_planned(self) -> None:
        model, eager = network(), network()
        with gate("ordered") as order, gate("with_workspaces") as again:
            step = planned(model)
            self.assert_trains_as_eager(model, step, 3, eager)
            self.assertEqual((step.plan.method, step.plan.arena_bytes), ("program order", None))
            before = step.plan.peak_bytes
            order.open()
            step._current.wait()
            self.assertLess(step.plan.peak_bytes, before)
            self.assert_trains_as_eager(model, step, 5, eager)  # recorded, and not placed yet
            self.assertEqual((step.plan.arena_bytes, len(again.threads)), (None, 1))
            again.open()
            measured = step.measure(X, targets=Y)
            self.assertTrue(measured.exact)
            self.assertIsNotNone(step.plan.arena_bytes)
            self.assertNotIn(threading.current_thread().name, order.threads + again.threads)
        self.assert_trains_as_eager(model, step, 3, eager)
        reference = network()
        foreground = olla.optimize(reference, X, loss_fn=F.mse_loss, targets=Y, optimizer=sgd(reference.parameters()))
        foreground.measure(X, targets=Y)
        self.assertEqual(step.plan.order, foreground.plan.order)
        self.assertEqual(step.plan.peak_bytes, foreground.plan.peak_bytes)

    def test_a_plan_is_taken_up_without_being_waited_for(self) -> None:
        model, eager = network(), network()
        step = planned(model)
        for _ in range(1000):
            self.assert_trains_as_eager(model, step, 1, eager)
            if step.plan.arena_bytes is not None:
                break
            threading.Event().wait(0.01)
        self.assertIsNotNone(step.plan.arena_bytes)
        self.assert_trains_as_eager(model, step, 3, eager)

    def test_without_addresses_the_order_is_followed(self) -> None:
        model, eager = network(), network()
        step = planned(model, place=False)
        before = step.plan.peak_bytes
        step._current.wait()
        self.assert_trains_as_eager(model, step, 3, eager)
        self.assertLess(step.plan.peak_bytes, before)

    def test_what_fails_in_the_background_ends_no_training(self) -> None:
        model, eager = network(), network()
        failure = mock.Mock(side_effect=ExecutionError("no such luck"))
        with mock.patch.object(execution, "with_workspaces", failure), self.assertLogs("olla", "WARNING") as log:
            step = planned(model)
            for _ in range(5):
                self.assert_trains_as_eager(model, step, 1, eager)
                step._current.wait()
        failure.assert_called_once()
        self.assertIn("no such luck", log.output[0])
        self.assertIn("no such luck", str(step.report()))
        self.assert_trains_as_eager(model, step, 2, eager)

    def test_a_new_shape_is_planned_beside_its_first_steps(self) -> None:
        model = network()
        step = planned(model)
        step.measure(X, targets=Y)
        with gate("ordered"), self.assertLogs("olla", "WARNING"):
            step(X[:8], targets=Y[:8])
            self.assertEqual(step.plan.method, "program order")
            step(X, targets=Y)
            self.assertIsNotNone(step.plan.arena_bytes)

    def test_what_it_does_not_go_with(self) -> None:
        model = network()
        before = copy.deepcopy(model.state_dict())
        for options in ({"memory_budget": 0.5}, {"memory_budget": "1GiB", "place": False}):
            with self.assertRaisesRegex(InvalidOptionError, "background=True with memory_budget"):
                planned(model, **options)
        with tempfile.TemporaryDirectory() as folder:
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
            self.addCleanup(dist.destroy_process_group)
            with self.assertRaisesRegex(InvalidOptionError, "background=True with process_group"):
                planned(model, process_group=dist.group.WORLD)
        self.assert_same(model.state_dict(), before, "state")


if __name__ == "__main__":
    unittest.main()
