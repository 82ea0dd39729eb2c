"""What is best at several moments together: never more than the optimum, and sometimes more than at one moment."""

from __future__ import annotations

import os
import random
import unittest
from collections.abc import Iterator

import numpy as np
from fit_form_test import least_added_time, least_bytes
from ilp_test import random_graph

import olla
from olla import Graph
from olla.fit.cases import Cases
from olla.fit.joint import jointly
from olla.fit.moment import Moments
from olla.fit.program import as_sequence, program_of

GRAPHS = 800 if os.environ.get("RUN_SKIPPED") else 150
_REPEATS = 3


def problems(draw: random.Random) -> Iterator[tuple[Graph, int, Moments, float]]:
    """Small graphs, budgets below the peaks of their best orders, their moments, and the least time that is added."""
    for _ in range(GRAPHS):
        graph = random_graph(draw, draw.randint(4, 7))
        least, best = least_bytes(graph), olla.schedule(graph).peak_bytes
        if least >= best:
            continue
        budget, per_byte = draw.randint(least, best - 1), draw.choice([None, 1, 4])
        times = [draw.randint(1, 9) for _ in graph.ops]
        expected = least_added_time(graph, budget, times, _REPEATS, per_byte)
        if expected is None:
            continue
        program = program_of(graph)
        sizes = np.repeat(program.sizes, np.diff(program.maker_start))
        loads = sizes * (np.inf if per_byte is None else per_byte)
        yield graph, budget, Moments(program, np.concatenate([times, np.maximum(loads, 1e-6)]).astype(float)), expected


class JointTest(unittest.TestCase):
    def test_no_sequence_takes_less_time_than_the_bound(self) -> None:
        draw = random.Random(3)
        tight = higher = 0
        for graph, budget, moments, expected in problems(draw):
            alone = [moments.at(op, budget).seconds for op in range(len(graph.ops))]
            for _ in range(4):
                ops = self.chain(draw, moments)
                found = jointly(moments, ops, budget, moments.before)
                with self.subTest(graph=graph, ops=ops.tolist()):
                    self.assertLessEqual(found.seconds, expected + 1e-4)
                    self.assertGreaterEqual(found.seconds, max(alone[op] for op in ops) * (1 - 2e-3) - 1e-2)
                tight += 0 < expected <= found.seconds + 1e-2
                higher += found.seconds > max(alone) + 0.5
        self.assertGreater(tight, GRAPHS // 40)
        self.assertGreater(higher, 0)

    def test_cases_do_not_lose_what_only_one_order_can_do(self) -> None:
        tight = divided = higher = 0
        for graph, budget, moments, expected in problems(random.Random(5)):
            orders = [as_sequence(moments.program, olla.schedule(graph).order)]
            cases = Cases(moments, orders, budget, moments.dearest(orders[0], budget))
            before = cases.bound
            for _ in range(6):
                with self.subTest(graph=graph):
                    self.assertLessEqual(cases.bound, expected + 1e-4)
                if not cases.refine():
                    break
                divided += 1
            higher += cases.bound > before + 0.5
            tight += 0 < expected <= cases.bound + 1e-2
        self.assertGreater(divided, GRAPHS // 20)
        self.assertGreater(tight, GRAPHS // 40)
        self.assertGreater(higher, 0)

    def chain(self, draw: random.Random, moments: Moments) -> np.ndarray:
        """Ops that precede one another."""
        chosen: list[int] = []
        for op in draw.sample(range(len(moments.of_op)), len(moments.of_op)):
            if len(chosen) < 4 and all(moments.before[op, c] or moments.before[c, op] for c in chosen):
                chosen.append(op)
        return np.array(sorted(chosen))


if __name__ == "__main__":
    unittest.main()
