from __future__ import annotations

import unittest
from dataclasses import replace

from graphs import diamond, graphs
from hypothesis import given

from olla import Graph, Op, Plan, Storage
from olla.graph.lifetimes import Spill, eager_peak_bytes, memory_profile, peak_bytes
from olla.order.schedule import program_order, schedule
from olla.place.place import place
from olla.show.blocks import Block, Kind, blocks_of, eager_memory, origin, planned_memory, total
from olla.show.peak import Peak


def placed(graph: Graph) -> Plan:
    plan = Plan.of(graph, schedule(graph))
    return plan.at(place(graph, plan.order, alignment=1))


class BlocksTest(unittest.TestCase):
    @given(graphs())
    def test_the_blocks_of_a_step_are_its_memory(self, graph: Graph) -> None:
        plan = placed(graph)
        profile = memory_profile(graph, plan.order)
        self.assertEqual(total(planned_memory(graph, plan)), profile)
        for blocks in (blocks_of(graph, plan), blocks_of(graph, plan.at(None))):
            alive = [sum(b.size for b in blocks if b.start <= step < b.end) for step in range(len(plan.order))]
            self.assertEqual(tuple(alive), profile)

    @given(graphs())
    def test_eager_memory_has_the_baseline_as_its_peak(self, graph: Graph) -> None:
        wider = tuple(replace(storage, spared=storage.size * 3) for storage in graph.storages)
        ops = tuple(replace(op, reused=3 * len(op.writes)) for op in graph.ops)
        reusing = replace(graph, ops=ops, storages=wider)
        outputs = {s for s in reusing.outputs if not reusing.storages[s].persistent}
        at_the_end = sum(reusing.storages[s].eager_size for s in outputs)
        self.assertEqual(max(at_the_end, *total(eager_memory(reusing))), eager_peak_bytes(reusing))

    @given(graphs())
    def test_what_outlives_the_step_is_above_the_arena_and_all_else_in_it(self, graph: Graph) -> None:
        plan = placed(graph)
        assert plan.arena_bytes is not None
        for block in blocks_of(graph, plan):
            assert block.offset is not None
            if block.outside:
                self.assertGreaterEqual(block.offset, plan.arena_bytes)
            else:
                self.assertLessEqual(block.offset + block.size, plan.arena_bytes)

    def test_kinds_are_those_of_the_ops_that_make_them(self) -> None:
        graph = Graph(
            (Op("f", creates=(0,), workspace=5), Op("g", creates=(1,), reads=(0,), backward=True, reused=7)),
            (Storage("x", 2), Storage("dx", 3)),
        )
        plan = Plan.of(graph, program_order(graph))
        x, dx, workspace = Kind.ACTIVATION, Kind.GRADIENT, Kind.WORKSPACE
        self.assertEqual(planned_memory(graph, plan), {x: (2, 2), dx: (0, 3), workspace: (5, 0)})
        self.assertEqual(eager_memory(graph), {x: (2, 2), dx: (0, 10), workspace: (5, 0)})
        self.assertEqual(
            blocks_of(graph, plan),
            (
                Block(0, "x", x, op=0, start=0, end=2, size=2, offset=None),
                Block(1, "dx", dx, op=1, start=1, end=2, size=3, offset=None),
                Block(None, "workspace", workspace, op=0, start=0, end=1, size=5, offset=None),
            ),
        )

    def test_what_is_spilled_has_two_blocks(self) -> None:
        graph = diamond()
        order, spills = (0, 1, 2, 3, 4, 5), (Spill(1, 1, 2),)
        found = replace(program_order(graph), order=order, spills=spills, peak_bytes=peak_bytes(graph, order, spills))
        blocks = blocks_of(graph, Plan.of(graph, found))
        self.assertEqual([(b.start, b.end, b.op) for b in blocks if b.name == "start"], [(0, 1, 0), (2, 3, 0)])

    def test_an_op_says_where_in_the_model_it_comes_from(self) -> None:
        self.assertEqual(origin(Op("f")), "")
        self.assertEqual(origin(Op("f", source="/home/me/models/net.py:12")), "models/net.py:12")
        self.assertEqual(origin(Op("f", source="net.py:12", backward=True)), "backward of net.py:12")


class PeakTest(unittest.TestCase):
    @given(graphs())
    def test_the_blocks_at_the_peak_are_the_peak(self, graph: Graph) -> None:
        plan = Plan.of(graph, schedule(graph))
        self.assertEqual(sum(block.size for block in Peak.of(graph, plan).blocks), plan.peak_bytes)

    def test_outputs_that_come_back_after_the_end_are_a_peak_without_an_op(self) -> None:
        graph = Graph(
            (Op("a", creates=(0,)), Op("b", creates=(1,)), Op("c", workspace=1)),
            (Storage("a", 5), Storage("b", 6)),
            outputs=(0, 1),
        )
        spills = (Spill(0, 1, 3), Spill(1, 2, 3))
        found = replace(program_order(graph), spills=spills, peak_bytes=peak_bytes(graph, (0, 1, 2), spills))
        peak = Peak.of(graph, Plan.of(graph, found))
        self.assertEqual((peak.step, peak.op), (None, None))
        self.assertEqual([block.name for block in peak.blocks], ["b", "a"])
