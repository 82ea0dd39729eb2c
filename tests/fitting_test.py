"""Recomputation within a byte budget: sound, within it, and seldom dearer than the exact optimum on small graphs."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import unittest
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from unittest import mock

import numpy as np
from fit_form_test import chain, least_bytes
from graphs import diamond
from ilp_test import random_graph

import olla
from olla import Graph, InfeasibleError, Op, Plan, Schedule, Storage
from olla.fit.fitting import Fitting, fitted
from olla.fit.frontier import frontier
from olla.fit.moment import Moments
from olla.fit.program import as_sequence, completed, program_of, simulated
from olla.fit.repair import is_needed, peak_of, unrolled, uses_in
from olla.fit.spill import Bandwidth
from olla.graph.check import verify
from olla.ilp import fit
from olla.solve import available

CASES = 20 if os.environ.get("RUN_SKIPPED") else 10  # pairs of small graphs


def training(layers: int, *, in_place: bool = False, drops: bool = False) -> Graph:
    """Forward, backward and updates of a chain of layers, some of which write in place or draw random numbers."""
    storages = [Storage("random generator", 0, persistent=True), Storage("x0", 0, persistent=True)]
    storages += [Storage(f"weight {i}", 3, persistent=True) for i in range(layers)]
    ops: list[Op] = []
    acts = [1]
    for i in range(layers):
        made = len(storages)
        storages.append(Storage(f"x{i + 1}", 8))
        random_op = {"writes": (0,), "writes_once": (0,)} if drops and i % 2 else {}
        ops.append(Op(f"layer {i}", creates=(made,), reads=(acts[-1], 2 + i), workspace=2, **random_op))
        if in_place and i % 3 == 0:
            ops.append(Op(f"activation {i}", writes=(made,)))
        acts.append(made)
    gradient = len(storages)
    storages.append(Storage("gradient of the loss", 8))
    ops.append(Op("loss", creates=(gradient,), reads=(acts[-1],)))
    for i in reversed(range(layers)):
        back, of_weight = len(storages), len(storages) + 1
        storages += [Storage(f"gradient {i}", 8), Storage(f"gradient of weight {i}", 3)]
        ops.append(Op(f"backward {i}", creates=(back, of_weight), reads=(gradient, acts[i], acts[i + 1], 2 + i)))
        ops.append(Op(f"update {i}", reads=(of_weight,), writes=(2 + i,)))
        gradient = back
    return Graph(tuple(ops), tuple(storages))


def tight_cases(draw: random.Random) -> Iterator[tuple[Graph, Schedule, list[float], int]]:
    """Small graphs, their best orders, seconds of ops, and budgets below the peaks of these."""
    while True:
        graph = random_graph(draw, draw.randint(4, 7))
        start, least = olla.schedule(graph), least_bytes(graph)
        if least < start.peak_bytes:
            seconds = [float(draw.randint(1, 9)) for _ in graph.ops]
            yield graph, start, seconds, draw.randint(least, start.peak_bytes - 1)


class FittingTest(unittest.TestCase):
    def test_training_of_a_chain_fits_into_every_budget_down_to_the_smallest(self) -> None:
        for options in ({}, {"in_place": True}, {"drops": True}, {"in_place": True, "drops": True}):
            graph = training(12, **options)
            start, seconds = olla.schedule(graph), [1.0] * len(graph.ops)
            work = Fitting(graph, start, seconds)
            with self.assertRaises(InfeasibleError) as caught:
                work.within(0)
            least = caught.exception.best_bytes
            self.assertLess(least, start.peak_bytes // 2)
            for budget in (least, (least + start.peak_bytes) // 2, start.peak_bytes - 1):
                found = work.within(budget)
                self.assertLessEqual(found.peak_bytes, budget)
                self.assertEqual(found.extra_seconds, float(len(found.order) - len(graph.ops)))
                verify(graph, Plan.of(graph, found))
            with self.assertRaisesRegex(InfeasibleError, "bytes, not 1"):
                work.within(1)

    def test_the_smallest_budget_that_an_error_names_may_be_what_one_op_needs(self) -> None:
        seen = 0
        for graph, start, seconds, _ in islice(tight_cases(random.Random(0)), 3 * CASES):
            work, least = Fitting(graph, start, seconds), least_bytes(graph)
            with self.assertRaises(InfeasibleError) as caught:
                work.within(least - 1)
            named = caught.exception.best_bytes
            self.assertLessEqual(work.within(named, time_limit=0.0).peak_bytes, named)
            try:
                Fitting(graph, start, seconds).within(least, time_limit=1.0)
            except InfeasibleError:
                continue
            self.assertEqual(named, least)
            seen += 1
        self.assertGreater(seen, CASES // 2)

    def test_the_smallest_budget_that_an_error_names_can_be_had_whatever_was_asked(self) -> None:
        graphs = [training(layers, drops=True) for layers in (5, 9, 14)]
        graphs += [graph for graph, *_ in islice(tight_cases(random.Random(3)), CASES)]
        for graph in graphs:
            start, seconds = olla.schedule(graph), [1.0] * len(graph.ops)
            with self.subTest(graph=graph), self.assertRaises(InfeasibleError) as caught:
                Fitting(graph, start, seconds).within(0)
            named = caught.exception.best_bytes
            self.assertLessEqual(Fitting(graph, start, seconds).within(named, time_limit=2.0).peak_bytes, named)
            with self.assertRaises(InfeasibleError) as caught:
                Fitting(graph, start, seconds).within(named - 1)
            self.assertEqual(named, caught.exception.best_bytes)

    def test_an_error_says_whether_time_was_over(self) -> None:
        graph = training(12)
        work = Fitting(graph, olla.schedule(graph), [1.0] * len(graph.ops))
        with self.assertRaisesRegex(InfeasibleError, "time was over"):
            work.within(0, time_limit=0.0)
        with self.assertRaisesRegex(InfeasibleError, r"needs \d+\)$"):
            work.within(0)

    @unittest.skipUnless(os.environ.get("RUN_SKIPPED"), "compiles the planners anew: RUN_SKIPPED=1 runs it")
    def test_compiling_is_not_counted(self) -> None:
        code = (
            "import sys; sys.path.append(sys.argv[1])\n"
            "from fitting_test import Fitting, olla, training\n"
            "from graphs import tangled\n"
            "graph = training(12)\n"
            "start = olla.schedule(graph, time_limit=5)\n"
            "work = Fitting(graph, start, [1.0] * len(graph.ops))\n"
            "print(work.within(start.peak_bytes // 2, time_limit=5).peak_bytes <= start.peak_bytes // 2)\n"
            "other = olla.schedule(tangled(16, 1), time_limit=5)\n"
            "print(other.peak_bytes == other.lower_bound_bytes)"
        )
        with tempfile.TemporaryDirectory() as fresh:
            environment = {**os.environ, "NUMBA_CACHE_DIR": fresh}
            command = [sys.executable, "-W", "ignore", "-c", code, str(Path(__file__).parent)]
            found = subprocess.run(command, env=environment, capture_output=True, text=True)
        self.assertEqual((found.stdout, found.returncode), ("True\nTrue\n", 0), found.stderr)

    def test_a_curve_falls(self) -> None:
        graph = training(16, in_place=True)
        found = frontier(graph, olla.schedule(graph), [1.0] * len(graph.ops), points=8)
        self.assertGreater(len(found.schedules), 4)
        for one, other in pairwise(found.schedules):
            self.assertLess(other.peak_bytes, one.peak_bytes)
            self.assertGreaterEqual(other.extra_seconds, one.extra_seconds)
            verify(graph, Plan.of(graph, other))

    def test_updates_wait_for_their_own_gradient_though_all_read_the_same(self) -> None:
        storages = [Storage("x", 10), Storage("learning rate", 4, persistent=True)]
        storages += [Storage(f"weight {i}", 10, persistent=True) for i in range(3)]
        storages += [Storage(f"gradient {i}", 10) for i in range(3)]
        ops = [Op("x", creates=(0,)), *(Op(f"backward {i}", reads=(0,), creates=(5 + i,)) for i in (2, 1, 0))]
        ops += [Op(f"update {i}", reads=(5 + i, 1), writes=(2 + i,)) for i in range(3)]
        ops += [Op("decay", writes=(1,)), Op("log", reads=(1,), writes=(2,))]  # these wait for all that read or write
        program = program_of(Graph(tuple(ops), tuple(storages)))
        whole, _ = completed(program, as_sequence(program, range(len(ops))))
        names = [ops[op].name for op in whole]
        expected = [name for i in (2, 1, 0) for name in (f"backward {i}", f"update {i}")]
        self.assertEqual(names, ["x", *expected, "decay", "log"])
        self.assertTrue(simulated(program, whole)[0])

    def test_what_fits_is_left_alone(self) -> None:
        start = olla.schedule(diamond())
        self.assertIs(fitted(diamond(), start, [1.0] * 6, start.peak_bytes), start)

    def test_a_chain_is_recomputed_as_the_integer_program_does(self) -> None:
        found = fitted(chain(), olla.schedule(chain()), [1.0] * 8, 16)
        self.assertEqual((found.peak_bytes, found.extra_seconds), (16, 1.0))

    def test_the_same_graph_gives_the_same_sequence(self) -> None:
        graph = training(20)
        start = olla.schedule(graph)
        budget = start.peak_bytes * 2 // 3
        first, second = (fitted(graph, start, [1.0] * len(graph.ops), budget) for _ in range(2))
        self.assertEqual(first.order, second.order)

    def test_what_is_known_is_where_the_search_begins(self) -> None:
        graph, draw = training(30, in_place=True), random.Random(1)
        start, seconds = olla.schedule(graph), [float(draw.randint(1, 9)) for _ in graph.ops]
        budget = start.peak_bytes // 3
        known = fitted(graph, start, seconds, budget)
        hasty = fitted(graph, start, seconds, budget, time_limit=0.0)
        again = fitted(graph, start, seconds, budget, known=known, time_limit=0.0)
        self.assertLess(known.extra_seconds, hasty.extra_seconds)
        self.assertLessEqual(again.extra_seconds, known.extra_seconds)
        verify(graph, Plan.of(graph, again))

    def test_what_is_needed_cannot_be_taken_out(self) -> None:
        needed = seen = 0
        small = islice(tight_cases(random.Random(3)), 30)
        chains = [training(8, in_place=True, drops=drops) for drops in (False, True)]
        starts = [(graph, olla.schedule(graph), [1.0] * len(graph.ops)) for graph in chains]
        large = [(*start, start[1].peak_bytes * 2 // 3) for start in starts]
        for number, (graph, start, seconds, budget) in enumerate([*small, *large]):
            program = program_of(graph)
            work = Fitting(graph, start, seconds, bandwidth=Bandwidth(9.0, 9.0) if number % 2 else None)
            try:
                work.within(budget)
            except InfeasibleError:
                continue
            for _, peak, sequence in work._found:
                if not simulated(program, completed(program, sequence)[0])[0]:
                    continue  # a start that is not sound
                uses = uses_in(program, sequence)
                for place in range(len(sequence)):
                    fits = peak_of(program, np.delete(sequence, place)) <= max(peak, budget)
                    needs = is_needed(program, sequence, uses, place, max(peak, budget))
                    self.assertFalse(needs and fits, (graph, sequence, place))
                    needed, seen = needed + needs, seen + (not fits)
        self.assertGreater(needed, seen // 2)

    def test_what_cannot_be_made_again_is_kept_for_ops_that_do_not_depend_on_the_moment(self) -> None:
        storages = (Storage("random generator", 0, persistent=True), *(Storage(name, 8) for name in "abcd"))
        draw = Op("draw", creates=(1,), writes=(0,))
        for drawn in ([draw], [draw, Op("scale what was drawn", writes=(1,))]):
            moment = Op("moment", creates=(2,))
            read = Op("read what was drawn", creates=(3,), reads=(1,))
            ops = (*drawn, moment, read, Op("join", creates=(4,), reads=(2, 3)))
            found = self.unrolled_at(Graph(ops, storages, outputs=(4,)), ops.index(moment))
            self.assertEqual(found, list(range(len(ops))))

    def test_what_is_made_along_with_what_an_update_needs_does_not_spoil_it(self) -> None:
        storages = (Storage("weight", 8, persistent=True), *(Storage(name, 8) for name in ("gw", "gx", "b", "c")))
        ops = (
            Op("backward", creates=(1, 2)),
            Op("accumulate", writes=(1,)),
            Op("moment", creates=(3,)),
            Op("read gx", creates=(4,), reads=(2, 3)),
            Op("update", reads=(1,), writes=(0,)),
        )
        self.assertEqual(self.unrolled_at(Graph(ops, storages, outputs=(4,)), 2), [0, 1, 2, 0, 3, 1])

    def test_what_others_read_that_need_not_come_later_is_kept_for_them(self) -> None:
        storages = tuple(Storage(name, 8) for name in "abcd")
        ops = (
            Op("make", creates=(0,)),
            Op("moment", creates=(1,)),
            Op("read", creates=(2,), reads=(0,)),
            Op("join", creates=(3,), reads=(1, 2)),
        )
        depending = (ops[0], Op("moment", creates=(1,)), Op("read", creates=(2,), reads=(0, 1)), ops[3])
        for ops_of_graph, spared in ((ops, [0, 1, 2, 3]), (depending, [0, 1, 0, 2, 3])):
            moments = Moments(program_of(Graph(ops_of_graph, storages, outputs=(3,))), np.ones(8))
            kept = (moments.program.maker == 1)[None]
            asked = (np.arange(4), np.array([1]), kept, np.zeros_like(kept))
            self.assertEqual(moments.unrolled(*asked).tolist(), [0, 1, 0, 2, 3])
            self.assertEqual(moments.unrolled(*asked, moments.before).tolist(), spared)

    def unrolled_at(self, graph: Graph, place: int) -> list[int]:
        """Program order, without late ops, in which only what the op at a place makes is kept there; it is sound."""
        program = program_of(graph)
        kept = (program.maker == place)[None]
        order = as_sequence(program, range(len(graph.ops)))
        sequence = unrolled(program, order, np.array([place]), kept, np.zeros_like(kept))
        self.assertTrue(simulated(program, completed(program, sequence)[0])[0])
        return list(map(int, sequence))

    @unittest.skipUnless("cpsat" in available(), "CP-SAT is not installed")
    def test_small_graphs_cost_seldom_more_than_the_optimum(self) -> None:
        cases = tight_cases(random.Random(1))
        seen = optimal = proven = 0
        while seen < 2 * CASES:
            graph, start, seconds, budget = next(cases)
            try:
                best = fit(graph, budget, seconds, repeats=4, solver="cpsat")
            except InfeasibleError:
                with self.assertRaises(InfeasibleError):
                    fitted(graph, start, seconds, budget)
                continue
            if best.extra_seconds == 0:
                continue
            seen += 1
            try:
                found = fitted(graph, start, seconds, budget)
            except InfeasibleError:
                continue
            verify(graph, Plan.of(graph, found))
            self.assertGreaterEqual(found.extra_seconds, best.extra_seconds - 1e-6)
            self.assertLessEqual(found.extra_seconds_lower_bound, best.extra_seconds + 1e-6)
            proven += found.extra_seconds_lower_bound > best.extra_seconds / 2
            optimal += found.extra_seconds < best.extra_seconds + 1e-6
        self.assertGreaterEqual(optimal, CASES)
        self.assertGreaterEqual(proven, 3 * CASES // 10)

    @unittest.skipUnless("cpsat" in available(), "CP-SAT is not installed")
    def test_spilling_and_recomputing_cost_seldom_more_than_the_optimum(self) -> None:
        draw = random.Random(2)
        cases = tight_cases(draw)
        seen = optimal = spilling = 0
        while seen < 2 * CASES:
            graph, start, seconds, budget = next(cases)
            speed = float(draw.randint(1, 9))
            try:
                best = fit(graph, budget, seconds, repeats=4, bytes_per_second=speed, solver="cpsat")
                found = fitted(graph, start, seconds, budget, bandwidth=Bandwidth(speed, speed))
            except InfeasibleError:
                continue
            seen += 1
            verify(graph, Plan.of(graph, found))
            self.assertLessEqual(found.peak_bytes, budget)
            self.assertGreaterEqual(found.extra_seconds, best.extra_seconds - 1e-6)
            self.assertLessEqual(found.extra_seconds_lower_bound, best.extra_seconds + 1e-6)
            optimal += found.extra_seconds < best.extra_seconds + 1e-6
            spilling += bool(found.spills)
        self.assertGreaterEqual(optimal, CASES)
        self.assertGreaterEqual(spilling, 2 * CASES // 5)

    def test_what_is_known_gets_its_bound_and_is_not_improved(self) -> None:
        graph = training(24, in_place=True)
        start, seconds = olla.schedule(graph), [1.0] * len(graph.ops)
        budget = start.peak_bytes * 3 // 5
        best, dear = fitted(graph, start, seconds, budget), fitted(graph, start, seconds, budget * 3 // 4)
        self.assertGreater(dear.extra_seconds, best.extra_seconds)
        with mock.patch.object(Fitting, "_improve", side_effect=AssertionError):
            found = fitted(graph, start, seconds, budget, known=dear, improve=False)
        verify(graph, Plan.of(graph, found))
        self.assertLessEqual(found.peak_bytes, budget)
        self.assertGreater(found.extra_seconds, best.extra_seconds)
        self.assertLessEqual(found.extra_seconds_lower_bound, best.extra_seconds)
        self.assertGreaterEqual(found.extra_seconds_lower_bound, best.extra_seconds_lower_bound)

    def test_the_bound_of_a_chain_is_close(self) -> None:
        graph = training(24, in_place=True)
        start, seconds = olla.schedule(graph), [1.0] * len(graph.ops)
        for share in (4, 3, 2):
            found = fitted(graph, start, seconds, start.peak_bytes * share // 5)
            self.assertGreater(found.extra_seconds_lower_bound, 0.0)
            self.assertLessEqual(found.extra_seconds_lower_bound, found.extra_seconds)
            self.assertLessEqual(found.extra_seconds - found.extra_seconds_lower_bound, 3.0)
