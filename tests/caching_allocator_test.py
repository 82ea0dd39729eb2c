"""The model of the CUDA caching allocator: every rule on a sequence worked by hand, and the real one's answers."""

from __future__ import annotations

import random
import unittest
from collections.abc import Iterator
from itertools import pairwise

from graphs import settings  # sets the profile
from hypothesis import given
from hypothesis import strategies as st

from olla import OutOfMemoryError
from olla.graph.events import Allocate, Event, Release
from olla.measure.caching_allocator import Block, CachingAllocator, Replay, replay

KIB, MIB = 2**10, 2**20


class RoundingTest(unittest.TestCase):
    def test_sizes_are_rounded_up_to_512_bytes(self) -> None:
        allocator = CachingAllocator()
        self.assertEqual([allocator.allocate(size).size for size in (1, 512, 513)], [512, 512, 1024])
        self.assertEqual(allocator.allocated_bytes, 2048)

    def test_nothing_cannot_be_allocated(self) -> None:
        with self.assertRaises(ValueError):
            CachingAllocator().allocate(0)


class SegmentTest(unittest.TestCase):
    def assert_reserves(self, size: int, reserved: int) -> None:
        allocator = CachingAllocator()
        allocator.allocate(size)
        self.assertEqual(allocator.reserved_bytes, reserved)

    def test_a_request_of_1_mib_comes_from_a_2_mib_segment(self) -> None:
        self.assert_reserves(MIB, 2 * MIB)

    def test_a_request_of_more_than_1_mib_comes_from_a_20_mib_segment(self) -> None:
        self.assert_reserves(MIB + 1, 20 * MIB)
        self.assert_reserves(10 * MIB - 512, 20 * MIB)

    def test_a_request_of_10_mib_or_more_has_a_segment_of_its_size_in_units_of_2_mib(self) -> None:
        self.assert_reserves(10 * MIB - 511, 10 * MIB)  # it is rounded first
        self.assert_reserves(10 * MIB, 10 * MIB)
        self.assert_reserves(10 * MIB + 1, 12 * MIB)
        self.assert_reserves(41 * MIB, 42 * MIB)

    def test_small_and_large_requests_share_no_segment(self) -> None:
        allocator = CachingAllocator()
        allocator.release(allocator.allocate(3 * MIB))
        allocator.allocate(KIB)
        self.assertEqual(allocator.reserved_bytes, 22 * MIB)


class SplitTest(unittest.TestCase):
    def test_the_rest_of_a_20_mib_segment_serves_the_next_request(self) -> None:
        allocator = CachingAllocator()
        first, second = allocator.allocate(3 * MIB), allocator.allocate(9 * MIB)
        self.assertEqual(second.address, first.end)
        self.assertEqual(allocator.reserved_bytes, 20 * MIB)

    def test_the_rest_of_a_small_segment_is_split_off_down_to_512_bytes(self) -> None:
        allocator = CachingAllocator()
        sizes = [allocator.allocate(size).size for size in (MIB, MIB - 512, 512)]
        self.assertEqual(sizes, [MIB, MIB - 512, 512])
        self.assertEqual(allocator.reserved_bytes, 2 * MIB)

    def test_a_large_rest_of_1_mib_or_less_is_not_split_off(self) -> None:
        allocator = CachingAllocator()
        self.assertEqual(allocator.allocate(11 * MIB).size, 12 * MIB)
        self.assertEqual(allocator.allocate(11 * MIB - 512).size, 11 * MIB - 512)
        self.assertEqual(allocator.allocated_bytes, 23 * MIB - 512)


