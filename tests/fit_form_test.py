"""Recomputing and spilling under a byte limit: the integer program against a search through all that can be done."""

from __future__ import annotations

import heapq
import os
import random
import unittest
from itertools import combinations, count

from ilp_test import random_graph

import olla
from olla import Graph, InfeasibleError, InvalidGraphError, Op, Plan, Storage
from olla.graph.check import verify
from olla.graph.plan import Spill
from olla.ilp import fit
from olla.place.place import place
from olla.solve import available

SOLVERS = available()
GRAPHS = 200 if os.environ.get("RUN_SKIPPED") else 40  # for each solver
_NANOSECOND = 1e-9


def least_bytes(graph: Graph) -> int:
    """What some op needs for itself, or the outputs together."""

    def size(storages: tuple[int, ...]) -> int:
        return sum(graph.storages[s].size for s in set(storages) if not graph.storages[s].persistent)

    return max(size(graph.outputs), *(size(op.touches) + op.workspace for op in graph.ops))


def least_added_time(graph: Graph, budget: int, times: list[int], repeats: int, per_byte: int | None) -> int | None:
    """Dijkstra's algorithm, over what has run, what is in each storage and what is in memory; None: nothing fits."""
    storages = graph.storages
    persistent = {index for index, storage in enumerate(storages) if storage.persistent}
    final, expected = [0] * len(storages), []
    for op in graph.ops:
        expected.append({s: final[s] for s in op.reads + op.writes})
        for s in op.creates + op.writes:
            final[s] += 1
    start = (frozenset[int](), (0,) * len(storages), frozenset[int](), 0)
    best, ticket = {start: 0}, count()
    queue = [(0, next(ticket), start)]
    end = None
    while queue:
        time, _, state = heapq.heappop(queue)
        if end is not None and time >= end:
            break
        done, versions, here, used = state
        if len(done) == len(graph.ops) and all(versions[s] == final[s] for s in graph.outputs):
            gone = sum(storages[s].size for s in set(graph.outputs) - persistent - here)
            if not gone or per_byte is not None:
                end = min(time + gone * (per_byte or 0), end if end is not None else 2**60)
        for index, op in enumerate(graph.ops):
            again = index in done
            if again and (used == repeats or persistent & {*op.writes}):
                continue
            if any(versions[s] != expected[index][s] for s in op.reads + op.writes):
                continue
            needed = {*op.reads, *op.writes} - persistent
            if needed - here and per_byte is None:
                continue
            moved = sum(storages[s].size for s in needed - here) * (per_byte or 0)
            needed |= {*op.creates}
            room = budget - op.workspace - sum(storages[s].size for s in needed)
            if room < 0:
                continue
            made = tuple(1 if s in op.creates else v + (s in op.writes) for s, v in enumerate(versions))
            rest = sorted(here - needed)
            fitting = [
                frozenset(kept)
                for number in range(len(rest), -1, -1)
                for kept in combinations(rest, number)
                if sum(storages[s].size for s in kept) <= room
            ]
            for kept in fitting:
                if not any(kept < more for more in fitting):
                    after = (done | {index}, made, frozenset(needed) | kept, used + again)
                    total = time + times[index] + moved
                    if total < best.get(after, 2**60):
                        best[after] = total
                        heapq.heappush(queue, (total, next(ticket), after))
    return None if end is None else end - sum(times)


def chain() -> Graph:
    """A forward pass of four layers and its backward pass, which reads the activations in reverse."""
    sizes = [("input", 0), ("a", 4), ("b", 4), ("c", 4), ("d", 4), ("gd", 4), ("gc", 4), ("gb", 4), ("ga", 4)]
    storages = tuple(Storage(name, size, persistent=name == "input") for name, size in sizes)
    ops = [Op(f"forward {i}", creates=(i,), reads=(i - 1,)) for i in range(1, 5)]
    ops += [Op("loss", creates=(5,), reads=(4,))]
    ops += [Op(f"backward {i}", creates=(5 + i,), reads=(4 + i, 4 - i)) for i in range(1, 4)]
    return Graph(tuple(ops), storages, outputs=(8,))


