"""Branch and bound, and the windows of the large-neighbourhood search, against the optimum."""

from __future__ import annotations

import sys
import unittest

import numpy as np
from graphs import diamond, graphs, is_legal, optimum
from hypothesis import given, settings
from hypothesis import strategies as st

from olla import Graph
from olla.order.improve import improved, window
from olla.order.portfolio import list_schedules, peak, profile
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
    @given(graphs(), st.data())
    def test_a_window_is_the_problem_of_ordering_its_steps(self, graph: Graph, data: st.DataObject) -> None:
        problem = Problem.of(graph)
        order = data.draw(st.sampled_from([order for _, order in list_schedules(problem)]))
        start = data.draw(st.integers(0, len(order) - 1))
        end = data.draw(st.integers(start + 1, len(order)))
        small = window(problem, order, start, end)
        self.assertEqual(
            profile(small, np.arange(small.op_count))[1:-1].tolist(), profile(problem, order)[start:end].tolist()
        )
        for _, inner in list_schedules(small):
            self.assertEqual((inner[0], inner[-1]), (0, small.op_count - 1))
            whole = np.concatenate([order[:start], order[start:end][inner[1:-1] - 1], order[end:]])
            self.assertTrue(is_legal(graph, whole[:-1].tolist()))
            self.assertEqual(profile(small, inner)[1:-1].tolist(), profile(problem, whole)[start:end].tolist())

    @given(graphs())
    def test_an_order_never_gets_worse_and_stays_legal(self, graph: Graph) -> None:
        problem = Problem.of(graph)
        for _, order in list_schedules(problem):
            better = improved(problem, order, FOREVER)
            self.assertTrue(is_legal(graph, better[:-1].tolist()))
            self.assertLessEqual(peak(problem, better), peak(problem, order))