class BestFitTest(unittest.TestCase):
    def test_it_takes_the_smallest_block_that_is_large_enough(self) -> None:
        allocator = CachingAllocator()
        blocks = {size: allocator.allocate(size * MIB) for size in (40, 12, 20)}
        for block in blocks.values():
            allocator.release(block)
        self.assertEqual(allocator.allocate(13 * MIB).address, blocks[20].address)
        self.assertEqual(allocator.reserved_bytes, 72 * MIB)

    def test_of_equal_blocks_it_takes_the_one_at_the_lowest_address(self) -> None:
        allocator = CachingAllocator()
        first, second = allocator.allocate(12 * MIB), allocator.allocate(12 * MIB)
        allocator.release(second)
        allocator.release(first)
        self.assertEqual(allocator.allocate(12 * MIB).address, first.address)

    def test_what_two_segments_have_together_serves_no_request(self) -> None:
        allocator = CachingAllocator()
        for block in [allocator.allocate(12 * MIB), allocator.allocate(12 * MIB)]:
            allocator.release(block)
        allocator.allocate(24 * MIB)
        self.assertEqual(allocator.reserved_bytes, 48 * MIB)


class MergeTest(unittest.TestCase):
    def test_neighbours_merge_when_freed(self) -> None:
        allocator = CachingAllocator()
        blocks = [allocator.allocate(5 * MIB) for _ in range(4)]
        for index in (0, 2, 1):  # the last one merges with both sides
            allocator.release(blocks[index])
        self.assertEqual(allocator.allocate(15 * MIB).address, blocks[0].address)
        self.assertEqual(allocator.reserved_bytes, 20 * MIB)

    def test_what_is_in_use_keeps_its_neighbours_apart(self) -> None:
        allocator = CachingAllocator()
        blocks = [allocator.allocate(5 * MIB) for _ in range(4)]
        for index in (0, 2):
            allocator.release(blocks[index])
        allocator.allocate(10 * MIB)
        self.assertEqual(allocator.reserved_bytes, 30 * MIB)

    def test_what_is_free_cannot_be_released(self) -> None:
        allocator = CachingAllocator()
        block = allocator.allocate(1)
        allocator.release(block)
        with self.assertRaises(ValueError):
            allocator.release(block)


class CapacityTest(unittest.TestCase):
    def test_cached_segments_are_given_back_when_the_driver_has_no_more(self) -> None:
        allocator = CachingAllocator(capacity_bytes=40 * MIB)
        allocator.release(allocator.allocate(12 * MIB))
        allocator.release(allocator.allocate(KIB))
        allocator.allocate(30 * MIB)
        self.assertEqual(allocator.reserved_bytes, 30 * MIB)

    def test_only_whole_segments_are_given_back(self) -> None:
        allocator = CachingAllocator(capacity_bytes=40 * MIB)
        kept, freed = allocator.allocate(2 * MIB), allocator.allocate(2 * MIB)
        allocator.release(freed)
        with self.assertRaisesRegex(OutOfMemoryError, "20,971,520 are reserved, and 2,097,152 of these are allocated"):
            allocator.allocate(22 * MIB)
        allocator.release(kept)
        self.assertEqual(allocator.allocate(40 * MIB).size, 40 * MIB)

    def test_all_cached_segments_are_given_back_although_one_would_do(self) -> None:
        allocator = CachingAllocator(capacity_bytes=40 * MIB)
        for block in [allocator.allocate(12 * MIB), allocator.allocate(14 * MIB)]:
            allocator.release(block)
        allocator.allocate(20 * MIB)
        self.assertEqual(allocator.reserved_bytes, 20 * MIB)
        self.assertEqual(allocator.peak_reserved_bytes, 26 * MIB)

    def test_a_segment_is_not_made_smaller_to_fit(self) -> None:
        with self.assertRaises(OutOfMemoryError):
            CachingAllocator(capacity_bytes=19 * MIB).allocate(2 * MIB)


