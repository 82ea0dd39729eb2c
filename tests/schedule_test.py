"""Schedules: legal, true, optimal on small graphs, and close to program order."""

from __future__ import annotations

import os
import unittest
from unittest import mock

import numpy as np
from graphs import diamond, graphs, is_legal, optimum, tangled
from hypothesis import given, settings

from olla import Graph, Op, Storage
from olla.graph.lifetimes import memory_profile, peak_bytes
from olla.order.portfolio import flattened, list_schedules, peak, profile, settled
from olla.order.problem import Problem
from olla.order.schedule import program_order, schedule


class ScheduleTest(unittest.TestCase):
    @settings(max_examples=1000 if os.environ.get("RUN_SKIPPED") else 400)
    @given(graphs(max_ops=9))
    def test_small_graphs_are_solved(self, graph: Graph) -> None:
        found = schedule(graph)
        self.assertTrue(is_legal(graph, found.order))
        self.assertEqual(found.peak_bytes, max(memory_profile(graph, found.order)))
        self.assertEqual(found.peak_bytes, optimum(graph))
        self.assertEqual(found.lower_bound_bytes, found.peak_bytes)

    @given(graphs())
    def test_every_list_schedule_is_legal(self, graph: Graph) -> None:
        for _, order in list_schedules(Problem.of(graph)):
            self.assertEqual(order[-1], len(graph.ops))
            self.assertTrue(is_legal(graph, order[:-1].tolist()))

    @given(graphs())
    def test_the_same_graph_gives_the_same_schedule(self, graph: Graph) -> None:
        self.assertEqual(schedule(graph).order, schedule(graph).order)

    @given(graphs())
    def test_settling_keeps_the_peak_and_moves_towards_program_order(self, graph: Graph) -> None:
        problem = Problem.of(graph)
        for _, order in list_schedules(problem):
            closer = settled(problem, order)
            self.assertTrue(is_legal(graph, closer[:-1].tolist()))
            self.assertLessEqual(peak(problem, closer), peak(problem, order))
            self.assertLessEqual(inversions(closer), inversions(order))

    @given(graphs())
    def test_flattening_lowers_the_highest_first(self, graph: Graph) -> None:
        problem = Problem.of(graph)
        for _, order in list_schedules(problem):
            flatter = flattened(problem, order)
            self.assertTrue(is_legal(graph, flatter[:-1].tolist()))
            before, after = (sorted(profile(problem, found).tolist(), reverse=True) for found in (order, flatter))
            self.assertLess((after, flatter.tolist() != order.tolist()), (before, True))

    def test_ops_wait_until_less_is_in_memory_with_what_needs_them(self) -> None:
        # "work" and its user need not run while the large one is there.
        storages = (Storage("large", 100), Storage("given", 2), Storage("result", 1))
        ops = (
            Op("begin", creates=(0, 1)),
            Op("work", reads=(1,), creates=(2,), workspace=10),
            Op("use the result", reads=(2,)),
            Op("use the large one", reads=(0,)),
        )
        problem = Problem.of(Graph(ops, storages))
        self.assertEqual(profile(problem, np.arange(5)).tolist(), [102, 113, 101, 100, 0])
        flatter = flattened(problem, np.arange(5))
        self.assertEqual(flatter.tolist(), [0, 3, 1, 2, 4])
        self.assertEqual(profile(problem, flatter).tolist(), [102, 102, 13, 1, 0])

    def test_where_memory_is_not_scarce_ops_run_in_program_order(self) -> None:
        # Only the large storage makes a peak; the two small ones need not be dropped early.
        storages = (Storage("large", 100), *(Storage(f"small {i}", 1) for i in range(2)))
        ops = (
            Op("begin", creates=(1, 2)),
            Op("work", creates=(0,)),
            Op("use small 0", reads=(1,)),
            Op("use small 1", reads=(2,)),
        )
        problem = Problem.of(Graph(ops, storages))
        self.assertEqual(settled(problem, np.array([0, 3, 2, 1, 4])).tolist(), [0, 2, 3, 1, 4])
        self.assertEqual(profile(problem, np.array([0, 2, 3, 1, 4])).tolist(), [2, 2, 1, 100, 0])

    def test_program_order_is_kept_if_it_is_as_good(self) -> None:
        found = schedule(diamond())
        self.assertEqual((found.method, found.peak_bytes), ("program order", 15))

    def test_program_order_can_be_asked_for(self) -> None:
        found = program_order(diamond())
        self.assertEqual((found.order, found.peak_bytes), (tuple(range(6)), 15))

    def test_an_empty_graph(self) -> None:
        found = schedule(Graph((), ()))
        self.assertEqual((found.order, found.peak_bytes, found.lower_bound_bytes), ((), 0, 0))

    def test_no_time_still_gives_a_schedule(self) -> None:
        graph = tangled(40, seed=1)
        found = schedule(graph, time_limit=0.0)
        self.assertEqual(found.peak_bytes, peak_bytes(graph, found.order))
        self.assertLessEqual(found.peak_bytes, peak_bytes(graph, range(len(graph.ops))))

    def test_an_interruption_gives_the_best_so_far(self) -> None:
        graph = tangled(40, seed=1)
        full = schedule(graph)
        self.assertEqual(full.lower_bound_bytes, full.peak_bytes)
        with mock.patch("olla.order.schedule._Search._narrow", side_effect=KeyboardInterrupt) as interrupted:
            found = schedule(graph)
        interrupted.assert_called_once()
        self.assertTrue(is_legal(graph, found.order))
        self.assertEqual(found.peak_bytes, peak_bytes(graph, found.order))
        self.assertLess(found.lower_bound_bytes, full.peak_bytes)


def inversions(order: np.ndarray) -> int:
    """Pairs that are not in program order."""
    return sum(int((order[step + 1 :] < order[step]).sum()) for step in range(len(order)))
