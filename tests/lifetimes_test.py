from __future__ import annotations

import unittest

from graphs import diamond, graphs
from hypothesis import given

from olla import Graph, InvalidPlanError, Op, Storage
from olla.graph.lifetimes import LiveInterval, Spill, live_intervals, memory_profile, peak_bytes


class LifetimesTest(unittest.TestCase):
    def test_a_storage_lives_from_its_creation_to_its_last_use(self) -> None:
        lives = live_intervals(diamond(), range(6))
        self.assertEqual(
            lives,
            (
                LiveInterval(1, 0, 3),
                LiveInterval(2, 1, 4),
                LiveInterval(3, 2, 5),
                LiveInterval(4, 3, 5),
                LiveInterval(5, 4, 6),
            ),
        )

    def test_the_profile_sums_what_is_alive(self) -> None:
        self.assertEqual(memory_profile(diamond(), range(6)), (4, 14, 15, 12, 4, 2))
        self.assertEqual(peak_bytes(diamond(), range(6)), 15)

    def test_another_order_needs_less(self) -> None:
        self.assertEqual(memory_profile(diamond(), (0, 1, 3, 2, 4, 5)), (4, 14, 15, 6, 4, 2))

    def test_an_op_that_runs_again_starts_a_new_life_of_what_it_creates(self) -> None:
        lives = [life for life in live_intervals(diamond(), (0, 1, 3, 0, 2, 4, 5)) if life.storage == 1]
        self.assertEqual(lives, [LiveInterval(1, 0, 2), LiveInterval(1, 3, 5)])

    def test_an_output_lives_to_the_end(self) -> None:
        graph = diamond()
        kept = Graph(graph.ops, graph.storages, outputs=(1,))
        self.assertEqual(live_intervals(kept, range(6))[0], LiveInterval(1, 0, 6))

    def test_what_is_spilled_has_a_life_before_and_one_after(self) -> None:
        order, spill = (0, 1, 3, 2, 4, 5), Spill(1, 2, 3)
        lives = [life for life in live_intervals(diamond(), order, (spill,)) if life.storage == 1]
        self.assertEqual(lives, [LiveInterval(1, 0, 2), LiveInterval(1, 3, 4)])
        self.assertEqual(memory_profile(diamond(), order, (spill,)), (4, 14, 11, 6, 4, 2))
        self.assertEqual(peak_bytes(diamond(), order, (spill,)), 14)

    def test_an_output_may_come_back_in_the_end_and_still_needs_its_bytes(self) -> None:
        graph = Graph((Op("a", creates=(0,)), Op("b", creates=(1,))), (Storage("x", 4), Storage("y", 8)), (0, 1))
        self.assertEqual(memory_profile(graph, (0, 1), (Spill(0, 1, 2),)), (4, 8))
        self.assertEqual(peak_bytes(graph, (0, 1), (Spill(0, 1, 2),)), 12)

    def test_only_what_waits_can_be_spilled(self) -> None:
        for spill in (Spill(1, 0, 1), Spill(1, 3, 4), Spill(0, 1, 2)):
            with self.assertRaisesRegex(InvalidPlanError, f"storage {spill.storage} cannot be spilled"):
                live_intervals(diamond(), (0, 1, 3, 2, 4, 5), (spill,))

    def test_nothing_needs_nothing(self) -> None:
        self.assertEqual(peak_bytes(Graph((), ()), ()), 0)

    @given(graphs())
    def test_the_profile_is_the_sum_of_the_intervals(self, graph: Graph) -> None:
        order = range(len(graph.ops))
        lives = live_intervals(graph, order)
        expected = tuple(
            graph.ops[op].workspace + sum(graph.storages[s].size for s, start, end in lives if start <= step < end)
            for step, op in enumerate(order)
        )
        self.assertEqual(memory_profile(graph, order), expected)
