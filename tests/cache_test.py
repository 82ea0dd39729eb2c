"""Plans on disk: found again without planning, never believed unchecked, and never in the way."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import unittest
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from eager import EagerTestCase
from graphs import diamond
from torch import Tensor, nn
from torch.nn import functional as F

import olla
from olla import planning
from olla.cache import Cache, digest
from olla.errors import CacheError
from olla.fit.spill import Bandwidth
from olla.graph.check import verify_placement
from olla.graph.plan import Placement

HERE = Path(__file__).parent
PLANNERS = ("schedule", "fitted", "pack", "place", "improved_order", "improved_placement", "improved_plan", "frontier")
BUDGET = 0.8


def training(cache_dir: Path | None, **options: Any) -> tuple[olla.Plan, list[Tensor]]:
    """The plan of a step that has settled, and the losses and parameters that it made."""
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(32, 32), nn.Tanh(), nn.Dropout(0.1))))
    x, y = torch.randn(256, 32), torch.randint(0, 32, (256,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with olla.optimize(
        model, x, loss_fn=F.cross_entropy, targets=y, optimizer=optimizer, cache_dir=cache_dir, **options
    ) as step:
        losses = [step(x, targets=y) for _ in range(8)]
        assert step._current.settled
        return step.plan, [*losses, *(p.detach() for p in model.parameters())]


def timeless(plan: olla.Plan) -> olla.Plan:
    """The plan without what depends on how long ops take."""
    return replace(plan, extra_seconds=0.0, extra_seconds_lower_bound=0.0)


@contextmanager
def searches() -> Iterator[list[str]]:
    """The planners that are called meanwhile, one after the other."""
    called: list[str] = []

    def spy(name: str) -> Any:
        planner = getattr(planning, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return planner(*args, **kwargs)

        return mock.patch.object(planning, name, call)

    with ExitStack() as stack:
        for name in PLANNERS:
            stack.enter_context(spy(name))
        yield called


class CacheTestCase(EagerTestCase):
    def setUp(self) -> None:
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name) / "plans"


class SecondStartTest(CacheTestCase):
    """The first start plans, the second one finds everything."""

    def check(self, **options: Any) -> olla.Plan:
        with searches() as first:
            plan, results = training(self.folder, **options)
        self.assertIn("schedule", first)
        self.assertIn("pack", first)
        with searches() as second, self.assertNoLogs("olla", "WARNING"):
            again, same = training(self.folder, **options)
        self.assertEqual(second, [])
        self.assertEqual(timeless(again), timeless(plan))
        self.assert_same(same, results, "losses and parameters")
        self.assert_same(training(None, **options)[1], results, "losses and parameters, without a cache")
        return again

    def test_without_a_budget(self) -> None:
        self.check()

    def test_within_a_budget(self) -> None:
        again = self.check(memory_budget=BUDGET)
        self.assertTrue(again.recomputed)
        self.assertGreater(again.extra_seconds, 0)

    def test_with_spilling(self) -> None:
        with mock.patch.object(planning, "measured_bandwidth", return_value=Bandwidth(1e15, 1e15)):
            again = self.check(memory_budget=BUDGET, spill_dir=self.folder.parent)
        self.assertTrue(again.spills)

    def test_in_another_process(self) -> None:
        plan, results = training(self.folder, memory_budget=BUDGET)
        script = (
            "import sys, cache_test, pathlib, hashlib\n"
            "with cache_test.searches() as called:\n"
            "    plan, results = cache_test.training(pathlib.Path(sys.argv[1]), memory_budget=cache_test.BUDGET)\n"
            "print(called, cache_test.fingerprint(plan, results))"
        )
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE), *sys.path])}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script, str(self.folder)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        self.assertEqual(done.stdout, f"[] {fingerprint(plan, results)}\n", done.stderr)

    def test_planning_alone_and_own_steps(self) -> None:
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8)), torch.randn(4, 8)
        optimizer = torch.optim.SGD(model.parameters())

        def train(x: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = model(x).sum()
            loss.backward()
            optimizer.step()
            return loss

        def plans() -> tuple[olla.Plan, olla.Plan]:
            step = olla.optimize_step(train, (x,), model=model, optimizer=optimizer, cache_dir=self.folder)
            return olla.plan(model, x, optimizer=optimizer, memory_budget=0.9, cache_dir=self.folder), step.plan

        with searches() as called:
            first = plans()
        self.assertIn("place", called)
        with searches() as called:
            self.assertEqual(plans(), first)  # seconds are estimated, and so the same: claims of them are, too
        self.assertEqual(called, [])


class KeyTest(CacheTestCase):
    """What makes another plan."""

    def planned(self, width: int = 64, **options: Any) -> list[str]:
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(8, width), nn.GELU(), nn.Linear(width, 8)), torch.randn(4, 8)
        with searches() as called:
            olla.plan(model.train(), x, cache_dir=self.folder, **options)
        return called

    def test_another_graph_or_option_is_another_plan(self) -> None:
        self.planned()
        self.assertEqual(self.planned(), [])
        self.assertIn("schedule", self.planned(width=65))
        self.assertNotIn("schedule", self.planned(reorder=False))
        self.assertIn("fitted", self.planned(memory_budget="1GiB"))
        self.assertEqual(self.planned(memory_budget=2**30), [])  # the same in bytes
        with mock.patch("olla.cache.__version__", "another"):
            self.assertIn("schedule", self.planned())

    def test_a_plan_that_a_short_limit_cut_off_is_searched_again_with_a_longer_one(self) -> None:
        with mock.patch.object(planning, "_is_best", return_value=False):
            self.assertIn("schedule", self.planned(time_limit=1))
            self.assertEqual(self.planned(time_limit=1), [])
            self.assertEqual(self.planned(time_limit=0.5), [])
            self.assertIn("schedule", self.planned(time_limit=2))
            self.assertEqual(self.planned(time_limit=1), [])

    def test_the_best_plan_is_not_searched_again(self) -> None:
        self.planned(time_limit=1)
        self.assertEqual(self.planned(time_limit=2), [])


class FrontierTest(CacheTestCase):
    """A curve is kept as a whole."""

    def frontier(self, **options: Any) -> olla.Frontier:
        torch.manual_seed(0)
        model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(16, 16), nn.Tanh())))
        return olla.frontier(model.train(), torch.randn(64, 16), cache_dir=self.folder, **{"points": 3, **options})

    def test_the_second_time_it_is_found(self) -> None:
        with searches() as called:
            first = self.frontier()
        self.assertEqual(called, ["schedule", "frontier"])
        self.assertGreater(len(first.schedules), 2)
        with searches() as called, self.assertNoLogs("olla", "WARNING"):
            self.assertEqual(self.frontier(), first)
            self.assertEqual(self.frontier(time_limit=30), first)
        self.assertEqual(called, [])

    def test_another_question_is_another_curve(self) -> None:
        self.frontier()
        for options in ({"points": 2}, {"time_limit": 90}, {"spill_dir": self.folder.parent}):
            with self.subTest(options=options), searches() as called:
                self.frontier(**options)
            self.assertEqual(called, ["schedule", "frontier"])

    def test_with_another_disk_the_same_schedules_are_told_anew_what_they_take(self) -> None:
        def at(speed: float) -> olla.Frontier:
            with mock.patch.object(planning, "measured_bandwidth", return_value=Bandwidth(speed, speed)):
                return self.frontier(spill_dir=self.folder.parent)

        fast = at(1e15)
        self.assertTrue(fast.schedules[-1].spills)
        with searches() as called:
            slow = at(1e9)
        self.assertEqual(called, [])
        for before, after in zip(fast.schedules, slow.schedules, strict=True):
            self.assertEqual((before.order, before.spills), (after.order, after.spills))
            self.assertEqual(after.extra_seconds_lower_bound, 0)
        self.assertGreater(slow.schedules[-1].extra_seconds, fast.schedules[-1].extra_seconds)

    def test_what_is_not_true_is_found_anew(self) -> None:
        good = self.frontier()
        (path,) = self.folder.iterdir()
        plans = json.loads(path.read_text())["found"]["plans"]
        for bad in (
            None,
            [],
            [None],
            plans[::-1],
            [plans[0], plans[0]],
            [{**plans[0], "peak_bytes": plans[0]["peak_bytes"] - 1}],
            [{**plans[0], "order": plans[0]["order"][::-1]}],
        ):
            entry = json.loads(path.read_text())
            found = {**entry["found"], "plans": bad}
            path.write_text(json.dumps({**entry, "found": found, "digest": digest(found)}))
            with searches() as called, self.assertLogs("olla", "WARNING") as logs:
                again = self.frontier()
            self.assertEqual(called, ["schedule", "frontier"])
            self.assertEqual([s.order for s in again.schedules], [s.order for s in good.schedules])
            self.assertIn(str(path), logs.output[0])


class TimesTest(CacheTestCase):
    def test_a_plan_found_for_other_seconds_is_told_anew_what_it_takes(self) -> None:
        graph, seconds = diamond(), [1.0] * 6
        budget = planning.Options(memory_budget=2**20, cache=Cache(self.folder))
        schedule = planning.program_order(graph)
        twice = replace(schedule, order=(*schedule.order[:1], *schedule.order), extra_seconds=9.0)
        repeated = olla.Plan.of(graph, replace(twice, extra_seconds_lower_bound=8.0))
        peak = planning.peak_bytes(graph, repeated.order)
        repeated = replace(repeated, peak_bytes=peak)
        kept = [planning._planned(graph, s, budget, "order", lambda: repeated) for s in (seconds, seconds, [2.0] * 6)]
        self.assertEqual(kept[:2], [repeated, repeated])
        self.assertEqual((kept[2].extra_seconds, kept[2].extra_seconds_lower_bound), (2.0, 0.0))


class BadFilesTest(CacheTestCase):
    """Whatever is in the folder: a warning that names the file, the same plan, and a good file in the end."""

    @classmethod
    def setUpClass(cls) -> None:
        model, x = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8)).train(), torch.randn(4, 8)
        cls.graph = olla.to_graph(model, x)

    def plan(self, **wanted: Any) -> olla.Plan:
        graph, options = self.graph, planning.Options(cache=Cache(self.folder), **wanted)
        seconds = [1.0] * len(graph.ops)
        plan = planning._planned(
            graph, seconds, options, "order", lambda: olla.Plan.of(graph, planning._ordered(graph, seconds, options))
        )
        return planning._planned(
            graph, seconds, options, "addresses", lambda: planning._placed(graph, plan, options), plan
        )

    def check(self, path: Path) -> None:
        with searches() as called, self.assertLogs("olla", "WARNING") as logs:
            self.assertEqual(replace(self.plan(), seconds=0.0), replace(self.good, seconds=0.0))
        self.assertTrue(called)
        self.assertIn(str(path), logs.output[0])
        with searches() as called, self.assertNoLogs("olla", "WARNING"):
            self.plan()
        self.assertEqual(called, [])

    def setUp(self) -> None:
        super().setUp()
        self.good = self.plan()
        self.files = sorted(self.folder.iterdir())
        self.assertEqual(len(self.files), 2)

    def edit(self, path: Path, **changes: Any) -> None:
        """Change the plan in a file, as somebody would who knows the format."""
        entry = json.loads(path.read_text())
        entry["found"]["plan"] |= changes
        path.write_text(json.dumps({**entry, "digest": digest(entry["found"])}))

    def test_what_is_no_entry(self) -> None:
        for path in self.files:
            text = path.read_bytes()
            for bad in (
                b"",
                b"\xff",
                text[:-20],
                b"[]",
                b"{}",
                b"[" * 100_000,
                b"9" * 10_000,
                text.replace(b'"time_limit": null', b'"time_limit": "long"'),
                text.replace(b'"lower_bound_bytes": ', b'"lower_bound_bytes": 1'),
                (self.files[0] if path == self.files[1] else self.files[1]).read_bytes(),
            ):
                with self.subTest(bad=bad[:20]):
                    path.write_bytes(bad)
                    self.check(path)

    def test_what_is_too_large(self) -> None:
        with open(self.files[0], "ab") as file:
            file.truncate(2**26 + 1)
        self.check(self.files[0])

    def test_what_is_no_file(self) -> None:
        self.files[0].unlink()
        os.mkfifo(self.files[0])  # to read it would wait for ever
        self.check(self.files[0])

    def test_plans_that_are_not_true(self) -> None:
        for path in self.files:
            plan = json.loads(path.read_text())["found"]["plan"]
            for changes in (
                {"order": plan["order"][::-1]},
                {"order": plan["order"][1:]},
                {"order": [*plan["order"], 10**9]},
                {"order": None},
                {"peak_bytes": plan["peak_bytes"] - 1},
                {"graph_digest": "another"},
                {"spills": [[0, 0, 1]]},
            ):
                with self.subTest(changes=changes):
                    self.edit(path, **changes)
                    self.check(path)

    def test_addresses_that_overlap(self) -> None:
        path = next(path for path in self.files if json.loads(path.read_text())["found"]["plan"]["offsets"])
        offsets = json.loads(path.read_text())["found"]["plan"]["offsets"]
        self.edit(path, offsets=[None if offset is None else 0 for offset in offsets])
        self.check(path)

    def test_a_found_thing_of_another_form(self) -> None:
        for found in (None, [], {}, {"plan": 3, "times": None}):
            entry = json.loads(self.files[0].read_text())
            self.files[0].write_text(json.dumps({**entry, "found": found, "digest": digest(found)}))
            with self.subTest(found=found):
                self.check(self.files[0])

    def test_a_plan_beyond_the_budget_is_not_used(self) -> None:
        budget = self.good.persistent_bytes + self.good.peak_bytes
        planned = self.plan(memory_budget=budget)
        (path, *_) = [
            path
            for path in set(self.folder.iterdir()) - set(self.files)
            if json.loads(path.read_text())["key"]["what"] == "order"
        ]
        larger = self.plan(reorder=False)
        self.assertGreater(larger.peak_bytes, planned.peak_bytes)
        self.edit(path, order=larger.order, peak_bytes=larger.peak_bytes)
        with searches() as called, self.assertLogs("olla", "WARNING") as logs:
            self.assertEqual(self.plan(memory_budget=budget).order, planned.order)
        self.assertIn("schedule", called)
        self.assertIn(str(path), logs.output[0])

    def test_a_plan_beyond_the_budget_is_not_kept(self) -> None:
        graph, options = diamond(), planning.Options(memory_budget=1, cache=Cache(self.folder))
        plan = olla.Plan.of(graph, planning.program_order(graph))
        self.assertEqual(planning._planned(graph, [1.0] * 6, options, "order", lambda: plan), plan)
        self.assertEqual(sorted(self.folder.iterdir()), self.files)


class PlacementTest(CacheTestCase):
    intervals = ((0, 4, 64), (1, 3, 128), (3, 6, 100), (4, 5, 0))
    good = Placement((0, 64, 64, 0), 192, 192, "by hand", 0.5)

    def test_a_good_one(self) -> None:
        verify_placement(self.intervals, self.good, alignment=64)
        self.assertEqual(Placement.from_dict(json.loads(json.dumps(self.good.to_dict()))), self.good)

    def test_bad_ones(self) -> None:
        for bad, said in (
            (replace(self.good, offsets=(0, 64, 64)), "3 offsets for 4 buffers"),
            (replace(self.good, offsets=(0, 0, 64, 0)), "buffers 0 and 1 are there together"),
            (replace(self.good, offsets=(64, 0, 128, 0)), "buffers 1 and 0|buffers 0 and 1"),
            (replace(self.good, offsets=(0, 65, 64, 0)), "buffer 1 is at 65"),
            (replace(self.good, offsets=(-64, 64, 64, 0)), "buffer 0 is at -64"),
            (replace(self.good, arena_bytes=191), "191 bytes, and at least 192, claimed, but 192 and 192 needed"),
            (replace(self.good, lower_bound_bytes=1), "192 and 192 needed"),
        ):
            with self.subTest(said=said), self.assertRaisesRegex(olla.InvalidPlanError, said):
                verify_placement(self.intervals, bad, alignment=64)

    def test_what_is_no_placement(self) -> None:
        good = self.good.to_dict()
        for bad in ([], {}, {**good, "offsets": ["0"]}, {**good, "arena_bytes": 1.5}, {**good, "seconds": "1"}):
            with self.assertRaises(olla.InvalidPlanError):
                Placement.from_dict(bad)

    def test_what_is_kept_is_checked(self) -> None:
        options = planning.Options(cache=Cache(self.folder))
        found = planning._packed(self.intervals, 64, options)
        (path,) = self.folder.iterdir()
        entry = json.loads(path.read_text())
        entry["found"]["offsets"] = [0, 0, 0, 0]
        path.write_text(json.dumps({**entry, "digest": digest(entry["found"])}))
        with searches() as called, self.assertLogs("olla", "WARNING") as logs:
            again = planning._packed(self.intervals, 64, options)
        self.assertEqual((called, again.offsets), (["pack"], found.offsets))
        self.assertIn(str(path), logs.output[0])
        with searches() as called:
            planning._packed(self.intervals, 64, options)
        self.assertEqual(called, [])


class FolderTest(CacheTestCase):
    def test_it_is_made_and_the_tilde_is_the_home(self) -> None:
        with mock.patch.dict(os.environ, {"HOME": str(self.folder)}):
            cache = Cache("~/a/b")
            cache.keep({"what": "it"}, None, {"a": [1, 2]})
        self.assertEqual([path.parent for path in self.folder.rglob("*.json")], [self.folder / "a" / "b"])
        self.assertEqual(cache.find({"what": "it"}, 1.0, dict), {"a": [1, 2]})

    def test_a_folder_that_cannot_be_is_an_error_at_once(self) -> None:
        self.folder.write_text("in the way")
        model, x = nn.Linear(2, 2), torch.randn(1, 2)
        before = copy.deepcopy(model.state_dict())
        for bad in (self.folder, self.folder / "below", "/proc/plans", "a\0b", 3):
            with (
                self.subTest(bad=bad),
                mock.patch.object(planning, "capture", side_effect=AssertionError("captured")),
                self.assertRaisesRegex(CacheError, "^cache_dir is"),
            ):
                olla.optimize(model, x, cache_dir=bad)  # type: ignore[arg-type]
        self.assert_same(model.state_dict(), before, "model")

    def test_a_disk_that_is_full_later_is_a_warning(self) -> None:
        cache = Cache(self.folder)
        full = OSError(28, "No space left on device")
        for failing in ("os.replace", "tempfile.mkstemp"):
            with mock.patch(failing, side_effect=full), self.assertLogs("olla", "WARNING") as logs:
                cache.keep({"what": "it"}, None, {})
            self.assertIn(str(cache.path({"what": "it"})), logs.output[0])
            self.assertEqual(list(self.folder.iterdir()), [])

    def test_a_folder_that_is_gone_later_is_a_warning(self) -> None:
        cache = Cache(self.folder)
        self.folder.rmdir()
        self.assertIsNone(cache.find({}, 1.0, dict))
        with self.assertLogs("olla", "WARNING"):
            cache.keep({}, None, {})

    def test_processes_that_write_the_same_leave_one_good_file(self) -> None:
        script = (
            "import sys; from olla.cache import Cache; c = Cache(sys.argv[1])\n"
            "for _ in range(200):\n"
            "    c.keep({'what': 'it'}, None, {'a': [7] * 5000})\n"
            "    assert c.find({'what': 'it'}, 1.0, dict) == {'a': [7] * 5000}\n"
        )
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])}
        command = [sys.executable, "-c", script, str(self.folder)]
        started = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) for _ in range(3)]
        self.assertEqual([process.communicate()[1] for process in started], [b""] * 3)
        self.assertEqual(len(list(self.folder.iterdir())), 1)


def fingerprint(plan: olla.Plan, results: list[Tensor]) -> str:
    """Of a plan, without what depends on how long ops take, and of all bits of results."""
    bits = [result.numpy().tobytes() for result in results]
    return hashlib.sha256(b"".join([repr(timeless(plan)).encode(), *bits])).hexdigest()


if __name__ == "__main__":
    unittest.main()
