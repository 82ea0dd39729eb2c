"""Steps whose storages are away for a while give what eager PyTorch gives, within the bytes that were planned."""

from __future__ import annotations

import copy
import errno
import gc
import os
import random
import resource
import tempfile
import unittest
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from eager import PLANNING_SECONDS, EagerTestCase, sgd
from graphs import diamond, graphs
from hypothesis import given
from hypothesis import strategies as st
from repeat_test import Net
from torch import Tensor, nn
from torch.nn import functional as F

import olla
from olla import Graph, InfeasibleError, Plan, Schedule, SpillError, planning
from olla.fit.spill import Bandwidth, belady
from olla.graph.check import check
from olla.graph.lifetimes import Spill, least_bytes, live_intervals, peak_bytes
from olla.run.spill import Spiller, SpillSpace, measured_bandwidth, require_spill_dir
from olla.torch_private import TorchDispatchMode

CPU = torch.device("cpu")
TRIES = 300  # places where an op is run again, or a storage sent away, if that is allowed
FREE, DEAR = Bandwidth(1e15, 1e15), Bandwidth(1.0, 1.0)  # spilling costs less, or more, than anything else


def at_random(graph: Graph, *_: Any) -> Schedule:
    """Program order with ops that run again and storages that are away, the same for the same operators."""
    draw = random.Random(0)

    def schedule(order: tuple[int, ...], spills: tuple[Spill, ...] = ()) -> Schedule:
        return Schedule(order, peak_bytes(graph, order, spills), 0, "at random", 0.0, spills)

    order, spills = tuple(range(len(graph.ops))), ()
    for _ in range(TRIES):
        place = draw.randint(1, len(order))
        again = (*order[:place], draw.choice(order[:place]), *order[place:])
        order = again if not check(graph, Plan.of(graph, schedule(again))) else order
    for _ in range(TRIES):
        life = draw.choice(live_intervals(graph, order, spills))
        last = life.end - (life.end < len(order) or life.storage not in graph.outputs)
        if life.start + 1 < last:
            away, back = sorted(draw.sample(range(life.start + 1, last + 1), 2))
            is_used = any(life.storage in graph.ops[op].touches for op in order[away:back])
            spills += () if is_used else (Spill(life.storage, away, back),)
    found = schedule(order, tuple(sorted(spills)))
    assert not check(graph, Plan.of(graph, found))
    return found


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


@torch.library.custom_op("olla_tests::borrowed", mutates_args=())
def borrowed(x: Tensor) -> Tensor:
    """Twice x, in memory of NumPy, which PyTorch cannot resize."""
    return torch.from_numpy(np.array(x.numpy() * 2))


@borrowed.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


FAILING = {"now": False}


@torch.library.custom_op("olla_tests::failing", mutates_args=())
def failing(x: Tensor) -> Tensor:
    """A copy of x, if ``FAILING`` allows."""
    if FAILING["now"]:
        raise RuntimeError("the operator fails")
    return x.clone()


