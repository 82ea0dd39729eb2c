"""Holding a planned step against the eager one, bit by bit."""

from __future__ import annotations

import copy
import unittest
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils import _pytree

import olla

STEPS = 5
MOST_RECORDINGS = 5  # and the step after them
PLANNING_SECONDS = 15.0  # what counts here is that plans are kept, not how good they are


@dataclass
class Side:
    """A model and its optimizer; each comparison has two equal ones."""

    model: nn.Module
    optimizer: Optimizer | None

    def copy(self) -> Side:
        return copy.deepcopy(self)


def side(model: nn.Module, make_optimizer: Callable[[Any], Optimizer] | None) -> Side:
    return Side(model, make_optimizer(model.parameters()) if make_optimizer else None)


def sgd(parameters: Any) -> Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=1e-4)


class EagerTestCase(unittest.TestCase):
    """Assertions about planned steps."""

    def assert_same(self, planned: Any, eager: Any, what: str) -> None:
        """Equal structure and, for tensors, equal dtype and equal bits (NaN equals NaN)."""
        planned_leaves, planned_spec = _pytree.tree_flatten(planned)
        eager_leaves, eager_spec = _pytree.tree_flatten(eager)
        self.assertEqual(planned_spec, eager_spec, what)
        for index, (a, b) in enumerate(zip(planned_leaves, eager_leaves, strict=True)):
            if isinstance(b, Tensor):
                self.assertEqual(
                    (a.shape, a.dtype, a.stride()), (b.shape, b.dtype, b.stride()), f"{what}, leaf {index}"
                )
                if not torch.equal(bits(a), bits(b)):
                    self.fail(f"{what}, leaf {index}: {difference(a, b)}")
            else:
                self.assertEqual(a, b, f"{what}, leaf {index}")

    def assert_sides_same(self, planned: Side, eager: Side) -> None:
        self.assert_same(planned.model.state_dict(), eager.model.state_dict(), "model.state_dict()")
        self.assertGreater(sum(1 for _ in planned.model.parameters()), 0)
        if planned.optimizer is not None and eager.optimizer is not None:
            state, expected = planned.optimizer.state_dict(), eager.optimizer.state_dict()
            # Sorted: the keys stand in the order in which parameters were first updated.
            for one in (state, expected):
                one["state"] = dict(sorted(one["state"].items()))
            self.assert_same(state["state"], expected["state"], "optimizer.state_dict()['state']")
            self.assert_same(state["param_groups"], expected["param_groups"], "parameter groups")

    def assert_steps_same(
        self,
        planned: Side,
        eager: Side,
        step: Callable[..., Any],
        eager_step: Callable[..., Any],
        batches: list[tuple[tuple[Any, ...], dict[str, Any]]],
    ) -> None:
        """Run both on all batches, with the same seeds and another learning rate at each step."""
        for number, (args, kwargs) in enumerate(batches):
            for one in (planned, eager):
                if one.optimizer is not None:
                    for group in one.optimizer.param_groups:
                        group["lr"] = 0.01 / (number + 1)
            torch.manual_seed(number)
            expected = eager_step(*args, **kwargs)
            random_state = torch.get_rng_state()
            torch.manual_seed(number)
            result = step(*args, **kwargs)
            self.assertTrue(torch.equal(torch.get_rng_state(), random_state), f"random state after step {number}")
            self.assert_same(result, expected, f"result of step {number}")
            self.assert_sides_same(planned, eager)

    def assert_training_same(
        self,
        model: nn.Module,
        inputs: Callable[[], Any],
        *,
        loss_fn: Callable[..., Tensor] | None = None,
        targets: Callable[[], Tensor] | None = None,
        make_optimizer: Callable[[Any], Optimizer] = sgd,
        steps: int = STEPS,
        memory_budget: float | str | None = None,
        spill_dir: Path | None = None,
    ) -> olla.Step:
        """Train a copy with OLLA and a copy as users do it; ``inputs`` makes a new batch at each call."""
        model.train()
        eager = side(model, make_optimizer)
        planned = eager.copy()
        batches = [_call(inputs(), None if targets is None else targets()) for _ in range(steps)]
        first = batches[0]
        step = olla.optimize(
            planned.model,
            first[0] or {k: v for k, v in first[1].items() if k != "targets"},
            loss_fn=loss_fn,
            targets=first[1].get("targets") if targets else None,
            optimizer=planned.optimizer,
            memory_budget=memory_budget,
            spill_dir=spill_dir,
            time_limit=PLANNING_SECONDS,
        )

        def eager_step(*args: Any, targets: Any = None, **kwargs: Any) -> Tensor:
            eager.optimizer.zero_grad(set_to_none=True)
            output = eager.model(*args, **kwargs)
            if loss_fn is not None:
                loss = loss_fn(output, targets)
            else:
                loss = output.loss if hasattr(output, "loss") else output.sum()
            loss.backward()
            eager.optimizer.step()
            return loss

        self.assert_steps_same(planned, eager, step, eager_step, batches)

        def another() -> None:
            batch = _call(inputs(), None if targets is None else targets())
            self.assert_steps_same(planned, eager, step, eager_step, [batch])

        self.settle(step, another)
        return step

    def settle(self, step: olla.Step, another: Callable[[], None]) -> None:
        """Run more steps, if there is none yet that ran at planned addresses."""
        for _ in range(MOST_RECORDINGS):  # each may teach another order, which is then recorded itself
            replay = step._current.replay
            if step._current.not_executed or (replay is not None and replay.counts.hits):
                break
            another()
        self.assert_at_planned_addresses(step)

    def assert_at_planned_addresses(self, step: olla.Step) -> None:
        """The last step ran in its arena, and nothing was elsewhere than planned."""
        replay = step._current.replay
        self.assertIsNotNone(replay, step._current.not_executed or "the step did not settle")
        self.assertEqual((replay.counts.missed, replay.counts.escapes), (0, 0))

    def assert_compiled_same(
        self, model: nn.Module, inputs: Callable[[], Any], targets: Callable[[], Tensor]
    ) -> set[str]:
        """Train a copy that is compiled with OLLA and one that is not; the operators that were called."""
        eager, compiled = side(model, sgd), side(copy.deepcopy(model), sgd)
        planned = torch.compile(compiled.model, backend="olla")
        with torch.profiler.profile() as profile:
            for _ in range(4):
                x, y = inputs(), targets()
                for module, optimizer in ((eager.model, eager.optimizer), (planned, compiled.optimizer)):
                    assert optimizer is not None
                    F.cross_entropy(module(x), y).backward()
                    optimizer.step()
                    optimizer.zero_grad()
        self.assert_sides_same(compiled, eager)
        return {event.key for event in profile.key_averages()}

    def assert_inference_same(self, model: nn.Module, inputs: Callable[[], Any], steps: int = 4) -> olla.Step:
        model.eval()
        eager = copy.deepcopy(model)
        batches = [_call(inputs(), None) for _ in range(steps)]
        args, kwargs = batches[0]
        step = olla.optimize(model, args or kwargs, time_limit=PLANNING_SECONDS)

        def compare(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            with torch.no_grad():
                expected = eager(*args, **kwargs)
            self.assert_same(step(*args, **kwargs), expected, "output")
            self.assert_same(model.state_dict(), eager.state_dict(), "model.state_dict()")

        for args, kwargs in batches:
            compare(args, kwargs)
        self.settle(step, lambda: compare(*_call(inputs(), None)))
        return step


def _call(inputs: Any, targets: Tensor | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    named = {} if targets is None else {"targets": targets}
    if isinstance(inputs, dict):
        return (), {**inputs, **named}
    return (inputs if isinstance(inputs, tuple) else (inputs,)), named


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def difference(a: Tensor, b: Tensor) -> str:
    largest = (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
    return f"largest difference {largest:.3g} where values reach {b.double().abs().max().item():.3g}"
