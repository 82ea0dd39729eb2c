"""Random moves of a walk: what they leave is sound, and what exceeds a budget is moved away where that is possible."""

from __future__ import annotations

import random
import unittest
from collections.abc import Iterator

import numpy as np
from ilp_test import random_graph

import olla
from olla import Graph, InfeasibleError, Op, Schedule, Storage
from olla.fit.fitting import fitted
from olla.fit.moves import changed, cleared, moved
from olla.fit.program import Program, as_sequence, completed, program_of, simulated, with_loads
from olla.fit.repair import excess_of, peak_of
from olla.fit.spill import Bandwidth
from olla.graph.lifetimes import peak_bytes

GRAPHS = 60


def pairs() -> Graph:
    """Two large storages, made one after the other, of each of which one byte is wanted."""
    ops = (Op("a", (0,)), Op("b", (1,)), Op("of a", (2,), (0,)), Op("of b", (3,), (1,)))
    return Graph(ops, (Storage("a", 8), Storage("b", 8), Storage("of a", 1), Storage("of b", 1)), outputs=(2, 3))


def sequences(draw: random.Random) -> Iterator[tuple[Program, np.ndarray]]:
    """Small graphs, and sequences of these, some with repeats and loads."""
    for _ in range(GRAPHS):
        graph = random_graph(draw, draw.randint(4, 9))
        program, start = program_of(graph), olla.schedule(graph)
        yield program, as_sequence(program, start.order)
        try:
            found = fitted(graph, start, [1.0] * len(graph.ops), start.peak_bytes - 1, bandwidth=Bandwidth(9, 9))
        except InfeasibleError:
            continue
        yield program, with_loads(program, found.order, found.spills)


class MovesTest(unittest.TestCase):
    def test_what_must_not_be_passed_goes_along(self) -> None:
        program = program_of(pairs())
        order = np.arange(4)
        self.assertEqual([0, 2, 1, 3], moved(program, order, 1, 2).tolist())
        self.assertEqual([1, 3, 0, 2], moved(program, order, 0, 3).tolist())
        self.assertEqual([1, 3, 0, 2], moved(program, order, 3, 0).tolist())
        self.assertEqual([0, 1, 2, 3], moved(program, order, 1, 1).tolist())
        self.assertEqual([1, 3, 0, 2], moved(program, order, 3, -9).tolist(), "no farther than to the first place")

    def test_moves_keep_a_sequence_sound(self) -> None:
        draw, others = random.Random(1), 0
        for program, sequence in sequences(draw):
            for _ in range(20):
                place, target = draw.randrange(len(sequence)), draw.randrange(len(sequence))
                found = moved(program, sequence, place, target)
                with self.subTest(sequence=sequence.tolist(), place=place, target=target):
                    self.assertEqual(sorted(sequence), sorted(found))
                    self.assertTrue(simulated(program, completed(program, found)[0])[0])
                others += found.tolist() != sequence.tolist()
        self.assertGreater(others, 10 * GRAPHS)

    def test_clearing_never_adds_to_what_exceeds_a_budget(self) -> None:
        draw, less = np.random.default_rng(2), 0
        for program, sequence in sequences(random.Random(2)):
            mixed = changed(program, sequence, np.ones(len(program.workspace)), draw)
            before = excess_of(program, mixed, budget := peak_of(program, sequence) - 1)[0]
            after = excess_of(program, cleared(program, mixed, budget, draw), budget)[0]
            self.assertLessEqual(after, before)
            less += after < before
        self.assertGreater(less, GRAPHS // 10)

    def test_what_another_order_has_room_for_takes_no_time(self) -> None:
        graph = pairs()
        program = program_of(graph)
        found = cleared(program, np.arange(4), 10, np.random.default_rng(0))
        self.assertLessEqual(peak_of(program, found), 10)
        order = tuple(range(4))
        start = Schedule(order, peak_bytes(graph, order), 0, "not the best order", 0.0)
        self.assertEqual(0.0, fitted(graph, start, [1.0] * 4, 10).extra_seconds)


if __name__ == "__main__":
    unittest.main()
