"""Long runs: memory does not grow with steps, plans or steps that are made anew, and interruptions leave all usable."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import os
import signal
import sys
import unittest
import weakref
from collections.abc import Callable
from typing import Any

import torch
from eager import EagerTestCase, side
from interrupts import heed_interrupts
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import olla

slow = unittest.skipUnless(os.environ.get("RUN_SKIPPED"), "takes minutes: set RUN_SKIPPED=1")
TROUBLE: dict[str, Callable[[], None]] = {}


@torch.library.custom_op("olla_tests::interrupted", mutates_args=())
def interrupted(x: Tensor) -> Tensor:
    """Twice x, unless something happens."""
    TROUBLE.get("now", lambda: None)()
    return x + x


@interrupted.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


interrupted.register_autograd(lambda _, gradient: gradient + gradient)


class Interrupted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(interrupted(self.first(x).relu()))


class Mallinfo(ctypes.Structure):
    """What ``mallinfo2`` of glibc returns; ``used`` and ``mapped`` are the bytes that nobody has freed."""

    _names = ("arena", "ordblks", "smblks", "hblks", "mapped", "usmblks", "fsmblks", "used", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in _names]


def held() -> tuple[int, int]:
    """Bytes that C and C++ hold, and blocks that Python holds."""
    gc.collect()
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = Mallinfo
    found = ask()
    return found.used + found.mapped, sys.getallocatedblocks()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 4))


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3)


def batch(size: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 16), torch.randint(0, 4, (size,))


def planned(model: nn.Module, *, size: int = 8) -> olla.Step:
    x, y = batch(size)
    return olla.optimize(model, x, loss_fn=F.cross_entropy, targets=y, optimizer=adam(model.parameters()))


@unittest.skipUnless(hasattr(ctypes.CDLL(None), "mallinfo2"), "asks glibc, which is not here")
class MemoryTest(EagerTestCase):
    """Half of the rounds first, for all caches to fill; then as many again, in which a leak would show."""

    def assert_holds_no_more(self, round_of: Callable[[int], None], rounds: int, bytes_a_round: float) -> None:
        for number in range(rounds // 2):
            round_of(number)
        held_bytes, held_blocks = held()
        for number in range(rounds // 2, rounds):
            round_of(number)
        now_bytes, now_blocks = held()
        self.assertLess(now_bytes - held_bytes, bytes_a_round * (rounds - rounds // 2))
        self.assertLess(now_blocks - held_blocks, 300 + (rounds - rounds // 2) / 2)  # caches of Python vary a little

    def run_steps(self, steps: int) -> None:
        step = planned(mlp())
        x, y = batch()
        self.assert_holds_no_more(lambda _: step(x, targets=y), steps, 16)
        self.assert_at_planned_addresses(step)

    def make_steps(self, steps: int) -> None:
        def round_of(_: int) -> None:
            x, y = batch()
            with planned(mlp()) as step:
                for _ in range(4):
                    step(x, targets=y)
                self.assert_at_planned_addresses(step)

        self.assert_holds_no_more(round_of, steps, 4096)

    def test_a_thousand_steps(self) -> None:
        self.run_steps(1000)

    @slow
    def test_ten_thousand_steps(self) -> None:
        self.run_steps(10_000)

    def test_steps_that_are_made_and_closed(self) -> None:
        self.make_steps(20)

    @slow
    def test_hundreds_of_steps_that_are_made_and_closed(self) -> None:
        self.make_steps(300)


class PlansTest(EagerTestCase):
    """Changing shapes: sixteen plans are kept."""

    def setUp(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 4)).eval()
        self.step = olla.optimize(self.model, torch.randn(1, 16))
        self.addCleanup(self.step.close)

    def run_size(self, size: int) -> None:
        x = torch.randn(size, 16)
        self.assert_same(self.step(x), self.model(x).detach(), f"output of size {size}")

    def test_the_plan_used_least_recently_goes_first(self) -> None:
        for size in range(1, 17):
            self.run_size(size)
        first, second = (weakref.ref(planned.execution) for planned in self.step._planned[:2])
        self.run_size(1)
        with self.assertLogs("olla", "WARNING") as logs:
            self.run_size(17)
        self.assertIn("more than 16 plans", logs.output[-1])
        self.assertEqual(len(self.step._planned), 16)
        gc.collect()
        self.assertIsNotNone(first())
        self.assertIsNone(second())
        with self.assertNoLogs("olla", "WARNING"):
            self.run_size(1)
        with self.assertLogs("olla", "WARNING"):
            self.run_size(2)

    def test_the_memory_of_a_dropped_plan_is_given_back(self) -> None:
        for _ in range(4):
            self.run_size(1000)
        large = self.step._arena.arena_bytes
        self.assertGreater(large, 0)
        for size in range(2, 18):
            for _ in range(4):
                self.run_size(size)
        self.assertLess(self.step._arena.arena_bytes, large / 10)
        self.run_size(17)
        self.assertEqual(self.step._current.replay.counts.missed, 0)


class InterruptionsTest(EagerTestCase):
    """Whatever ends a step in the middle, the next one is right."""

    def setUp(self) -> None:
        torch.manual_seed(0)
        self.addCleanup(TROUBLE.clear)
        heed_interrupts(self)
        self.model = Interrupted()

    def test_ctrl_c_in_any_run_of_a_step(self) -> None:
        model, x = self.model.eval(), torch.randn(8, 16)
        expected = model(x).detach()
        step = olla.optimize(model, x)
        self.addCleanup(step.close)
        for number in range(12):
            if number % 2 == 0:  # the first run, the one that is recorded, and then replays
                TROUBLE["now"] = lambda: signal.raise_signal(signal.SIGINT)
                with self.assertRaises(KeyboardInterrupt):
                    step(x)
                TROUBLE.clear()
            self.assert_same(step(x), expected, "output")
        self.assert_at_planned_addresses(step)

    def test_ctrl_c_at_any_line_of_a_step(self) -> None:
        model, x = self.model.eval(), torch.randn(8, 16)
        expected = model(x).detach()
        step = olla.optimize(model, x)
        self.addCleanup(step.close)
        for _ in range(4):
            step(x)
        folder, lines = os.path.dirname(olla.__file__), 0

        def trace(frame: Any, event: str, _: Any) -> Any:
            nonlocal lines
            # On the way out of the `with` of `Step.__call__`, a tracer is asked where no signal is heard.
            if not frame.f_code.co_filename.startswith(folder) or frame.f_code.co_name == "__call__":
                return None
            lines += event == "line"
            if event == "line" and lines == last:
                raise KeyboardInterrupt
            return trace

        last = 0
        while last == lines:  # until a step ends before it is interrupted
            last, lines = last + 1, 0
            self.addCleanup(sys.settrace, sys.gettrace())
            with contextlib.suppress(KeyboardInterrupt), torch.enable_grad():  # that clean-up may be interrupted, too
                sys.settrace(trace)
                step(x)
            sys.settrace(None)
            self.assert_same(step(x), expected, f"output after an interruption at line {last}")
            self.assert_at_planned_addresses(step)
            self.assertIsNone(step._arena.library.olla_innermost(), f"a session left open at line {last}")
        self.assertGreater(last, 20)

    @slow
    def test_signals_at_any_time(self) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        self.addCleanup(signal.signal, signal.SIGALRM, signal.signal(signal.SIGALRM, interrupt))
        model, x = self.model.eval(), torch.randn(8, 16)
        expected = model(x).detach()
        step = olla.optimize(model, x)
        self.addCleanup(step.close)
        interrupted_steps = 0
        for number in range(4000):
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-6 * (1 + number % 400))
                try:
                    step(x)
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted_steps += 1
            self.assert_same(step(x), expected, f"output after signal {number}")
        self.assertGreater(interrupted_steps, 100)

    def test_gradients_added_up_before_an_exception_are_still_there(self) -> None:
        eager = copy.deepcopy(self.model)

        def backward_of(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
            def backward(x: Tensor, y: Tensor) -> Tensor:
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                return loss

            return backward

        def fail() -> None:
            raise MemoryError("the operator fails")

        batches = [batch() for _ in range(6)]
        step = olla.optimize_step(backward_of(self.model), batches[0], model=self.model)
        self.addCleanup(step.close)
        for x, y in batches:
            for one in (step, backward_of(eager)):
                one(x, y)
                TROUBLE["now"] = fail
                with self.assertRaisesRegex(MemoryError, "the operator fails"):
                    one(x, y)
                TROUBLE.clear()
            for (name, parameter), other in zip(self.model.named_parameters(), eager.parameters(), strict=True):
                self.assert_same(parameter.grad, other.grad, name)

    def test_workers_of_a_loader_that_are_forked_while_steps_run(self) -> None:
        inputs, labels = torch.randn(64, 16), torch.randint(0, 4, (64,))
        loader = DataLoader(TensorDataset(inputs, labels), batch_size=8, num_workers=2, multiprocessing_context="fork")
        eager = side(mlp(), adam)
        own = eager.copy()
        step = olla.optimize(
            own.model, inputs[:8], loss_fn=F.cross_entropy, targets=labels[:8], optimizer=own.optimizer
        )
        self.addCleanup(step.close)
        for epoch in range(2):  # in the second one, workers are forked from a process that has an arena
            for number, (x, y) in enumerate(loader):
                torch.manual_seed(number)
                loss = step(x, targets=y)
                torch.manual_seed(number)
                eager.optimizer.zero_grad()
                expected = F.cross_entropy(eager.model(x), y)
                expected.backward()
                eager.optimizer.step()
                self.assert_same(loss, expected.detach(), f"loss {number} of epoch {epoch}")
        self.assert_sides_same(own, eager)
        self.assert_at_planned_addresses(step)