@failing.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Waiting(nn.Module):
    """An inference in which what ``first`` returns waits for ``middle``, which needs most."""

    def __init__(self, first: Callable[[Tensor], Tensor], middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.middle = first, middle
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        waiting = self.first(x)
        return self.down(self.middle(self.up(waiting))) + waiting


def spilling_is_free() -> Any:
    """Whoever plans meanwhile prefers it to recomputation."""
    return mock.patch.object(planning, "measured_bandwidth", return_value=FREE)


class InFolder(EagerTestCase):
    """With a directory to spill to, in which nothing must be left, nor be open."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def tearDown(self) -> None:
        self.assertEqual(list(self.folder.iterdir()), [])

    def open_files(self) -> int:
        """How many files of the directory are mapped, or open, without a name."""
        gc.collect()
        maps = Path("/proc/self/maps").read_text()
        links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        return maps.count(f"{self.folder}/") + sum(link.startswith(f"{self.folder}/") for link in links)

    def spilling(self, model: nn.Module, share: float = 0.6, **arguments: Any) -> olla.Step:
        """A step within that share of what it needs in the best order, which nothing but spilling keeps to."""
        torch.manual_seed(0)
        x = torch.randn(256, 64)
        free = olla.plan(model, x, place=False, **arguments)
        budget = free.persistent_bytes + int(share * free.peak_bytes)
        patch = spilling_is_free()
        patch.start()
        self.addCleanup(patch.stop)
        step = olla.optimize(model, x, memory_budget=budget, spill_dir=self.folder, **arguments)
        self.addCleanup(step.close)
        return step


class RandomPlansTest(InFolder):
    def same(self, model: nn.Module, inputs: Callable[[], Any], targets: Callable[[], Tensor]) -> None:
        torch.manual_seed(0)
        with mock.patch.object(planning, "_ordered", at_random):
            step = self.assert_training_same(
                model, inputs, loss_fn=F.cross_entropy, targets=targets, spill_dir=self.folder
            )
            measured = step.measure(inputs(), targets=targets())
        self.assertTrue(measured.exact, (measured.peak_bytes, measured.planned_bytes))
        self.assertEqual(measured.arena.missed, 0)
        graph, plan = step._current.draft.lowered.graph, step.plan
        self.assertEqual(measured.spilled_bytes, sum(graph.storages[spill.storage].size for spill in plan.spills))
        offsets = {
            (life.start, life.storage): offset
            for life, offset in zip(live_intervals(graph, plan.order, plan.spills), plan.offsets, strict=True)
        }
        base = step._current.arena.base
        returned = {
            life: at - base for life, at in step._current.spiller.addresses.items() if life[0] < len(plan.order)
        }
        self.assertEqual(returned, {life: offsets[life] for life in returned})
        self.assertGreater(len(returned), 20)
        self.assertGreater(len(plan.spills), 20)
        self.assertGreater(len(plan.recomputed), 10)
        spilled = {spill.storage for spill in plan.spills}
        self.assertTrue(any(spilled & {*op.creates} for op in (graph.ops[i] for i in plan.recomputed)))
        self.assertTrue(any(spilled & {*op.writes} for op in graph.ops))

    def test_a_network_for_images(self) -> None:
        self.same(Net(), images, lambda: torch.randint(0, 10, (4,)))

    def test_a_transformer_with_tied_weights(self) -> None:
        self.same(Words(), ids, ids)


class LateStream:
    """A stream whose copies are made when somebody waits for them, and not before."""

    def __init__(self) -> None:
        self.pending: list[Callable[[], object]] = []

    def wait_stream(self, other: LateStream) -> None:
        """All that ``other`` was given must be done."""
        other.synchronize()

    def wait_event(self, event: LateEvent) -> None:
        while event.mark in event.stream.pending:
            event.stream.pending.pop(0)()

    def synchronize(self) -> None:
        while self.pending:
            self.pending.pop(0)()


class LateEvent:
    def __init__(self, stream: LateStream) -> None:
        self.stream = stream

    def record(self) -> None:
        self.mark = lambda: None
        self.stream.pending.append(self.mark)

    def elapsed_time(self, other: LateEvent) -> float:
        return 1.0


class OnStream(TorchDispatchMode):
    """Gives copies to a stream."""

    def __init__(self, stream: LateStream) -> None:
        super().__init__()
        self.stream = stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.copy_.default:
            return func(*args, **(kwargs or {}))
        self.stream.pending.append(lambda: args[0].copy_(args[1]))
        return args[0]


class StreamTest(RandomPlansTest):
    """The same steps, with copies that are as late as a GPU may make them."""

    def setUp(self) -> None:
        super().setUp()
        here, beside = LateStream(), LateStream()
        for name, replacement in {
            "Stream": lambda device: beside,
            "Event": lambda enable_timing: LateEvent(beside),
            "current_stream": lambda device: here,
            "stream": OnStream,
        }.items():
            patch = mock.patch.object(torch.cuda, name, replacement)
            patch.start()
            self.addCleanup(patch.stop)
        patch = mock.patch("olla.execution.Spiller", lambda *arguments: Spiller(*arguments[:-1], torch.device("cuda")))
        patch.start()
        self.addCleanup(patch.stop)


class SpillTest(InFolder):
    def test_a_step_runs_within_two_thirds_of_what_it_needs(self) -> None:
        torch.manual_seed(0)
        model = deep()
        free = olla.plan(model, torch.randn(512, 64), optimizer=sgd(model.parameters()), place=False)
        budget = free.persistent_bytes + free.peak_bytes * 2 // 3
        with spilling_is_free():
            step = self.assert_training_same(
                model, lambda: torch.randn(512, 64), memory_budget=budget, spill_dir=self.folder, steps=6
            )
            measured = step.measure(torch.randn(512, 64))
        self.assertTrue(measured.exact)
        self.assertLessEqual(step.plan.persistent_bytes + measured.peak_bytes, budget)
        self.assertGreater(measured.baseline_peak_bytes, 1.5 * measured.peak_bytes)
        self.assertGreater(measured.spilled_bytes, 0)
        self.assertGreater(measured.spill_seconds, 0)
        self.assertEqual(step.plan.recomputed, ())
        report = str(step.report())
        self.assertIn(f"spilled     {len(step.plan.spills)} storages", report)
        self.assertIn("spilled, measured", report)

    def test_what_takes_less_time_is_chosen(self) -> None:
        model, x = deep(), torch.randn(256, 64)
        found = {}
        for bandwidth in (FREE, DEAR):
            with mock.patch.object(planning, "measured_bandwidth", return_value=bandwidth):
                found[bandwidth] = olla.plan(
                    model, x, optimizer=sgd(model.parameters()), memory_budget=0.6, spill_dir=self.folder
                )
        self.assertGreater(len(found[FREE].spills), 0)
        self.assertEqual(found[FREE].recomputed, ())
        self.assertGreater(len(found[DEAR].recomputed), 0)
        self.assertEqual(found[DEAR].spills, ())

    def test_below_what_recomputation_reaches_spilling_goes_on(self) -> None:
        model, x = deep(), torch.randn(256, 64)
        arguments: dict[str, Any] = {"optimizer": sgd(model.parameters())}
        with self.assertRaises(InfeasibleError) as caught:
            olla.plan(model, x, memory_budget=1000, **arguments)
        with self.assertRaises(InfeasibleError) as least:
            olla.plan(model, x, memory_budget=1000, spill_dir=self.folder, **arguments)
        self.assertLess(least.exception.best_bytes, caught.exception.best_bytes)
        self.assertEqual(least.exception.best_bytes, least.exception.lower_bound_bytes)
        plan = olla.plan(model, x, memory_budget=least.exception.best_bytes, spill_dir=self.folder, **arguments)
        self.assertLessEqual(plan.persistent_bytes + plan.peak_bytes, least.exception.best_bytes)
        self.assertGreater(len(plan.spills), 0)

    def test_the_frontier_goes_on_where_recomputation_ends(self) -> None:
        model, x = deep(), torch.randn(256, 64)
        arguments: dict[str, Any] = {"optimizer": sgd(model.parameters()), "points": 5, "time_limit": PLANNING_SECONDS}
        plain = olla.frontier(model, x, **arguments).schedules
        with spilling_is_free():
            free = olla.frontier(model, x, spill_dir=self.folder, **arguments).schedules
        with mock.patch.object(planning, "measured_bandwidth", return_value=DEAR):
            dear = olla.frontier(model, x, spill_dir=self.folder, **arguments).schedules
        for schedules in (free, dear):
            self.assertLess(schedules[-1].peak_bytes, plain[-1].peak_bytes)
            for one, next_one in pairwise(schedules):
                self.assertLess(next_one.peak_bytes, one.peak_bytes)
                self.assertGreaterEqual(next_one.extra_seconds, one.extra_seconds)
        self.assertTrue(all(one.spills for one in free[1:]))
        self.assertEqual([one.spills for one in dear if one.peak_bytes >= plain[-1].peak_bytes * 1.1][-1], ())

    def test_results_may_come_back_after_the_last_step(self) -> None:
        def early(x: Tensor) -> tuple[Tensor, Tensor]:
            first = layer(x)
            return first, layer(layer(torch.relu(layer(first))))

        torch.manual_seed(0)
        layer, x = nn.Linear(64, 64), torch.randn(32, 64)

        def order(graph: Graph, *_: Any) -> Schedule:
            order = tuple(range(len(graph.ops)))
            spills = tuple(
                Spill(output, start, len(order))
                for output in graph.outputs
                for start in [2 + max(step for step, op in enumerate(order) if output in graph.ops[op].touches)]
                if start < len(order)
            )
            self.assertEqual(len(spills), 1)
            return Schedule(order, peak_bytes(graph, order, spills), 0, "by hand", 0.0, spills)

        expected = [value.detach() for value in early(x)]
        with mock.patch.object(planning, "_ordered", order):
            step = olla.optimize_step(early, (x,), model=layer, spill_dir=self.folder)
            results = [step(x) for _ in range(5)]
            measured = step.measure(x)
        for result in results:
            self.assert_same(result, tuple(expected), "results")
        self.assert_at_planned_addresses(step)
        self.assertTrue(measured.exact)
        self.assertEqual(measured.spilled_bytes, 32 * 64 * 4)

    def test_memory_of_others_stays_where_it_is(self) -> None:
        model = Waiting(borrowed, failing).eval()
        x = torch.randn(256, 64)
        with torch.no_grad():
            expected = model(x)
        step = self.spilling(model, 0.9)
        self.assertEqual(len(step.plan.spills), 1)
        for _ in range(4):
            self.assert_same(step(x), expected, "result")
        self.assertEqual(step._current.spiller.spilled_bytes, 0)

    def test_steps_that_take_turns_do_not_disturb_each_other(self) -> None:
        x = torch.randn(256, 64)
        models = [deep() for _ in range(2)]
        eager = copy.deepcopy(models)
        steps = [self.spilling(model, optimizer=sgd(model.parameters())) for model in models]
        optimizers = [sgd(model.parameters()) for model in eager]
        for _ in range(6):
            for step, model, optimizer in zip(steps, eager, optimizers, strict=True):
                optimizer.zero_grad()
                loss = model(x).sum()
                loss.backward()
                optimizer.step()
                self.assert_same(step(x), loss.detach(), "loss")
        for step in steps:
            self.assertGreater(step._current.spiller.spilled_bytes, 0)

    def test_a_child_process_has_a_file_of_its_own(self) -> None:
        self.addCleanup(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # threads of OpenMP do not survive a fork
        x, model = torch.randn(256, 64), deep()
        eager = copy.deepcopy(model)
        optimizer = sgd(eager.parameters())
        step = self.spilling(model, optimizer=sgd(model.parameters()))
        losses = []
        for _ in range(40):
            optimizer.zero_grad()
            loss = eager(x).sum()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        same = [torch.equal(step(x), loss) for loss in losses[:5]]
        child = os.fork()
        same += [torch.equal(step(x), loss) for loss in losses[5:]]  # both at the same time
        if child == 0:
            os._exit(0 if all(same) and step._current.replay.counts.missed == 0 else 1)
        self.assertEqual(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), 0)
        self.assertTrue(all(same))
        self.assertGreater(step._current.spiller.spilled_bytes, 0)

    def test_nothing_is_left_after_close_collection_or_an_exception(self) -> None:
        self.addCleanup(FAILING.update, now=False)
        model, x = Waiting(torch.sigmoid, failing).eval(), torch.randn(256, 64)
        with torch.no_grad():
            expected = model(x)
        before = self.open_files()
        with self.spilling(model, 0.9) as step:
            for fails in (False, True, False, False, True, False, True, False):
                FAILING["now"] = fails
                if fails:
                    with self.assertRaisesRegex(RuntimeError, "the operator fails"):
                        step(x)
                else:
                    self.assert_same(step(x), expected, "result")
            self.assertGreater(step._current.spiller.spilled_bytes, 0)
            self.assertGreater(self.open_files(), before)
        self.assertEqual(self.open_files(), before)
        again = olla.optimize(
            model, x, memory_budget=step.plan.persistent_bytes + step.plan.peak_bytes, spill_dir=self.folder
        )
        self.assert_same(again(x), expected, "result")
        self.assertGreater(self.open_files(), before)
        del again
        self.assertEqual(self.open_files(), before)


class SpillDirTest(InFolder):
    def refused(self, message: str, *, measuring: bool = False, **options: Any) -> None:
        """Nothing is planned, and nothing changed."""
        model = deep()
        optimizer = sgd(model.parameters())
        before = copy.deepcopy(model.state_dict())
        with nullcontext() if measuring else spilling_is_free(), self.assertRaisesRegex(SpillError, message):
            olla.optimize(model, torch.randn(256, 64), optimizer=optimizer, memory_budget=0.6, **options)
        self.assert_same(dict(model.state_dict()), dict(before), "the model")
        self.assertEqual(len(optimizer.state), 0)
        self.assertTrue(all(parameter.grad is None for parameter in model.parameters()))

    def test_no_directory(self) -> None:
        self.refused("'/no/such/place', which is not a directory", spill_dir="/no/such/place")
        with tempfile.NamedTemporaryFile() as file:
            self.refused("which is not a directory: name one that exists", spill_dir=file.name)
        self.refused("spill_dir is True: give the path", spill_dir=True)

    def test_a_directory_that_cannot_be_written(self) -> None:
        self.refused("no file can be written in spill_dir '/proc'", spill_dir="/proc")

    def test_the_host_is_for_cuda_and_directories_are_for_the_cpu(self) -> None:
        self.refused("spill_dir='host' is for CUDA: on cpu, name a directory", spill_dir="host")
        require_spill_dir("host", torch.device("cuda"))
        with self.assertRaisesRegex(SpillError, "pass spill_dir='host'"):
            require_spill_dir(self.folder, torch.device("cuda"))

    def test_without_a_gpu_nothing_is_known_of_its_bandwidth(self) -> None:
        with (
            mock.patch("torch.cuda.is_available", return_value=False),
            self.assertRaisesRegex(SpillError, "where there"),
        ):
            measured_bandwidth("host")

    def test_a_directory_is_looked_at_even_if_nothing_is_spilled(self) -> None:
        with self.assertRaisesRegex(SpillError, "not a directory"):
            olla.plan(nn.Linear(2, 2), torch.ones(2), spill_dir="/no/such/place")

    def test_a_full_disk(self) -> None:
        measured_bandwidth(self.folder)
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with mock.patch("os.posix_fallocate", side_effect=full):
            self.refused(r"spilling needs [\d,]+ bytes in .*, where [\d,]+ are free: No space", spill_dir=self.folder)

    def test_a_file_may_not_be_so_large(self) -> None:
        measured_bandwidth(self.folder)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_FSIZE, limits)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        self.refused(r"spilling needs [\d,]+ bytes in .*: File too large", spill_dir=self.folder)

    def test_no_room_to_measure_the_bandwidth(self) -> None:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with mock.patch("os.posix_fallocate", side_effect=full):
            self.refused("spilling needs 33,554,432 bytes", measuring=True, spill_dir=self.folder)

    def test_the_bandwidth_is_measured_once(self) -> None:
        found = measured_bandwidth(self.folder)
        self.assertTrue(found.write > 0 and found.read > 0)
        self.assertIs(measured_bandwidth(str(self.folder)), found)

    def test_a_space_grows_and_is_given_back(self) -> None:
        space, before = SpillSpace(self.folder), self.open_files()
        small = space.reserve(100)
        self.assertIs(space.reserve(50), small)
        self.assertEqual(len(space.reserve(10_000)), 10_000)
        del small
        space.close()
        self.assertEqual(self.open_files(), before)

    def test_what_is_away_at_different_times_shares_the_file(self) -> None:
        graph = Graph(
            (
                olla.Op("a", creates=(0, 1)),
                *(olla.Op(n, reads=(s,)) for s, n in ((1, "b"), (0, "c"), (0, "d"), (1, "e"))),
            ),
            (olla.Storage("x", 8), olla.Storage("y", 8)),
        )
        spills = (Spill(0, 1, 2), Spill(1, 2, 4))
        spiller = Spiller(graph, range(5), spills, SpillSpace(None), CPU)
        moments = [(t.stored, t.dropped, t.fetched, t.used) for t in spiller.transfers]
        self.assertEqual(moments, [(0, 1, 2, 2), (1, 2, 4, 4)])


class BeladyTest(unittest.TestCase):
    def test_what_is_needed_last_is_away(self) -> None:
        order = (0, 1, 3, 2, 4, 5)
        peak = peak_bytes(diamond(), order)
        self.assertEqual(belady(diamond(), order, peak), ())
        self.assertEqual(belady(diamond(), order, peak - 1), (Spill(1, 2, 3),))

    @given(graphs(), st.randoms())
    def test_every_budget_that_can_be_kept_is_kept(self, graph: Graph, draw: random.Random) -> None:
        order = tuple(range(len(graph.ops)))
        peak, (floor, _) = peak_bytes(graph, order), least_bytes(graph)
        self.assertIsNone(belady(graph, order, floor - 1))
        for budget in {floor, draw.randint(floor, max(floor, peak)), peak}:
            spills = belady(graph, order, budget)
            assert spills is not None
            found = Schedule(order, peak_bytes(graph, order, spills), 0, "by hand", 0.0, spills)
            self.assertEqual(check(graph, Plan.of(graph, found)), ())
            self.assertLessEqual(found.peak_bytes, budget)
            for one in spills:
                others = [other for other in spills if other != one]
                self.assertGreater(peak_bytes(graph, order, others), budget)


if __name__ == "__main__":
    unittest.main()
