"""The checker accepts sound plans and catches every kind of corruption."""

from __future__ import annotations

import unittest
from dataclasses import replace
from pathlib import Path
from typing import Any

from graphs import diamond, graphs, legal_orders
from hypothesis import given, settings
from hypothesis import strategies as st

from olla import Graph, InvalidPlanError, Op, Plan, Storage
from olla.graph.check import ViolationKind, check, verify
from olla.graph.lifetimes import live_intervals, peak_bytes
from olla.graph.plan import Addresses, Schedule, Spill, Workspace, extra_runs


def plan_for(graph: Graph, order: tuple[int, ...], addresses: Addresses | None = None) -> Plan:
    return Plan.of(graph, Schedule(order, peak_bytes(graph, order), 0, "by hand", 0.0), addresses)


def stacked(graph: Graph, order: tuple[int, ...]) -> Addresses:
    """Every life and every workspace at an address of its own."""
    offsets, top = [], 0
    for life in live_intervals(graph, order):
        offsets.append(top)
        top += graph.storages[life.storage].size
    workspaces = []
    for step, index in enumerate(order):
        workspaces.append(Workspace(step, top, graph.ops[index].workspace))
        top += graph.ops[index].workspace
    return Addresses(tuple(offsets), tuple(workspaces), top, 0)


