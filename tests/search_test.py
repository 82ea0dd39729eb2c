"""Branch and bound, and large-neighbourhood search, against the optimum."""

from __future__ import annotations

import sys
import unittest

from graphs import diamond, graphs, is_legal, optimum
from hypothesis import given, settings
from hypothesis import strategies as st

from olla import Graph
from olla.order.improve import improved
from olla.order.portfolio import list_schedules, peak
from olla.order.problem import Problem
from olla.order.search import search

FOREVER = float("inf")


class SearchTest(unittest.TestCase):
    @settings(max_examples=200)
    @given(graphs(), st.data())
    def test_a_target_is_reached_or_refuted(self, graph: Graph, data: st.DataObject) -> None:
        problem = Problem.of(graph)
        best = max(optimum(graph), sum(problem.sizes[problem.touches.row(len(graph.ops))]))
        target = data.draw(st.integers(best - 3, best + 3))
        answer = search(problem, target, nodes=sys.maxsize, deadline=FOREVER)
        if target < best:
            self.assertTrue(target < answer.bound <= best)
        else:
            self.assertLessEqual(answer.peak, target)
            self.assertEqual(answer.bound, 0)
        if answer.order is not None:
            self.assertTrue(is_legal(graph, answer.order[:-1].tolist()))
            self.assertEqual(peak(problem, answer.order), answer.peak)

    def test_it_gives_up_after_its_nodes_and_at_its_deadline(self) -> None:
        problem = Problem.of(diamond())
        self.assertEqual(search(problem, 14, nodes=0, deadline=FOREVER).bound, 0)
        self.assertEqual(search(problem, 13, nodes=1, deadline=FOREVER).bound, 0)
        self.assertEqual(search(problem, 13, nodes=99, deadline=0.0).bound, 0)
        self.assertEqual(search(problem, 13, nodes=99, deadline=FOREVER).bound, 14)


class ImproveTest(unittest.TestCase):
    @given(graphs())
    def test_an_order_never_gets_worse_and_stays_legal(self, graph: Graph) -> None:
        problem = Problem.of(graph)
        for _, order in list_schedules(problem):
            better = improved(problem, order, FOREVER)
            self.assertTrue(is_legal(graph, better[:-1].tolist()))
            self.assertLessEqual(peak(problem, better), peak(problem, order))
