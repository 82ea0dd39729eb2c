"""A step at planned addresses: from its first runs to its end, and whatever may happen in between."""

from __future__ import annotations

import copy
import gc
import os
import resource
import threading
import weakref
from typing import Any
from unittest import mock

import torch
from eager import EagerTestCase, sgd
from torch import Tensor, nn
from torch.nn import functional as F

import olla
from olla.capture.lower import tensors_of
from olla.compiling import NativeUnavailableError
from olla.graph.check import check
from olla.graph.lifetimes import live_intervals
from olla.run.recording import Recording

TROUBLE = {"extra": 0, "fail": False}


@torch.library.custom_op("olla_tests::troubled", mutates_args=())
def troubled(x: Tensor) -> Tensor:
    """Twice x. Allocates or fails as ``TROUBLE`` says."""
    if TROUBLE["fail"]:
        raise RuntimeError("the operator fails")
    if TROUBLE["extra"]:
        torch.empty(TROUBLE["extra"], dtype=torch.uint8)
    return x + x


@troubled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Troubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return troubled(torch.relu(self.layer(x))).sum(1)


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.LazyLinear(4)
    )


class ExecutionTest(EagerTestCase):
    def training(self, **options: Any) -> tuple[olla.Step, tuple[Tensor, Tensor]]:
        torch.manual_seed(0)
        x, y = torch.randn(4, 3, 12, 12), torch.randint(0, 4, (4,))
        model = convolutions()
        model(x)
        self.model, self.optimizer = model, torch.optim.Adam(model.parameters())
        step = olla.optimize(model, x, loss_fn=F.cross_entropy, targets=y, optimizer=self.optimizer, **options)
        self.addCleanup(step.close)
        return step, (x, y)

    def inference(self, model: nn.Module | None = None) -> tuple[olla.Step, Tensor]:
        torch.manual_seed(0)
        x = torch.randn(8, 16)
        step = olla.optimize((model or nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))).eval(), x)
        self.addCleanup(step.close)
        return step, x

    def settle(self, step: olla.Step, *args: Any, **kwargs: Any) -> Any:
        for _ in range(5):
            step(*args, **kwargs)
            if step._current.settled:
                break
        self.assertTrue(step._current.settled)
        return step._current

    def test_twenty_steps_miss_no_planned_address_and_leave_nothing_behind(self) -> None:
        step, (x, y) = self.training()
        execution = self.settle(step, x, targets=y)
        for _ in range(20):
            step(x, targets=y)
            counts = execution.replay.counts
            self.assertEqual((counts.sizes, counts.conflicts, counts.escapes, counts.outside), (0, 0, 0, 1))
            self.assertGreater(counts.hits, 50)

    def test_every_tensor_is_at_its_planned_address(self) -> None:
        step, (x, y) = self.training()
        execution = self.settle(step, x, targets=y)
        draft, plan, base = execution.draft, step.plan, execution.arena.base
        graph = draft.lowered.graph
        planned = {
            (life.start, life.storage): offset
            for life, offset in zip(live_intervals(graph, plan.order), plan.offsets, strict=True)
        }
        found: dict[tuple[int, int], int] = {}

        def look(position: int, value: object) -> None:
            storages = draft.lowered.results[draft.lowered.nodes[plan.order[position]]]
            for storage, tensor in zip(storages, tensors_of(value), strict=True):
                if (position, storage) in planned:
                    found[position, storage] = tensor.untyped_storage().data_ptr() - base

        execution.code = execution._emit(execution._clock.tell, look)
        step(x, targets=y)
        self.assertEqual(execution.replay.counts.missed, 0)
        inside = {life: offset for life, offset in planned.items() if offset is not None}
        self.assertGreater(len(inside), 15)
        self.assertEqual(inside, {life: found[life] for life in inside})

    def test_the_plan_is_exact_and_the_checker_accepts_it(self) -> None:
        step, (x, y) = self.training()
        measured = step.measure(x, targets=y)
        plan = step.plan
        self.assertTrue(measured.exact, (measured.peak_bytes, plan.peak_bytes))
        self.assertEqual(check(step._current.draft.lowered.graph, plan), ())
        self.assertGreater(len(plan.workspaces), 5)
        self.assertEqual(measured.reserved_bytes, plan.arena_bytes + 4)  # the loss is outside
        self.assertEqual(measured.arena.missed, 0)
        report = str(step.report())
        self.assertIn("in one arena of", report)
        self.assertIn("0 missed", report)

    def test_operators_that_allocate_what_no_shape_tells(self) -> None:
        class Recurrent(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = nn.LSTM(16, 32, num_layers=2)

            def forward(self, x: Tensor) -> Tensor:
                return self.layers(x)[0].sum()

        model, x = Recurrent(), torch.randn(7, 4, 16)
        step = olla.optimize(model, x, optimizer=sgd(model.parameters()))
        self.addCleanup(step.close)
        measured = step.measure(x)
        self.assertEqual(step._current.not_executed, "")
        self.assertTrue(measured.exact, (measured.peak_bytes, measured.planned_bytes))

    def test_measuring_leaves_a_step_that_can_still_be_trained(self) -> None:
        step, (x, y) = self.training()
        step.measure(x, targets=y)
        eager, state = copy.deepcopy(self.model), self.optimizer.state_dict()
        optimizer = torch.optim.Adam(eager.parameters())
        optimizer.load_state_dict(state)
        for _ in range(4):
            loss = F.cross_entropy(eager(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            self.assert_same(step(x, targets=y), loss.detach(), "loss")
        self.assertEqual((step._current.replay.counts.missed, step._current.replay.counts.escapes), (0, 0))

    def test_a_profile_shows_both_steps_op_by_op_and_leaves_all_as_it_was(self) -> None:
        step, (x, y) = self.training()
        before = copy.deepcopy(self.model.state_dict())
        measured = step.measure(x, targets=y)  # settles the plan
        eager, planned = step.profile(x, targets=y)
        self.assert_same(self.model.state_dict(), before, "model.state_dict()")
        self.assertEqual(len(self.optimizer.state), 0)
        self.assertEqual(eager.peak_allocated_bytes, measured.baseline_peak_bytes)
        self.assertEqual(planned.peak_allocated_bytes, measured.peak_bytes)
        self.assertGreater(len(planned.ops), 20)

    def test_results_that_are_kept_stay_as_they_are(self) -> None:
        step, x = self.inference()
        with torch.no_grad():
            inputs = [x + i for i in range(6)]
            kept = [step(i) for i in inputs]
            for result, i in zip(kept, inputs, strict=True):
                self.assert_same(result, step(i), "result")
        self.assertEqual(step._current.replay.counts.missed, 0)

    def test_gradients_left_to_the_user_are_outside(self) -> None:
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        x = torch.randn(4, 8)
        step = olla.optimize(model.train(), x)
        kept = []
        for _ in range(5):
            model.zero_grad()
            step(x)
            kept.append([parameter.grad for parameter in model.parameters()])
        for gradients in kept:
            self.assert_same(gradients, kept[0], "gradients")
        self.assertEqual(step._current.replay.counts.missed, 0)

    def test_without_placing(self) -> None:
        step, (x, y) = self.training(place=False)
        for _ in range(3):
            step(x, targets=y)
        self.assertIsNone(step.plan.offsets)
        self.assertIsNone(step._current.replay)
        self.assertNotIn("self.op(", step.code)
        self.assertIn("not executed: place=False", str(step.report()))

    def test_without_a_compiler_the_step_runs_in_its_order_and_says_so(self) -> None:
        reason = NativeUnavailableError("no C++ compiler was found")
        step, (x, y) = self.training()
        with mock.patch("olla.run.native.load", side_effect=reason), self.assertLogs("olla", "WARNING") as logs:
            losses = [step(x, targets=y) for _ in range(4)]
        self.assertIn("not at planned addresses: no C++ compiler was found", logs.output[0])
        self.assertIn("not executed: no C++ compiler was found", str(step.report()))
        self.assertIsNone(step.plan.offsets)
        again, _ = self.training()
        self.assert_same([again(x, targets=y) for _ in range(4)], losses, "losses")

    def test_an_allocator_that_is_not_asked_is_noticed(self) -> None:
        step, x = self.inference()
        with mock.patch("olla.execution.Recording.of", return_value=Recording((), {}, {})), self.assertLogs("olla"):
            for _ in range(3):
                step(x)
        self.assertIn("another allocator was installed", str(step.report()))

    def test_a_step_that_allocates_otherwise_is_recorded_again(self) -> None:
        self.addCleanup(TROUBLE.update, extra=0)
        step, x = self.inference(Troubled())
        expected = step(x)
        execution = self.settle(step, x)
        first = execution.replay
        TROUBLE["extra"] = 4096
        with self.assertLogs("olla", "WARNING") as logs:
            for _ in range(3):
                self.assert_same(step(x), expected, "result")
                self.assertEqual(first.counts.sizes, 1)
        self.assertIn("recording it again", logs.output[0])
        self.settle(step, x)
        self.assertIsNot(execution.replay, first)
        self.assert_same(step(x), expected, "result")
        self.assertEqual(execution.replay.counts.missed, 0)

    def test_a_step_that_never_allocates_the_same_is_given_up_and_stays_right(self) -> None:
        self.addCleanup(TROUBLE.update, extra=0)
        step, x = self.inference(Troubled())
        expected = step(x)
        with self.assertLogs("olla", "WARNING") as logs:
            for _ in range(30):
                TROUBLE["extra"] += 64
                self.assert_same(step(x), expected, "result")
        self.assertIn("its allocations are not the same in every step", logs.output[-1])
        self.assertIn("not executed", str(step.report()))

    def test_an_exception_in_the_middle_leaves_a_step_that_works(self) -> None:
        self.addCleanup(TROUBLE.update, fail=False)
        step, x = self.inference(Troubled())
        expected = step(x)
        execution = self.settle(step, x)
        for failing in (True, False, True, False):
            TROUBLE["fail"] = failing
            if failing:
                with self.assertRaisesRegex(RuntimeError, "the operator fails"):
                    step(x)
            else:
                self.assert_same(step(x), expected, "result")
                self.assertEqual(execution.replay.counts.missed, 0)

    def test_an_exception_while_recording_is_no_recording(self) -> None:
        self.addCleanup(TROUBLE.update, fail=False)
        step, x = self.inference(Troubled())
        expected = step(x)
        TROUBLE["fail"] = True
        with self.assertRaisesRegex(RuntimeError, "the operator fails"):
            step(x)
        TROUBLE["fail"] = False
        self.settle(step, x)
        self.assert_same(step(x), expected, "result")
        self.assertEqual(step._current.replay.counts.missed, 0)

    def test_optimizer_state_that_was_dropped_is_not_made_in_the_arena(self) -> None:
        step, (x, y) = self.training()
        execution = self.settle(step, x, targets=y)
        for _ in range(2):
            self.optimizer.state.clear()
            for _ in range(3):
                step(x, targets=y)
            self.assertEqual((execution.replay.counts.missed, execution.replay.counts.escapes), (0, 0))

    def test_a_closed_step_gives_its_memory_back_and_runs_no_more(self) -> None:
        step, x = self.inference()
        with step as entered:
            self.assertIs(entered, step)
            execution = self.settle(step, x)
            result = step(x)
            expected = result.clone()
            self.assertGreater(execution.arena.arena_bytes, 0)
        self.assertEqual(execution.arena.arena_bytes, 0)
        self.assert_same(result, expected, "result")
        with self.assertRaisesRegex(olla.ExecutionError, "was closed"):
            step(x)
        step.close()

    def test_a_step_that_is_forgotten_gives_its_memory_back(self) -> None:
        x = torch.randn(8, 16)
        step = olla.optimize(nn.Linear(16, 16).eval(), x)
        arena = self.settle(step, x).arena
        finalizer, gone = arena._drop, weakref.ref(arena)
        self.assertTrue(finalizer.alive)
        del step, arena
        gc.collect()
        self.assertIsNone(gone())
        self.assertFalse(finalizer.alive)

    def test_two_steps_take_turns(self) -> None:
        one, x = self.inference()
        other, (images, labels) = self.training()
        self.settle(one, x)
        self.settle(other, images, targets=labels)
        expected = one(x)
        for _ in range(3):
            other(images, targets=labels)
            self.assert_same(one(x), expected, "result")
            self.assertEqual((one._current.replay.counts.missed, other._current.replay.counts.missed), (0, 0))

    def test_a_step_inside_of_another_step(self) -> None:
        inner, x = self.inference()
        self.settle(inner, x)
        expected, results = inner(x), []

        class Curious(torch.optim.SGD):
            def step(self, closure: Any = None) -> None:
                results.append(inner(x))
                super().step()

        model = nn.Linear(4, 4)
        outer = olla.optimize(model, torch.randn(2, 4), optimizer=Curious(model.parameters(), lr=0.1))
        batch = torch.randn(2, 4)
        self.settle(outer, batch)
        outer(batch)
        self.assertGreater(len(results), 3)
        for result in results:
            self.assert_same(result, expected, "result")
        self.assertEqual((inner._current.replay.counts.missed, outer._current.replay.counts.missed), (0, 0))

    def test_steps_in_worker_threads(self) -> None:
        steps = [self.inference() for _ in range(3)]
        expected = [step(x).clone() for step, x in steps]
        failures: list[str] = []

        def work(number: int) -> None:
            step, x = steps[number]
            for _ in range(30):
                if not torch.equal(step(x), expected[number]):
                    failures.append(f"step {number}")
            if step._current.replay.counts.missed:
                failures.append(f"step {number} missed")

        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(failures, [])

    def test_a_child_process_runs_the_step_in_a_copy_of_the_arena(self) -> None:
        step, x = self.inference()
        self.settle(step, x)
        self.addCleanup(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # threads of OpenMP do not survive a fork
        expected = step(x)
        child = os.fork()
        if child == 0:
            same = torch.equal(step(x), expected) and step._current.replay.counts.missed == 0
            os._exit(0 if same else 1)
        self.assertEqual(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), 0)
        self.assert_same(step(x), expected, "result")

    def test_what_the_step_calls_has_room_on_the_stack_however_deep_that_is(self) -> None:
        torch.manual_seed(0)
        model, x = nn.Sequential(*(nn.Linear(16, 16) for _ in range(24))), torch.randn(4, 16)
        step = olla.optimize(model, x, optimizer=sgd(model.parameters()), loss_fn=lambda y, t: (y - t).sum(), targets=x)
        self.addCleanup(step.close)
        for _ in range(4):
            step(x, targets=x)
        self.assert_at_planned_addresses(step)
        self.assertGreater(step.code.count("self.update_"), 20)

        def faults(depth: int) -> int:
            if depth:
                return faults(depth - 1)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            step(x, targets=x)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        # A chunk of CPython's stack has room for some hundred calls. At its end each call gets another, and two faults.
        # On Python 3.11 that was so at twelve of these depths; it is at one, with that end between two short functions.
        found = [min(faults(depth) for _ in range(3)) for depth in range(150)]
        self.assertLess(sum(number > 40 for number in found), 4)

    def test_all_signatures_share_one_arena(self) -> None:
        step, x = self.inference()
        wide = torch.randn(32, 16)
        expected = [step(x), step(wide)]
        for _ in range(4):
            self.assert_same([step(x), step(wide)], expected, "results")
        small, large = (planned.execution for planned in step._planned)
        self.assertGreater(large.draft.plan.arena_bytes, small.draft.plan.arena_bytes)
        self.assertEqual(large.draft.plan.arena_bytes, step._arena.arena_bytes)
        self.assertEqual((small.replay.counts.missed, large.replay.counts.missed), (0, 0))

    def test_accumulated_gradients(self) -> None:
        model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
        eager = copy.deepcopy(model)
        x, y = torch.randn(8, 6), torch.randint(0, 4, (8,))
        optimizer, eager_optimizer = sgd(model.parameters()), sgd(eager.parameters())

        def accumulate(x: Tensor, y: Tensor) -> Tensor:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        step = olla.optimize_step(accumulate, (x, y), model=model)
        for number in range(12):
            loss = F.cross_entropy(eager(x), y)
            loss.backward()
            self.assert_same(step(x, y), loss.detach(), "loss")
            if number % 3 == 2:
                for one in (optimizer, eager_optimizer):
                    one.step()
                    one.zero_grad()
        self.assert_same(model.state_dict(), eager.state_dict(), "model.state_dict()")
