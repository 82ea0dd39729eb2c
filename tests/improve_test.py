"""What a solver adds to what the planners found, and when it is not asked."""

from __future__ import annotations

import unittest
from dataclasses import replace
from unittest import mock

import torch
from graphs import diamond, tangled
from torch import nn

import olla
from olla import Graph, Op, Plan, SolverUnavailableError, Storage
from olla.graph.check import verify
from olla.graph.plan import Placement
from olla.ilp import improve
from olla.ilp.improve import improved_order, improved_placement, improved_plan
from olla.order.schedule import program_order
from olla.place.place import pack, place
from olla.solve import available

# Of 5,000 random programs, the one whose planned order needs a larger arena than what is alive in it at once.
PROGRAM = [((0,), ()), ((), (0,)), ((), (0,)), ((1,), (0,)), ((2,), (0, 1)), ((3,), (2,)), ((4,), (1,)), ((5,), (2,))]
PROGRAM += [((6,), (0,)), ((7,), (0, 1)), ((8,), (6, 5)), ((9,), (8, 4)), ((10,), ()), ((11,), (6,))]
SIZES = [2, 2, 4, 3, 3, 5, 2, 6, 3, 6, 1, 1]

SOLVER = next(iter(available()), None)


def placed(graph: Graph, order: olla.Schedule) -> Plan:
    return Plan.of(graph, order, place(graph, order.order, alignment=1))


@unittest.skipUnless(SOLVER, "no solver is installed")
class ImproveTest(unittest.TestCase):
    def test_an_order_with_a_gap_is_improved_and_proven(self) -> None:
        graph = tangled(12, seed=3)
        best, start = olla.schedule(graph), program_order(graph)
        self.assertGreater(start.peak_bytes, best.peak_bytes)
        found = improved_order(graph, start, solver=SOLVER, time_limit=60)
        self.assertEqual((found.peak_bytes, found.lower_bound_bytes), (best.peak_bytes, best.peak_bytes))
        self.assertIn("integer program", found.method)

    def test_the_best_order_keeps_its_name_and_gets_a_proof(self) -> None:
        graph = tangled(12, seed=3)
        best = olla.schedule(graph)
        found = improved_order(graph, replace(best, lower_bound_bytes=0), solver=SOLVER, time_limit=60)
        self.assertEqual((found.order, found.method), (best.order, best.method))
        self.assertEqual(found.lower_bound_bytes, best.peak_bytes)

    def test_a_placement_is_lowered(self) -> None:
        intervals = [(0, 2, 100), (1, 3, 60), (2, 4, 100), (3, 5, 60)]
        high = Placement((0, 128, 192, 0), 292, 160)
        found = improved_placement(intervals, high, alignment=64, solver=SOLVER, time_limit=60)
        self.assertEqual(found.arena_bytes, pack(intervals, alignment=64, time_limit=60).arena_bytes)
        self.assertTrue(all(offset % 64 == 0 for offset in found.offsets))

    def test_joint_is_tried_when_order_then_address_leaves_fragmentation(self) -> None:
        ops = tuple(Op(f"op {index}", creates, reads) for index, (creates, reads) in enumerate(PROGRAM))
        graph = Graph(ops, tuple(Storage(f"s{index}", size) for index, size in enumerate(SIZES)))
        start = placed(graph, olla.schedule(graph))
        found = improved_plan(graph, start, alignment=1, solver=SOLVER, time_limit=60)
        verify(graph, found)
        self.assertEqual((start.arena_bytes, found.arena_bytes, found.peak_bytes), (14, 13, 13))
        aligned = improved_plan(
            graph, start.at(place(graph, start.order, alignment=4)), alignment=4, solver=SOLVER, time_limit=60
        )
        verify(graph, aligned)
        self.assertTrue(all(offset is None or offset % 4 == 0 for offset in aligned.offsets))

    def test_nothing_is_asked_where_nothing_is_left_to_gain_or_all_is_too_large(self) -> None:
        best = olla.schedule(diamond())
        with mock.patch.multiple(improve, order=mock.DEFAULT, joint=mock.DEFAULT, address=mock.DEFAULT) as asked:
            self.assertIs(improved_order(diamond(), best, solver=SOLVER, time_limit=1), best)
            plan = placed(diamond(), best)
            self.assertIs(improved_plan(diamond(), plan, alignment=1, solver=SOLVER, time_limit=1), plan)
            large = tangled(400, seed=1)
            start = program_order(large)
            self.assertIs(improved_order(large, start, solver=SOLVER, time_limit=1), start)
            many = [(0, 2, 1)] * 401
            high = Placement(tuple(range(0, 802, 2)), 801, 401)
            self.assertIs(improved_placement(many, high, alignment=1, solver=SOLVER, time_limit=1), high)
        for function in asked.values():
            function.assert_not_called()

    @unittest.skipUnless("gurobi" in available(), "gurobipy is not installed")
    def test_a_licence_that_is_too_small_leaves_the_plan_as_it_is(self) -> None:
        large = tangled(60, seed=1)
        start = program_order(large)
        error = SolverUnavailableError("2,000 are free")
        with (
            mock.patch("olla.solve.gurobi.solve", side_effect=error),  # as without a licence, even where there is one
            self.assertLogs("olla.ilp.improve", "WARNING") as logs,
        ):
            self.assertIs(improved_order(large, start, solver="gurobi", time_limit=60), start)
        self.assertIn("stays as the planners made it: 2,000 are free", logs.output[0])

    def test_a_step_is_planned_with_a_solver_and_runs_as_ever(self) -> None:
        torch.manual_seed(0)
        model, inputs = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(5, 8)
        expected = model(inputs).sum()
        with olla.optimize(model, inputs, solver="auto", progress=False) as step:
            for _ in range(4):
                self.assertTrue(torch.equal(step(inputs), expected))
                model.zero_grad()
        plan = olla.plan(model, inputs, solver=SOLVER, progress=False)
        self.assertEqual((plan.gap, plan.status), (0.0, "optimal"))

    def test_another_solver_is_refused_before_anything_is_planned(self) -> None:
        with self.assertRaisesRegex(SolverUnavailableError, "no such solver: 'abacus'"):
            olla.optimize(nn.Linear(2, 2), torch.ones(2), solver="abacus")
        with (
            mock.patch("olla.solve.solver.available", return_value=[]),
            self.assertRaisesRegex(SolverUnavailableError, "pip install gurobipy"),
        ):
            olla.plan(nn.Linear(2, 2), torch.ones(2), solver="gurobi")