class FitTest(unittest.TestCase):
    @unittest.skipUnless(SOLVERS, "no solver is installed")
    def test_no_sequence_within_the_budget_takes_less_time(self) -> None:
        seen = {"fits as it is": 0, "takes time": 0, "does not fit": 0}
        for number, solver in enumerate(SOLVERS):
            draw = random.Random(number)
            for _ in range(GRAPHS):
                graph, budget = self.tight(draw, 5 if solver == "gurobi" else 6)  # its free licence is small
                times = [draw.randint(0, 9) for _ in graph.ops]
                repeats, per_byte = draw.randint(0, 3), draw.choice([None, 1, 4])
                expected = least_added_time(graph, budget, times, repeats, per_byte)
                seen["does not fit" if expected is None else "takes time" if expected else "fits as it is"] += 1
                with self.subTest(
                    solver=solver, graph=graph, budget=budget, times=times, repeats=repeats, per=per_byte
                ):
                    self.compare(graph, budget, times, repeats, per_byte, solver, expected)
        self.assertGreater(min(seen.values()), GRAPHS // 40, seen)

    def tight(self, draw: random.Random, ops: int) -> tuple[Graph, int]:
        """A graph, and a budget that no op exceeds alone, but the best order does."""
        while True:
            graph = random_graph(draw, draw.randint(3, ops))
            least, best = least_bytes(graph), olla.schedule(graph).peak_bytes
            if least < best:
                return graph, draw.randint(least, best - 1)

    def compare(
        self,
        graph: Graph,
        budget: int,
        times: list[int],
        repeats: int,
        per_byte: int | None,
        solver: str,
        expected: int | None,
    ) -> None:
        seconds = [time * _NANOSECOND for time in times]
        bandwidth = None if per_byte is None else 2 / (per_byte * _NANOSECOND)
        if expected is None:
            with self.assertRaisesRegex(InfeasibleError, f"no sequence with {repeats} repeats"):
                fit(graph, budget, seconds, repeats=repeats, bytes_per_second=bandwidth, solver=solver)
            return
        found = fit(graph, budget, seconds, repeats=repeats, bytes_per_second=bandwidth, solver=solver)
        added = [round(s / _NANOSECOND) for s in (found.extra_seconds, found.extra_seconds_lower_bound)]
        self.assertEqual(added, [expected, expected])
        self.assertLessEqual(found.peak_bytes, budget)
        verify(graph, Plan.of(graph, found, place(graph, found.order, found.spills)))

    @unittest.skipUnless("cpsat" in SOLVERS, "CP-SAT is not installed")
    def test_a_chain_is_recomputed_as_one_would_by_hand(self) -> None:
        graph = chain()
        self.assertEqual(olla.schedule(graph).peak_bytes, 20)
        found = fit(graph, 16, [1.0] * 8, solver="cpsat")
        self.assertEqual((found.peak_bytes, found.extra_seconds, found.extra_seconds_lower_bound), (16, 1.0, 1.0))
        self.assertEqual(len(found.order), 9)
        spilled = fit(graph, 16, [1.0] * 8, bytes_per_second=16.0, solver="cpsat")
        self.assertEqual((spilled.extra_seconds, spilled.order, len(spilled.spills)), (0.5, tuple(range(8)), 1))
        verify(graph, Plan.of(graph, spilled, place(graph, spilled.order, spilled.spills)))

    def test_what_fits_is_left_alone(self) -> None:
        found = fit(chain(), 20, [1.0] * 8)
        self.assertEqual((found.extra_seconds, found.spills, len(found.order)), (0.0, (), 8))

    def test_without_time_spilling_by_a_rule_is_the_answer(self) -> None:
        found = fit(chain(), 12, [1.0] * 8, repeats=0, bytes_per_second=8.0, time_limit=0)
        self.assertGreater(len(found.spills), 0)
        self.assertLessEqual(found.peak_bytes, 12)
        self.assertEqual(found.extra_seconds, sum(2 * 4 / 8.0 for _ in found.spills))
        verify(chain(), Plan.of(chain(), found))

    def test_without_time_recomputing_as_the_planner_does_is_the_answer(self) -> None:
        found = fit(chain(), 16, [1.0] * 8, time_limit=0)
        self.assertEqual((found.peak_bytes, found.extra_seconds), (16, 1.0))
        verify(chain(), Plan.of(chain(), found))

    def test_what_cannot_fit_is_named(self) -> None:
        with self.assertRaisesRegex(InfeasibleError, "op 'backward 1' alone needs 12 bytes") as caught:
            fit(chain(), 11, [1.0] * 8)
        self.assertEqual(caught.exception.lower_bound_bytes, 12)
        fit(chain(), caught.exception.best_bytes, [1.0] * 8)

    def test_bad_costs_are_named(self) -> None:
        with self.assertRaisesRegex(InvalidGraphError, "7 times for 8 ops"):
            fit(chain(), 16, [1.0] * 7)
        with self.assertRaisesRegex(InvalidGraphError, "'forward 2' takes nan seconds"):
            fit(chain(), 16, [1.0, float("nan"), *[1.0] * 6])
        with self.assertRaisesRegex(InvalidGraphError, "0 bytes per second"):
            fit(chain(), 16, [1.0] * 8, bytes_per_second=0)

    def test_an_output_may_come_back_after_the_last_step(self) -> None:
        ops = (Op("a", creates=(0,)), Op("b", creates=(1,)), Op("c", reads=(1,), workspace=8))
        graph = Graph(ops, (Storage("x", 4), Storage("y", 8)), outputs=(0,))
        plan = Plan.of(graph, olla.Schedule((0, 1, 2), 16, 0, "by hand", 0.0, (Spill(0, 1, 3),)))
        verify(graph, plan)
