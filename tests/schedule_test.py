"""The compiled planners against plain Python and brute force."""

from __future__ import annotations

import unittest

import numpy as np
from graphs import diamond, graphs, is_legal, legal_orders
from hypothesis import given, settings
from hypothesis import strategies as st

from olla import Graph, Storage
from olla.graph.lifetimes import memory_profile, peak_bytes
from olla.order import kernels
from olla.order.bounds import CutBound, must_live
from olla.order.precedence import Precedence, TooLateError
from olla.order.problem import Adjacency, Problem
from olla.order.schedule import _RULES, _improve, _list_schedule, program_order, schedule


def compiled_profile(problem: Problem, order: list[int]) -> list[int]:
    memory = kernels.profile(
        np.array(order),
        problem.creates.start,
        problem.creates.items,
        problem.touches.start,
        problem.touches.items,
        problem.sizes,
        problem.workspace,
    )
    return list(memory)


class ProblemTest(unittest.TestCase):
    def test_rows_come_back_from_an_adjacency(self) -> None:
        rows = [[2, 0], [], [1]]
        packed = Adjacency.of(rows)
        self.assertEqual([list(packed.items[a:b]) for a, b in zip(packed.start, packed.start[1:], strict=False)], rows)
        turned = packed.transpose(3)
        self.assertEqual(
            [list(turned.items[a:b]) for a, b in zip(turned.start, turned.start[1:], strict=False)], [[0], [2], [0]]
        )

    @given(graphs(), st.data())
    def test_the_compiled_profile_equals_the_reference(self, graph: Graph, data: st.DataObject) -> None:
        order = list(range(len(graph.ops)))
        for op in data.draw(st.lists(st.sampled_from(order), max_size=3)):
            order.insert(data.draw(st.integers(op + 1, len(order))), op)  # run it again, later
        profile = compiled_profile(Problem.of(graph), [*order, len(graph.ops)])
        self.assertEqual(tuple(profile[:-1]), memory_profile(graph, order))


class ScheduleTest(unittest.TestCase):
    @given(graphs())
    def test_every_rule_gives_a_legal_order(self, graph: Graph) -> None:
        problem = Problem.of(graph)
        for rule in _RULES.values():
            forwards = _list_schedule(problem, rule)
            backwards = _list_schedule(problem.reversed(), rule)[::-1]
            improved = _improve(problem, forwards, 0, 3)
            for order in (forwards, backwards, improved):
                self.assertEqual(order[-1], len(graph.ops))
                self.assertTrue(is_legal(graph, list(order[:-1])))
            self.assertLessEqual(max(compiled_profile(problem, improved)), max(compiled_profile(problem, forwards)))

    @given(graphs())
    def test_the_schedule_is_legal_says_its_true_peak_and_beats_program_order(self, graph: Graph) -> None:
        found = schedule(graph)
        self.assertTrue(is_legal(graph, found.order))
        self.assertEqual(found.peak_bytes, peak_bytes(graph, found.order))
        self.assertLessEqual(found.peak_bytes, peak_bytes(graph, range(len(graph.ops))))

    @settings(max_examples=60)
    @given(graphs(max_ops=6))
    def test_bound_is_below_the_optimum_and_the_optimum_below_the_schedule(self, graph: Graph) -> None:
        best = min(peak_bytes(graph, order) for order in legal_orders(graph))
        found = schedule(graph)
        self.assertLessEqual(found.lower_bound_bytes, best)
        self.assertLessEqual(best, found.peak_bytes)

    @settings(max_examples=60)
    @given(graphs(max_ops=6))
    def test_must_live_is_alive_at_its_op_in_every_order(self, graph: Graph) -> None:
        bound = must_live(Problem.of(graph))
        for order in legal_orders(graph):
            for step, size in enumerate(memory_profile(graph, order)):
                self.assertLessEqual(bound[order[step]], size)

    @settings(max_examples=60)
    @given(graphs(max_ops=6))
    def test_the_cut_bound_is_alive_at_its_op_in_every_order_and_above_must_live(self, graph: Graph) -> None:
        problem = Problem.of(graph)
        cuts = [CutBound(problem).at(op) for op in range(problem.op_count)]
        for cut, live in zip(cuts, must_live(problem), strict=True):
            self.assertGreaterEqual(cut, live)
        for order in legal_orders(graph):
            for step, size in enumerate(memory_profile(graph, order)):
                self.assertLessEqual(cuts[order[step]], size)

    def test_the_cut_bound_stays_a_bound_where_sizes_exceed_32_bits(self) -> None:
        large = 2**40 + 1
        storages = tuple(Storage(s.name, s.size * large, s.persistent) for s in diamond().storages)
        problem = Problem.of(Graph(diamond().ops, storages, diamond().outputs))
        self.assertEqual([CutBound(problem).at(op) // large for op in range(6)], [4, 14, 5, 12, 4, 2])

    @settings(max_examples=60)
    @given(graphs(max_ops=6), st.data())
    def test_precedences_hold_in_every_order_within_the_target(self, graph: Graph, data: st.DataObject) -> None:
        problem = Problem.of(graph)
        peaks = {order: peak_bytes(graph, order) for order in legal_orders(graph)}
        target = data.draw(st.integers(min(peaks.values()) - 2, max(peaks.values())))
        precedence = Precedence.of(problem).within(target, float("inf"))
        within = [order for order, peak in peaks.items() if peak <= target]
        if precedence is None:
            self.assertEqual(within, [])
            return
        for order in within:
            place = {op: step for step, op in enumerate((*order, len(graph.ops)))}
            for later, earlier in zip(*np.nonzero(precedence.before), strict=True):
                self.assertLessEqual(place[earlier], place[later])
        restricted = precedence.restricted()
        for rule in _RULES.values():
            self.assertTrue(is_legal(graph, list(_list_schedule(restricted, rule)[:-1])))

    def test_propagation_ends_at_its_deadline(self) -> None:
        with self.assertRaises(TooLateError):
            Precedence.of(Problem.of(diamond())).within(15, deadline=0.0)

    @given(graphs())
    def test_the_same_graph_gives_the_same_schedule(self, graph: Graph) -> None:
        self.assertEqual(schedule(graph).order, schedule(graph).order)

    def test_of_equal_orders_program_order_is_kept(self) -> None:
        found = schedule(diamond())
        self.assertEqual((found.method, found.peak_bytes), ("program order", 15))

    def test_program_order_can_be_asked_for(self) -> None:
        found = program_order(diamond())
        self.assertEqual((found.order, found.peak_bytes), (tuple(range(6)), 15))

    def test_the_bounds_of_the_diamond(self) -> None:
        # While `widen` runs, `start` and `wide` are in memory: 14 bytes, whatever the order.
        problem = Problem.of(diamond())
        self.assertEqual(must_live(problem).max(), 14)
        # While `shrink` runs, `start` is still there or `narrow` is there already: 10 + 1 + 1 bytes at least.
        self.assertEqual([CutBound(problem).at(op) for op in range(6)], [4, 14, 5, 12, 4, 2])
        self.assertEqual(schedule(diamond()).lower_bound_bytes, 15)

    def test_an_empty_graph(self) -> None:
        found = schedule(Graph((), ()))
        self.assertEqual((found.order, found.peak_bytes, found.lower_bound_bytes), ((), 0, 0))

    def test_no_time_still_gives_a_schedule(self) -> None:
        self.assertTrue(is_legal(diamond(), schedule(diamond(), time_limit=0.0).order))
