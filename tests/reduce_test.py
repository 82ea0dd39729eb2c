"""Merging ops keeps the optimum."""

from __future__ import annotations

import unittest

import numpy as np
from graphs import graphs, is_legal, optimum
from hypothesis import given, settings

from olla import Graph, Op, Storage
from olla.order.bounds import must_live
from olla.order.portfolio import list_schedules, peak
from olla.order.problem import Problem
from olla.order.reduce import Reduced


class ReduceTest(unittest.TestCase):
    @settings(max_examples=200)
    @given(graphs())
    def test_orders_of_runs_are_orders_of_ops_with_the_same_peak(self, graph: Graph) -> None:
        problem = Problem.of(graph)
        reduced = Reduced.of(problem).merged()
        for _, order in list_schedules(reduced.problem):
            expanded = reduced.expanded(order)
            self.assertTrue(is_legal(graph, expanded[:-1].tolist()))
            self.assertEqual(peak(problem, expanded), peak(reduced.problem, order))

    @settings(max_examples=200)
    @given(graphs(max_ops=7))
    def test_the_best_order_of_the_runs_is_a_best_order_of_the_ops(self, graph: Graph) -> None:
        reduced = Reduced.of(Problem.of(graph)).merged().problem
        best = min(peak(reduced, np.array(order)) for order in orders(reduced))
        self.assertEqual(best, max(optimum(graph), must_live(Problem.of(graph))[-1]))

    @given(graphs())
    def test_runs_in_program_order_need_no_more_than_program_order(self, graph: Graph) -> None:
        problem = Problem.of(graph)
        reduced = Reduced.of(problem).merged().problem
        self.assertLessEqual(peak(reduced, np.argsort(reduced.priority)), peak(problem, np.arange(problem.op_count)))

    def test_a_chain_becomes_one_op(self) -> None:
        storages = tuple(Storage(f"x{i}", 4 - i) for i in range(4))
        ops = (Op("op 0", creates=(0,)), *(Op(f"op {i}", creates=(i,), reads=(i - 1,)) for i in range(1, 4)))
        reduced = Reduced.of(Problem.of(Graph(ops, storages, outputs=(3,)))).merged()
        # Op 1 holds 4 + 3 bytes, op 0 only 4, the later ones less: all go with op 1.
        self.assertEqual([reduced.runs.row(i).tolist() for i in range(reduced.problem.op_count)], [[0, 1, 2, 3, 4]])
        self.assertEqual(must_live(reduced.problem).tolist(), [7])


def orders(problem: Problem, begun: tuple[int, ...] = ()):
    """Every order of a small problem."""
    if len(begun) == problem.op_count:
        yield begun
    for op in range(problem.op_count):
        if op not in begun and set(problem.predecessors.row(op).tolist()) <= set(begun):
            yield from orders(problem, (*begun, op))
