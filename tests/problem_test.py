"""Graphs as flat arrays, and the compiled memory profile against plain Python."""

from __future__ import annotations

import unittest

import numpy as np
from graphs import diamond, graphs
from hypothesis import given
from hypothesis import strategies as st

from olla import Graph
from olla.graph.lifetimes import memory_profile
from olla.order.portfolio import profile
from olla.order.problem import Adjacency, Problem


class ProblemTest(unittest.TestCase):
    def test_rows_come_back_from_an_adjacency(self) -> None:
        rows = [[2, 0], [], [1]]
        packed = Adjacency.of(rows)
        self.assertEqual([packed.row(i).tolist() for i in range(3)], rows)
        self.assertEqual(packed.owners.tolist(), [0, 0, 2])
        turned = packed.transpose(3)
        self.assertEqual([turned.row(i).tolist() for i in range(3)], [[0], [2], [0]])

    @given(graphs(), st.data())
    def test_the_compiled_profile_equals_the_reference(self, graph: Graph, data: st.DataObject) -> None:
        order = list(range(len(graph.ops)))
        for op in data.draw(st.lists(st.sampled_from(order), max_size=3)):
            order.insert(data.draw(st.integers(op + 1, len(order))), op)  # run it again, later
        memory = profile(Problem.of(graph), np.array([*order, len(graph.ops)]))
        self.assertEqual(tuple(memory[:-1]), memory_profile(graph, order))

    @given(graphs())
    def test_time_can_run_backwards(self, graph: Graph) -> None:
        problem = Problem.of(graph)
        backwards = problem.reversed()
        for op in range(problem.op_count):
            for before in backwards.predecessors.row(op):
                self.assertIn(op, problem.predecessors.row(before))
                self.assertLess(backwards.priority[before], backwards.priority[op])
        again = backwards.reversed()
        self.assertEqual(again.priority.tolist(), problem.priority.tolist())
        self.assertEqual(again.predecessors.items.tolist(), problem.predecessors.items.tolist())

    def test_pairs_are_added_to_the_precedences(self) -> None:
        problem = Problem.of(diamond()).with_pairs([(2, 1)])
        self.assertEqual(problem.predecessors.row(1).tolist(), [0, 2])
        self.assertEqual(problem.successors.row(2).tolist(), [4, 1])
