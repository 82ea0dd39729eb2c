"""Lower bounds against every order of small graphs."""

from __future__ import annotations

import unittest

from graphs import diamond, graphs, legal_orders, optimum
from hypothesis import given, settings
from hypothesis import strategies as st

from olla import Graph, Op, Storage
from olla.graph.lifetimes import memory_profile
from olla.order.bounds import CutBound, alike, must_live, set_cut
from olla.order.problem import Problem


class BoundsTest(unittest.TestCase):
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

    @settings(max_examples=100)
    @given(graphs(max_ops=7), st.data())
    def test_the_cut_of_a_set_is_below_the_optimum(self, graph: Graph, data: st.DataObject) -> None:
        problem = Problem.of(graph)
        ops = alike(problem, data.draw(st.integers(0, len(graph.ops))))
        self.assertLessEqual(set_cut(problem, ops, 0), max(optimum(graph), must_live(problem).max()))

    def test_of_ops_that_are_alike_not_all_can_run_cheaply(self) -> None:
        # Three branches, from 4 bytes over 4 others to 1: each could be the last to shrink, when the others are small.
        storages = [Storage(f"wide {i}", 4) for i in range(3)]
        ops = [Op("begin", creates=(0, 1, 2))]
        for branch in range(3):
            turned, small = len(storages), len(storages) + 1
            storages += [Storage(f"turned {branch}", 4), Storage(f"small {branch}", 1)]
            ops.append(Op(f"turn {branch}", creates=(turned,), reads=(branch,)))
            ops.append(Op(f"shrink {branch}", creates=(small,), reads=(turned,), workspace=4))
        graph = Graph(tuple(ops), tuple(storages), outputs=(4, 6, 8))
        problem = Problem.of(graph)
        shrinks = alike(problem, 2)
        self.assertEqual(shrinks, [2, 4, 6])
        self.assertEqual(CutBound(problem).at(2), 1 + 1 + 4 + 1 + 4)
        self.assertEqual(set_cut(problem, shrinks, 0), 4 + 4 + 4 + 1 + 4)  # the first of them
        self.assertEqual(optimum(graph), 17)
        self.assertEqual(set_cut(problem, shrinks, 99), 99)  # no more than what is known already

    def test_the_bounds_of_the_diamond(self) -> None:
        # While `widen` runs, `start` and `wide` are in memory: 14 bytes, whatever the order.
        problem = Problem.of(diamond())
        self.assertEqual(must_live(problem).max(), 14)
        # While `shrink` runs, `start` is still there or `narrow` is there already: 10 + 1 + 1 bytes at least.
        self.assertEqual([CutBound(problem).at(op) for op in range(6)], [4, 14, 5, 12, 4, 2])

    def test_the_cut_bound_stays_a_bound_where_sizes_exceed_32_bits(self) -> None:
        large = 2**40 + 1
        storages = tuple(Storage(s.name, s.size * large, s.persistent) for s in diamond().storages)
        problem = Problem.of(Graph(diamond().ops, storages, diamond().outputs))
        self.assertEqual([CutBound(problem).at(op) // large for op in range(6)], [4, 14, 5, 12, 4, 2])