class CheckTest(unittest.TestCase):
    order = (0, 1, 3, 2, 4, 5)

    def kinds(self, graph: Graph, plan: Plan) -> set[ViolationKind]:
        return {violation.kind for violation in check(graph, plan)}

    def corrupted(self, **changes: Any) -> set[ViolationKind]:
        return self.kinds(diamond(), replace(plan_for(diamond(), self.order), **changes))

    @given(graphs(), st.data())
    def test_sound_plans_pass(self, graph: Graph, data: st.DataObject) -> None:
        orders = legal_orders(graph)
        order = next(orders)
        for _ in range(data.draw(st.integers(0, 5))):
            order = next(orders, order)
        self.assertEqual(check(graph, plan_for(graph, order)), ())
        self.assertEqual(check(graph, plan_for(graph, order, stacked(graph, order))), ())

    @settings(max_examples=50)
    @given(graphs(max_ops=5), st.data())
    def test_an_order_passes_if_and_only_if_it_respects_the_dependencies(
        self, graph: Graph, data: st.DataObject
    ) -> None:
        order = tuple(data.draw(st.permutations(range(len(graph.ops)))))
        self.assertEqual(check(graph, plan_for(graph, order)) == (), order in set(legal_orders(graph)))

    def test_another_graph(self) -> None:
        other = Graph(diamond().ops, diamond().storages)
        self.assertEqual(self.kinds(other, plan_for(diamond(), self.order)), {ViolationKind.WRONG_GRAPH})

    def test_unknown_op(self) -> None:
        self.assertEqual(self.corrupted(order=(0, 1, 3, 2, 4, 6)), {ViolationKind.UNKNOWN_OP})
        self.assertEqual(self.corrupted(order=(0, 1, 3, 2, 4, -1)), {ViolationKind.UNKNOWN_OP})

    def test_missing_op(self) -> None:
        self.assertEqual(self.corrupted(order=(0, 1, 3, 2, 4)), {ViolationKind.MISSING_OP})

    def test_declared_recomputation_passes(self) -> None:
        graph, order = diamond(), (0, 1, 3, 0, 2, 4, 5)
        self.assertEqual(check(graph, plan_for(graph, order)), ())

    def test_undeclared_recomputation(self) -> None:
        plan = plan_for(diamond(), (0, 1, 3, 0, 2, 4, 5))
        self.assertEqual(self.kinds(diamond(), replace(plan, recomputed=())), {ViolationKind.UNDECLARED_REPEAT})

    def test_declared_but_not_recomputed(self) -> None:
        self.assertEqual(self.corrupted(recomputed=(1,)), {ViolationKind.UNDECLARED_REPEAT})

    def test_an_update_must_not_run_twice(self) -> None:
        order = (*self.order, 5)
        plan = replace(plan_for(diamond(), order), recomputed=extra_runs(order))
        self.assertIn(ViolationKind.REPEATED_EFFECT, self.kinds(diamond(), plan))

    def test_a_random_draw_must_not_be_repeated(self) -> None:
        graph = Graph(
            (Op("draw", creates=(1,), writes=(0,)), Op("use", reads=(1,))),
            (Storage("random generator", 0, persistent=True), Storage("mask", 4)),
        )
        self.assertIn(ViolationKind.REPEATED_EFFECT, self.kinds(graph, plan_for(graph, (0, 0, 1))))

    def test_a_draw_that_is_replayed_may_be_repeated(self) -> None:
        graph = Graph(
            (
                Op("draw", creates=(1,), writes=(0,), writes_once=(0,)),
                Op("draw again", creates=(2,), writes=(0,)),
                Op("use", reads=(1,)),
            ),
            (Storage("random generator", 0, persistent=True), Storage("mask", 4), Storage("other", 4)),
        )
        self.assertEqual(self.kinds(graph, plan_for(graph, (0, 1, 0, 2))), set())
        self.assertIn(ViolationKind.REPEATED_EFFECT, self.kinds(graph, plan_for(graph, (0, 1, 2, 1))))

    def test_storage_that_is_not_there(self) -> None:
        self.assertIn(ViolationKind.ABSENT_STORAGE, self.corrupted(order=(1, 0, 3, 2, 4, 5)))

    def test_storage_that_was_changed_too_early(self) -> None:
        graph = Graph((Op("read", reads=(0,)), Op("update", writes=(0,))), (Storage("weight", 4, persistent=True),))
        self.assertEqual(self.kinds(graph, plan_for(graph, (1, 0))), {ViolationKind.STALE_STORAGE})

    def test_output_that_is_made_anew_and_not_finished(self) -> None:
        graph = Graph((Op("create", creates=(0,)), Op("finish", writes=(0,))), (Storage("x", 4),), outputs=(0,))
        self.assertEqual(self.kinds(graph, plan_for(graph, (0, 1, 0))), {ViolationKind.STALE_STORAGE})

    def test_wrong_peak(self) -> None:
        self.assertEqual(self.corrupted(peak_bytes=14), {ViolationKind.WRONG_PEAK})

    def test_wrong_baseline(self) -> None:
        self.assertEqual(self.corrupted(baseline_peak_bytes=16), {ViolationKind.WRONG_BASELINE})

    def test_wrong_persistent_bytes(self) -> None:
        self.assertEqual(self.corrupted(persistent_bytes=99), {ViolationKind.WRONG_PERSISTENT})

    def test_bound_above_peak(self) -> None:
        self.assertEqual(self.corrupted(lower_bound_bytes=16), {ViolationKind.BOUND_ABOVE_PEAK})

    def placed(
        self, offsets: tuple[int | None, ...] | None, arena: int | None, bound: int | None = 0, **changes: Any
    ) -> set[ViolationKind]:
        return self.corrupted(offsets=offsets, arena_bytes=arena, arena_lower_bound_bytes=bound, **changes)

    def test_addresses_that_fit_pass(self) -> None:
        # start [0, 4), wide [4, 14), small [14, 15), narrow [4, 5), end [0, 2)
        self.assertEqual(self.placed((0, 4, 14, 4, 0), 15), set())

    def test_an_offset_for_each_life(self) -> None:
        self.assertEqual(self.placed((0, 4), 15), {ViolationKind.WRONG_OFFSETS})
        self.assertEqual(self.placed((0, 4, 14, 4, 0), None), {ViolationKind.WRONG_OFFSETS})
        self.assertEqual(self.placed((0, 4, 14, 4, 0), 15, None), {ViolationKind.WRONG_OFFSETS})
        self.assertEqual(self.placed(None, 15), {ViolationKind.WRONG_OFFSETS})

    def test_what_is_outside_of_the_arena_is_in_nobodys_way(self) -> None:
        self.assertEqual(self.placed((0, 4, None, 4, 0), 14), set())

    def test_outside_the_arena(self) -> None:
        self.assertEqual(self.placed((0, 4, 15, 4, 0), 15), {ViolationKind.OUTSIDE_ARENA})
        self.assertEqual(self.placed((-1, 4, 14, 4, 0), 15), {ViolationKind.OUTSIDE_ARENA})

    def test_overlap(self) -> None:
        self.assertEqual(self.placed((0, 3, 14, 4, 0), 15), {ViolationKind.OVERLAP})

    def test_arena_larger_than_needed(self) -> None:
        self.assertEqual(self.placed((0, 4, 14, 4, 0), 16), {ViolationKind.WRONG_ARENA})

    def test_arena_smaller_than_its_bound(self) -> None:
        self.assertEqual(self.placed((0, 4, 14, 4, 0), 15, 16), {ViolationKind.WRONG_ARENA})

    def working(self, *workspaces: Workspace, arena: int = 8) -> set[ViolationKind]:
        """Two ops, of which the second one reads x [0, 2), creates y [2, 4) and needs 3 bytes to work in."""
        graph = Graph(
            (Op("a", creates=(0,)), Op("b", creates=(1,), reads=(0,), workspace=3)), (Storage("x", 2), Storage("y", 2))
        )
        return self.kinds(graph, plan_for(graph, (0, 1), Addresses((0, 2), workspaces, arena, 0)))

    def test_a_workspace_has_its_place(self) -> None:
        self.assertEqual(self.working(Workspace(1, 5, 3)), set())
        self.assertEqual(self.working(Workspace(1, 4, 1), Workspace(1, 5, 3)), set())
        self.assertEqual(self.working(arena=4), {ViolationKind.WRONG_WORKSPACES})
        self.assertEqual(self.working(Workspace(0, 5, 3)), {ViolationKind.WRONG_WORKSPACES})
        self.assertEqual(self.working(Workspace(1, 5, 3), Workspace(2, 5, 3)), {ViolationKind.WRONG_WORKSPACES})
        self.assertEqual(self.working(Workspace(1, 6, 3)), {ViolationKind.OUTSIDE_ARENA})
        self.assertEqual(self.working(Workspace(1, 1, 7)), {ViolationKind.OVERLAP})

    def test_a_workspace_may_be_where_the_result_comes_later_but_not_count_it(self) -> None:
        self.assertEqual(self.working(Workspace(1, 2, 5), arena=7), set())
        self.assertEqual(self.working(Workspace(1, 2, 4), arena=6), {ViolationKind.WRONG_WORKSPACES})

    def spilled(self, *spills: Spill, peak: int = 14) -> set[ViolationKind]:
        """Lives: start [0, 4), wide [1, 3), small [2, 5), narrow [3, 5), end [4, 6)."""
        order = (0, 1, 3, 2, 4, 5)
        return self.kinds(diamond(), replace(plan_for(diamond(), order), spills=spills, peak_bytes=peak))

    def test_a_spill_makes_room(self) -> None:
        self.assertEqual(self.spilled(Spill(1, 2, 3), peak=14), set())
        self.assertEqual(self.spilled(Spill(1, 2, 3), peak=15), {ViolationKind.WRONG_PEAK})

    def test_a_spill_is_within_one_life_and_waited_for(self) -> None:
        self.assertEqual(self.spilled(Spill(1, 0, 1)), {ViolationKind.WRONG_SPILL})
        self.assertEqual(self.spilled(Spill(1, 3, 3)), {ViolationKind.WRONG_SPILL})
        self.assertEqual(self.spilled(Spill(1, 2, 4)), {ViolationKind.WRONG_SPILL})
        self.assertEqual(self.spilled(Spill(0, 2, 3)), {ViolationKind.WRONG_SPILL})
        self.assertEqual(self.spilled(Spill(1, 2, 3), Spill(1, 2, 3)), {ViolationKind.WRONG_SPILL})
        self.assertEqual(self.spilled(Spill(5, 5, 7)), {ViolationKind.WRONG_SPILL})

    def test_what_is_away_cannot_be_used(self) -> None:
        self.assertIn(ViolationKind.ABSENT_STORAGE, self.spilled(Spill(1, 1, 3)))

    def test_what_comes_back_has_a_place_of_its_own(self) -> None:
        plan = replace(plan_for(diamond(), self.order), spills=(Spill(1, 2, 3),), peak_bytes=14)
        # start [4, 8), wide [8, 18), small [0, 1), start again [4, 8), narrow [1, 2), end [2, 4)
        placed = replace(plan, offsets=(4, 8, 0, 4, 1, 2), arena_bytes=18, arena_lower_bound_bytes=14)
        self.assertEqual(self.kinds(diamond(), placed), set())
        self.assertEqual(self.kinds(diamond(), replace(placed, offsets=(4, 8, 0, 1, 2))), {ViolationKind.WRONG_OFFSETS})
        self.assertEqual(self.kinds(diamond(), replace(placed, offsets=(4, 8, 0, 0, 1, 2))), {ViolationKind.OVERLAP})

    def test_every_kind_of_violation_is_tested_here(self) -> None:
        text = Path(__file__).read_text()
        for kind in ViolationKind:
            self.assertIn(f"ViolationKind.{kind.name}", text)

    def test_verify_names_the_violation(self) -> None:
        plan = replace(plan_for(diamond(), self.order), peak_bytes=14)
        with self.assertRaisesRegex(InvalidPlanError, "14 bytes claimed, 15 needed"):
            verify(diamond(), plan)
