from __future__ import annotations

import unittest
from itertools import accumulate

from graphs import diamond, graphs
from hypothesis import given

from olla import Graph, Op, Storage
from olla.graph.events import Allocate, Release, eager_events_of, events_of, lifetimes_of
from olla.graph.lifetimes import eager_peak_bytes, peak_bytes


class EventsTest(unittest.TestCase):
    def test_a_storage_is_allocated_by_its_creator_and_released_after_its_last_use(self) -> None:
        graph = Graph(
            (Op("begin", creates=(0,)), Op("double", creates=(1,), reads=(0,)), Op("print", reads=(1,))),
            (Storage("start", 4), Storage("doubled", 8)),
        )
        self.assertEqual(events_of(graph, range(3)), (Allocate(0, 4), Allocate(1, 8), Release(0), Release(1)))

    def test_a_workspace_lives_within_its_op_beside_what_the_op_creates(self) -> None:
        graph = Graph((Op("convolve", creates=(0,), workspace=7),), (Storage("image", 4),))
        self.assertEqual(events_of(graph, [0]), (Allocate(0, 4), Allocate(1, 7), Release(1), Release(0)))

    def test_temporaries_that_are_smaller_than_what_is_written_are_no_result_beside_it(self) -> None:
        for reused, largest in ((90, 100 + 100), (190, 100 + 200)):
            graph = Graph(
                (Op("make", creates=(0,)), Op("use up", writes=(0,), workspace=10, reused=reused)),
                (Storage("gradient", 100),),
            )
            sizes: dict[int, int] = {}
            peak = 0
            for event in eager_events_of(graph):
                if isinstance(event, Allocate):
                    sizes[event.name] = event.size
                else:
                    del sizes[event.name]
                peak = max(peak, sum(sizes.values()))
            self.assertEqual((peak, sizes), (largest, {}))
            self.assertEqual(eager_peak_bytes(graph), largest)

    def test_lifetimes_are_counted_in_events_and_a_name_may_come_again(self) -> None:
        events = (Allocate(7, 4), Allocate(8, 2), Release(7), Allocate(7, 3), Release(8))
        self.assertEqual(lifetimes_of(events), [(0, 2, 4), (1, 4, 2), (3, 5, 3)])

    def test_outputs_are_not_released_and_persistent_storages_not_allocated(self) -> None:
        graph = Graph(
            (Op("read", creates=(1,), reads=(0,)),), (Storage("weight", 9, persistent=True), Storage("loss", 4)), (0, 1)
        )
        self.assertEqual(events_of(graph, [0]), (Allocate(0, 4),))

    def test_a_storage_without_bytes_asks_for_nothing(self) -> None:
        self.assertEqual(events_of(Graph((Op("make", creates=(0,)),), (Storage("empty", 0),)), [0]), ())

    def test_an_output_that_is_created_again_is_released_in_between(self) -> None:
        graph = diamond()
        repeated = events_of(Graph(graph.ops, graph.storages, outputs=(1,)), (0, 1, 3, 0, 2, 4, 5))
        first, second = [name for name, size in (e for e in repeated if isinstance(e, Allocate)) if size == 4]
        self.assertIn(Release(first), repeated)
        self.assertNotIn(Release(second), repeated)

    @given(graphs())
    def test_the_running_sum_peaks_at_the_peak_of_the_order(self, graph: Graph) -> None:
        order, sizes, changes = range(len(graph.ops)), dict[int, int](), [0]
        for event in events_of(graph, order):
            if isinstance(event, Allocate):
                sizes[event.name] = event.size
            changes.append(event.size if isinstance(event, Allocate) else -sizes[event.name])
        self.assertEqual(max(accumulate(changes)), peak_bytes(graph, order))
