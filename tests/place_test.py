"""A planned step's storages and workspaces in one arena."""

from __future__ import annotations

import unittest

from graphs import graphs
from hypothesis import given
from hypothesis import strategies as st

from olla import Graph, Op, Plan, Storage
from olla.graph.check import check
from olla.graph.plan import Schedule
from olla.order.schedule import program_order
from olla.place.place import place


class PlaceTest(unittest.TestCase):
    @given(graphs(), st.sampled_from((1, 64)))
    def test_the_checker_accepts_the_addresses(self, graph: Graph, alignment: int) -> None:
        order = program_order(graph)
        addresses = place(graph, order.order, alignment=alignment, time_limit=1)
        self.assertEqual(check(graph, Plan.of(graph, order, addresses)), ())
        for offset in [*addresses.offsets, *(workspace.offset for workspace in addresses.workspaces)]:
            self.assertEqual((offset or 0) % alignment, 0)

    def test_outputs_stay_outside_and_workspaces_are_inside(self) -> None:
        graph = Graph(
            (Op("a", creates=(0,), workspace=8), Op("b", creates=(1,), reads=(0,))),
            (Storage("x", 4), Storage("y", 100)),
            outputs=(1,),
        )
        addresses = place(graph, (0, 1), alignment=1)
        self.assertEqual((addresses.arena_bytes, addresses.lower_bound_bytes), (12, 12))
        self.assertIsNone(addresses.offsets[1])
        self.assertEqual([(w.step, w.size) for w in addresses.workspaces], [(0, 8)])

    def test_a_recomputed_storage_has_an_address_for_each_life(self) -> None:
        graph = Graph(
            (Op("a", creates=(0,)), Op("b", creates=(1,), reads=(0,)), Op("c", reads=(0, 1))),
            (Storage("x", 4), Storage("y", 4)),
        )
        order = (0, 1, 0, 2)
        addresses = place(graph, order, alignment=1)
        self.assertEqual(len(addresses.offsets), 3)
        self.assertEqual(check(graph, Plan.of(graph, Schedule(order, 8, 8, "", 0.0), addresses)), ())

    def test_padding_at_the_top_is_not_part_of_the_arena(self) -> None:
        graph = Graph((Op("a", creates=(0, 1)),), (Storage("x", 65), Storage("y", 1)))
        self.assertIn(place(graph, (0,)).arena_bytes, (64 + 65, 128 + 1))
        self.assertEqual(place(graph, (0,)).workspaces, ())
