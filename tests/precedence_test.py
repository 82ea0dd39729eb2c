"""Precedences that follow from a target, against every order of small graphs."""

from __future__ import annotations

import unittest

from graphs import diamond, graphs, legal_orders
from hypothesis import given, settings
from hypothesis import strategies as st

from olla import Graph
from olla.graph.lifetimes import peak_bytes
from olla.order.bounds import must_live
from olla.order.precedence import Precedence, TooLateError
from olla.order.problem import Problem

FOREVER = float("inf")


class PrecedenceTest(unittest.TestCase):
    @settings(max_examples=100)
    @given(graphs(max_ops=6), st.data())
    def test_what_follows_holds_in_every_order_within_the_target(self, graph: Graph, data: st.DataObject) -> None:
        precedence = Precedence(Problem.of(graph))
        peaks = {order: peak_bytes(graph, order) for order in legal_orders(graph)}
        target = data.draw(st.integers(min(peaks.values()) - 2, max(peaks.values())))
        within = [order for order, peak in peaks.items() if peak <= target]
        if not precedence.propagate(target, FOREVER):
            self.assertEqual(within, [])
            self.assertGreaterEqual(min(peaks.values()), precedence.evidence)
            self.assertGreater(precedence.evidence, target)
            return
        for order in within:
            for first, second in precedence.pairs:
                full = (*order, len(graph.ops))
                self.assertLess(full.index(first), full.index(second))

    @given(graphs(), st.data())
    def test_what_is_certain_stays_true_while_pairs_are_added(self, graph: Graph, data: st.DataObject) -> None:
        problem = Problem.of(graph)
        precedence = Precedence(problem)
        self.assertEqual(precedence.alive.tolist(), must_live(problem).tolist())
        ops = st.integers(0, problem.op_count - 1)
        for first, second in data.draw(st.lists(st.tuples(ops, ops), max_size=4)):
            if precedence.precedes(first, second) or precedence.precedes(second, first):
                continue
            twin = precedence.copy()
            self.assertTrue(precedence.require(first, second))
            self.assertTrue(precedence.precedes(first, second))
            self.assertFalse(precedence.require(second, first))
            precedence.pairs.pop()
            self.assertFalse(twin.precedes(first, second))
            anew = Precedence(problem)
            for pair in precedence.pairs:
                anew.require(*pair)
            self.assertEqual(anew.alive.tolist(), precedence.alive.tolist())

    def test_the_evidence_says_for_which_targets_a_refutation_holds(self) -> None:
        # `widen` needs 14 bytes, so 10 are refuted, and with the same argument all below 14. 15 is the optimum.
        precedence = Precedence(Problem.of(diamond()))
        self.assertFalse(precedence.propagate(10, FOREVER))
        self.assertEqual(precedence.evidence, 14)
        self.assertTrue(Precedence(Problem.of(diamond())).propagate(15, FOREVER))

    def test_propagation_ends_at_its_deadline(self) -> None:
        with self.assertRaises(TooLateError):
            Precedence(Problem.of(diamond())).propagate(15, deadline=0.0)
