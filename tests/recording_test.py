"""Events of the allocator become allocations with lifetimes, and peaks of ops."""

from __future__ import annotations

import unittest

from olla.run.recording import Allocation, Recording

EVENTS = [
    (0, 0, 64, 1000),  # (id, position, size, address)
    (1, 0, 32, 2000),
    (0, 0, -1, 1000),
    (2, 0, 16, 1000),  # where the first one was
    (1, 1, -1, 2000),
    (3, 1, 8, 2000),
]


class RecordingTest(unittest.TestCase):
    def test_lifetimes_are_half_open_in_events(self) -> None:
        recording = Recording.of(EVENTS, {})
        self.assertEqual(
            recording.allocations,
            (
                Allocation(0, 0, 64, 0, 2, 1000),
                Allocation(0, 1, 32, 1, 4, 2000),
                Allocation(0, 0, 16, 3, None, 1000),
                Allocation(1, 1, 8, 5, None, 2000),
            ),
        )

    def test_the_peak_of_an_op_is_the_most_that_is_alive_while_it_runs(self) -> None:
        recording = Recording.of(EVENTS, {})
        self.assertEqual(recording.peaks, {0: 96, 1: 24})

    def test_what_an_op_returned_is_its_last_allocation_at_that_address(self) -> None:
        recording = Recording.of(EVENTS, {(0, 7): 1000, (1, 9): 2000, (1, 8): 3000})
        self.assertEqual(recording.storages, {2: (0, 7), 3: (1, 9)})

    def test_a_step_that_allocates_nothing(self) -> None:
        self.assertEqual(Recording.of([], {}), Recording((), {}, {}))