class ExpandableTest(unittest.TestCase):
    def test_it_grows_by_pages(self) -> None:
        allocator = CachingAllocator(expandable_segments=True)
        reserved = []
        for size in (KIB, 2 * MIB, 3 * MIB, 19 * MIB, 50 * MIB):
            allocator.allocate(size)
            reserved.append(allocator.reserved_bytes // MIB)
        self.assertEqual(reserved, [2, 22, 22, 42, 82])

    def test_every_rest_of_512_bytes_is_split_off(self) -> None:
        allocator = CachingAllocator(expandable_segments=True)
        self.assertEqual(allocator.allocate(20 * MIB - 512).size, 20 * MIB - 512)
        self.assertEqual(allocator.allocate(11 * MIB).size, 11 * MIB)

    def test_it_maps_only_what_the_free_block_at_its_end_lacks(self) -> None:
        allocator = CachingAllocator(expandable_segments=True)
        allocator.release(allocator.allocate(15 * MIB))
        allocator.allocate(30 * MIB)
        self.assertEqual(allocator.reserved_bytes, 40 * MIB)

    def test_a_block_that_can_grow_is_taken_last(self) -> None:
        allocator = CachingAllocator(expandable_segments=True)
        hole, _, end = (allocator.allocate(size * MIB) for size in (30, 2, 28))
        allocator.release(hole)
        allocator.release(end)  # smaller, but it can grow
        self.assertEqual(allocator.allocate(27 * MIB).address, hole.address)

    def test_free_pages_are_given_back_and_the_holes_are_filled_first(self) -> None:
        allocator = CachingAllocator(expandable_segments=True, capacity_bytes=100 * MIB)
        blocks = [allocator.allocate(size * MIB) for size in (50, 10, 40)]
        allocator.release(blocks[0])
        with self.assertRaises(OutOfMemoryError):
            allocator.allocate(60 * MIB)
        # Of the 50 MiB that are free, two pages are free entirely; the third holds part of the next block.
        self.assertEqual(allocator.reserved_bytes, 60 * MIB)
        self.assertEqual(allocator.allocate(45 * MIB).address, blocks[0].address)
        self.assertEqual(allocator.reserved_bytes, 100 * MIB)

    def test_an_empty_segment_is_given_back_whole(self) -> None:
        allocator = CachingAllocator(expandable_segments=True)
        for block in [allocator.allocate(KIB), allocator.allocate(70 * MIB)]:
            allocator.release(block)
        allocator.empty_cache()
        self.assertEqual(allocator.reserved_bytes, 0)
        allocator.allocate(MIB)
        self.assertEqual(allocator.reserved_bytes, 2 * MIB)


class ReplayTest(unittest.TestCase):
    events = (Allocate(0, 30 * MIB), Allocate(1, 3 * MIB), Release(0), Allocate(2, 13 * MIB), Release(1))

    def test_peaks_and_what_is_lost_between_them(self) -> None:
        once = replay(self.events, steps=1)
        self.assertEqual(once, Replay(33 * MIB, 50 * MIB, 50 * MIB))
        self.assertAlmostEqual(once.fragmentation, 1 - 33 / 50)

    def test_a_second_step_reserves_nothing_new_if_its_requests_fit_where_they_were(self) -> None:
        self.assertEqual(replay(self.events, steps=2), replay(self.events, steps=1))

    def test_a_second_step_may_reserve_more_than_the_first(self) -> None:
        # The first finds nothing and puts 3 and 11 MiB into a segment of 20; the second finds 12 MiB to put 3 into.
        events = (Allocate(0, 3 * MIB), Allocate(1, 12 * MIB), Allocate(2, 11 * MIB))
        self.assertEqual(replay(events, steps=1).reserved_bytes, 32 * MIB)
        self.assertEqual(replay(events, steps=2).reserved_bytes, 44 * MIB)

    def test_nothing_reserves_nothing(self) -> None:
        self.assertEqual(replay(()), Replay(0, 0, 0))
        self.assertEqual(replay(()).fragmentation, 0)

    def test_a_name_is_allocated_once_at_a_time(self) -> None:
        with self.assertRaisesRegex(ValueError, "name=0"):
            replay((Allocate(0, 1), Allocate(0, 1)))


def traffic(seed: int, length: int = 1500) -> tuple[Event, ...]:
    """Requests from all classes of sizes that come and go, other sizes in each wave; the same on every Python."""
    draw = random.Random(seed).random
    live: list[int] = []
    events: list[Event] = []
    for name in range(length):
        if name % 200 == 0:
            sizes = [int(2 ** (25 * draw())) + 1 for _ in range(8)]
        if live and draw() < (0.3 if name % 200 < 100 else 0.7):
            events.append(Release(live.pop(int(draw() * len(live)))))
        else:
            events.append(Allocate(name, sizes[int(draw() * len(sizes))]))
            live.append(name)
    return tuple(events)


# Seed, expandable segments, capacity: peak allocated, peak reserved, reserved at the end. These are the answers of
# the allocator in the libc10_cuda of torch 2.14.1, run on a stand-in for the driver that only counts.
ANSWERS = {
    (0, False, None): (268143104, 503316480, 503316480),
    (0, False, 293601280): (268143104, 293601280, 6291456),
    (0, True, None): (264372736, 322961408, 322961408),
    (0, True, 318767104): (264372736, 318767104, 6291456),
    (1, False, None): (286120960, 471859200, 471859200),
    (1, False, 320864256): (286120960, 320864256, 224395264),
    (1, True, None): (285172736, 304087040, 304087040),
    (1, True, 299892736): (285172736, 299892736, 241172480),
    (2, False, None): (367482880, 687865856, 687865856),
    (2, False, 421527552): (367763968, 421527552, 408944640),
    (2, True, None): (364753408, 406847488, 406847488),
    (2, True, 404750336): (364753408, 404750336, 239075328),
}


class RealTest(unittest.TestCase):
    def test_it_answers_as_the_allocator_of_torch_does(self) -> None:
        for (seed, expandable, capacity), answer in ANSWERS.items():
            with self.subTest(seed=seed, expandable=expandable, capacity=capacity):
                found = replay(traffic(seed), steps=1, expandable_segments=expandable, capacity_bytes=capacity)
                self.assertEqual((found.peak_allocated_bytes, found.peak_reserved_bytes, found.reserved_bytes), answer)


def pieces(allocator: CachingAllocator, live: list[Block]) -> Iterator[Block]:
    for pool in (allocator._small, allocator._large):
        yield from pool.cached.blocks
    yield from live


class PropertiesTest(unittest.TestCase):
    @given(st.integers(0, 10**6), st.booleans(), st.sampled_from((None, 60 * MIB, 200 * MIB)))
    @settings(max_examples=60)
    def test_at_every_moment(self, seed: int, expandable: bool, capacity: int | None) -> None:
        allocator = CachingAllocator(expandable_segments=expandable, capacity_bytes=capacity)
        live: dict[int, Block] = {}
        for event in traffic(seed, length=120):
            if isinstance(event, Release):
                if event.name in live:
                    allocator.release(live.pop(event.name))
                continue
            try:
                live[event.name] = allocator.allocate(event.size)
            except OutOfMemoryError:
                continue
            self.assertGreaterEqual(live[event.name].size, event.size)
            mapped = sorted(pieces(allocator, list(live.values())), key=lambda block: block.address)
            for block, following in pairwise(mapped):
                self.assertLessEqual(block.end, following.address)
            self.assertEqual(allocator.allocated_bytes, sum(block.size for block in live.values()))
            self.assertEqual(allocator.reserved_bytes, sum(block.size for block in mapped))
            self.assertLessEqual(allocator.reserved_bytes, allocator.capacity_bytes)
        for block in live.values():
            allocator.release(block)
        self.assertEqual(allocator.allocated_bytes, 0)
        for block in pieces(allocator, []):  # merged: what is beside it, if anything, has been given back
            for neighbour in (block.before, block.after):
                self.assertFalse(neighbour and (neighbour.mapped or not expandable))
        allocator.empty_cache()
        self.assertEqual(allocator.reserved_bytes, 0)
