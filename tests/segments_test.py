"""Parts of an order that can be ordered on their own."""

from __future__ import annotations

import unittest
from itertools import pairwise

import numpy as np
from graphs import graphs, is_legal, legal_orders, tangled
from hypothesis import given
from hypothesis import strategies as st

from olla import Graph, Op, Storage, schedule
from olla.order.portfolio import list_schedules, profile
from olla.order.problem import Problem
from olla.order.segments import segments, window, with_window


class SegmentsTest(unittest.TestCase):
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
            whole = with_window(order, start, end, inner)
            self.assertTrue(is_legal(graph, whole[:-1].tolist()))
            self.assertEqual(profile(small, inner)[1:-1].tolist(), profile(problem, whole)[start:end].tolist())

    @given(graphs(max_ops=6))
    def test_a_segment_holds_the_same_ops_in_every_order(self, graph: Graph) -> None:
        parts = segments(Problem.of(graph))
        for (_, end), (start, _) in pairwise(parts):
            self.assertLessEqual(end - 1, start)
        orders = [(*order, len(graph.ops)) for order in legal_orders(graph)]
        for start, end in parts:
            self.assertEqual(len({frozenset(order[start:end]) for order in orders}), 1)
        inside = {step for start, end in parts for step in range(start, end)}
        for step in set(range(len(graph.ops) + 1)) - inside:
            self.assertEqual(len({order[step] for order in orders}), 1)

    def test_two_tangles_in_a_row_are_solved_one_by_one(self) -> None:
        first, second = tangled(25, seed=1), tangled(25, seed=2)
        both = chained(first, second)
        self.assertGreater(len(segments(Problem.of(both))), 1)
        found = schedule(both)
        self.assertEqual(found.lower_bound_bytes, found.peak_bytes)
        self.assertEqual(found.peak_bytes, max(schedule(first).peak_bytes, schedule(second).peak_bytes))


def chained(first: Graph, second: Graph) -> Graph:
    """One graph after the other: between them is an op of no size that all of both wait for."""
    count, shift = len(first.storages), len(first.storages) + 1
    later = (
        Op(op.name, tuple(s + shift for s in op.creates), (count, *(s + shift for s in op.reads))) for op in second.ops
    )
    tokens = tuple(Storage(f"token of {op.name}", 0) for op in first.ops)
    base = shift + len(second.storages)
    earlier = (Op(op.name, (*op.creates, base + i), op.reads) for i, op in enumerate(first.ops))
    barrier = Op("barrier", reads=tuple(range(base, base + len(tokens))), creates=(count,))
    storages = (*first.storages, Storage("barrier", 0), *second.storages, *tokens)
    return Graph((*earlier, barrier, *later), storages)
