from __future__ import annotations

import json
import unittest
from dataclasses import replace

import networkx
from graphs import diamond, graphs
from hypothesis import given

from olla import Graph, InvalidGraphError, Op, Storage


class GraphTest(unittest.TestCase):
    def test_persistent_bytes_are_those_of_persistent_storages(self) -> None:
        self.assertEqual(diamond().persistent_bytes, 100)

    def test_a_reader_follows_the_writer_and_a_writer_follows_all_readers(self) -> None:
        graph = Graph(
            (
                Op("create", creates=(0,)),
                Op("read", reads=(0,)),
                Op("read too", reads=(0,)),
                Op("write", writes=(0,)),
                Op("read after", reads=(0,)),
                Op("write again", writes=(0,)),
            ),
            (Storage("x", 1),),
        )
        self.assertEqual(graph.predecessors, ((), (0,), (0,), (0, 1, 2), (3,), (3, 4)))
        self.assertEqual(graph.successors, ((1, 2, 3), (3,), (3,), (4, 5), (5,), ()))

    def test_state_without_bytes_keeps_its_users_in_order(self) -> None:
        generator = Storage("random generator", 0, persistent=True)
        graph = Graph((Op("draw", writes=(0,)), Op("draw", writes=(0,))), (generator,))
        self.assertEqual(graph.predecessors, ((), (0,)))

    @given(graphs())
    def test_dependencies_have_no_cycle_and_program_order_respects_them(self, graph: Graph) -> None:
        directed = networkx.DiGraph()
        directed.add_nodes_from(range(len(graph.ops)))
        directed.add_edges_from((a, b) for b, before in enumerate(graph.predecessors) for a in before)
        self.assertTrue(networkx.is_directed_acyclic_graph(directed))
        self.assertTrue(all(a < b for a, b in directed.edges))
        self.assertEqual([tuple(sorted(directed.successors(op))) for op in directed], list(graph.successors))

    @given(graphs())
    def test_json_round_trip(self, graph: Graph) -> None:
        again = Graph.from_dict(json.loads(json.dumps(graph.to_dict())))
        self.assertEqual(again, graph)
        self.assertEqual(again.digest, graph.digest)

    def test_the_digest_tells_graphs_apart(self) -> None:
        graph = diamond()
        self.assertNotEqual(graph.digest, Graph(graph.ops, graph.storages).digest)

    def test_names_do_not_change_the_digest(self) -> None:
        graph = diamond()
        renamed = Graph(
            tuple(replace(op, name="op", source="x.py:1", backward=True) for op in graph.ops),
            graph.storages,
            graph.outputs,
        )
        self.assertEqual(graph.digest, renamed.digest)


class InvalidGraphTest(unittest.TestCase):
    def check(
        self, ops: tuple[Op, ...], storages: tuple[Storage, ...], message: str, outputs: tuple[int, ...] = ()
    ) -> None:
        with self.assertRaisesRegex(InvalidGraphError, message):
            Graph(ops, storages, outputs)

    def test_negative_size(self) -> None:
        self.check((), (Storage("x", -1),), r"storage 0 \('x'\) has the negative size -1")

    def test_negative_workspace(self) -> None:
        self.check((Op("f", workspace=-1),), (), r"op 0 \('f'\) has the negative workspace")

    def test_unknown_storage(self) -> None:
        self.check((Op("f", reads=(3,)),), (Storage("x", 1),), r"op 0 \('f'\) names storage 3, but there are 1")

    def test_a_negative_size_names_the_op(self) -> None:
        self.check((Op("f", creates=(0,)),), (Storage("x", -1),), r"created by op 0 \('f'\) has the negative size -1")

    def test_read_before_any_write(self) -> None:
        self.check((Op("f", reads=(0,)),), (Storage("x", 1),), r"op 0 \('f'\) touches storage 0 before .* none does")

    def test_read_before_the_first_write(self) -> None:
        self.check(
            (Op("f", reads=(0,)), Op("g", creates=(0,))),
            (Storage("x", 1),),
            r"op 0 \('f'\) touches storage 0 before op 1 \('g'\) creates it",
        )

    def test_a_cycle(self) -> None:
        self.check(
            (Op("f", creates=(0,), reads=(2,)), Op("g", creates=(1,), reads=(0,)), Op("h", creates=(2,), writes=(1,))),
            (Storage("x", 1), Storage("y", 1), Storage("z", 1)),
            r"op 0 \('f'\) .* op 0 \('f'\) -> op 2 \('h'\) -> op 1 \('g'\) -> op 0 \('f'\)",
        )

    def test_created_twice(self) -> None:
        self.check((Op("f", creates=(0,)), Op("g", creates=(0,))), (Storage("x", 1),), r"op 1 .* exists already")

    def test_created_although_persistent(self) -> None:
        self.check((Op("f", creates=(0,)),), (Storage("x", 1, persistent=True),), "exists already")

    def test_named_twice_by_one_op(self) -> None:
        self.check(
            (Op("f", creates=(0,)), Op("g", reads=(0,), writes=(0,))), (Storage("x", 1),), "names a storage twice"
        )

    def test_unknown_output(self) -> None:
        self.check((), (), "outputs names storage 0", outputs=(0,))

    def test_output_that_nobody_creates(self) -> None:
        self.check((), (Storage("x", 1),), "no op creates", outputs=(0,))

    def test_not_a_graph(self) -> None:
        for data in ({}, {"format": "other"}, {"format": "olla-graph-1", "ops": [{"nme": "f"}], "storages": []}):
            with self.assertRaises(InvalidGraphError):
                Graph.from_dict(data)
