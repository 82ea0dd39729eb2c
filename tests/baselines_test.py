"""The orders of PyTorch Inductor, for comparison: legal, and by the rules."""

from __future__ import annotations

import unittest

from graphs import diamond, graphs, is_legal
from hypothesis import given

from olla import Graph, schedule
from olla.graph.lifetimes import peak_bytes
from olla.order.baselines import INDUCTOR, breadth_first, depth_first, least_peak_memory_first


class BaselinesTest(unittest.TestCase):
    @given(graphs())
    def test_their_orders_are_legal_and_never_better(self, graph: Graph) -> None:
        found = schedule(graph)
        for rule in INDUCTOR.values():
            self.assertTrue(is_legal(graph, rule(graph)))
            self.assertLessEqual(found.peak_bytes, peak_bytes(graph, rule(graph)))

    def test_the_rules_on_the_diamond(self) -> None:
        # 0 begin; 1 widen (+10), 2 narrow (+1); 3 shrink after 1; 4 join; 5 update
        self.assertEqual(least_peak_memory_first(diamond()), (0, 2, 1, 3, 4, 5))
        self.assertEqual(breadth_first(diamond()), (0, 1, 2, 3, 4, 5))
        # `update` touches least, so that all it needs is asked for first; of the inputs of `join`, `narrow` (5 < 11).
        self.assertEqual(depth_first(diamond()), (0, 2, 1, 3, 4, 5))
