"""Placements: sound, at most the capacity, and optimal where brute force can tell."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import unittest
from bisect import bisect_left
from itertools import chain, islice, permutations
from unittest import mock

import numpy as np
from graphs import settings  # sets the profile
from hypothesis import given
from hypothesis import strategies as st

from olla import Buffer, InfeasibleError, InvalidBuffersError, Placement, allocate
from olla.place.eject import lowered
from olla.place.greedy import first_fits, mended_fits
from olla.place.problem import Integers, Problem
from olla.place.restarts import _luby, searches
from olla.place.search import INFEASIBLE, SOLVED, UNDECIDED, Floats, search
from olla.place.tiles import empty_tiles, insert, lowest_free, neighbours, remove
from olla.place.windows import rebuilt


@st.composite
def buffers(draw: st.DrawFn, most: int = 8) -> list[Buffer]:
    """Some buffers; a few need an alignment, and one may have a fixed offset."""
    result = []
    for index in range(draw(st.integers(1, most))):
        lower = draw(st.integers(0, 8))
        alignment = draw(st.sampled_from((1, 1, 1, 2, 4)))
        fixed = draw(st.integers(0, 3)) * alignment if index == 0 and draw(st.booleans()) else None
        result.append(Buffer(lower, lower + draw(st.integers(1, 5)), draw(st.integers(0, 9)), alignment, fixed))
    return result


def searched(problem: Problem, capacity: int, worth: Floats, weight: float) -> tuple[int, int, Integers]:
    """What one search within a capacity comes to: how it ended, its nodes, the offsets."""
    return search(
        capacity,
        problem.first,
        problem.last,
        problem.sizes,
        problem.alignment,
        problem.fixed,
        *problem.overlaps(),
        worth,
        weight,
        np.zeros_like(problem.load),
        10**6,
    )


def conflicts(buffers: list[Buffer], placement: Placement) -> list[str]:
    """What is wrong with a placement."""
    found = []
    for i, (one, at) in enumerate(zip(buffers, placement.offsets, strict=True)):
        if at < 0 or at % one.alignment or (one.offset is not None and at != one.offset and one.size):
            found.append(f"{one} is at {at}")
        for other, there in zip(buffers[:i], placement.offsets[:i], strict=True):
            together = one.lower < other.upper and other.lower < one.upper and one.size and other.size
            if together and at < there + other.size and there < at + one.size:
                found.append(f"{one} at {at} and {other} at {there} overlap")
    top = max((at + b.size for b, at in zip(buffers, placement.offsets, strict=True) if b.size), default=0)
    if top != placement.arena_bytes:
        found.append(f"the arena needs {top}, not {placement.arena_bytes}")
    return found


def overlapping(buffers: list[Buffer], placement: Placement) -> bool:
    """Do two buffers share a byte? Walks through time with the sorted list of the live ones."""
    places = [(at, at + b.size) for b, at in zip(buffers, placement.offsets, strict=True)]
    events = [(b.upper, 0, place) for b, place in zip(buffers, places, strict=True)]
    events += [(b.lower, 1, place) for b, place in zip(buffers, places, strict=True)]
    alive: list[tuple[int, int]] = []
    for _, begins, place in sorted(events):
        k = bisect_left(alive, place)
        if not begins:
            alive.pop(k)
            continue
        if (k > 0 and alive[k - 1][1] > place[0]) or (k < len(alive) and alive[k][0] < place[1]):
            return True
        alive.insert(k, place)
    return False


def stream(count: int, longest: int) -> list[Buffer]:
    """One buffer after another, all of uniformly drawn sizes and lifetimes: no first fit places them well."""
    draw = np.random.default_rng(0)
    lives, sizes = draw.integers(1, longest, count), draw.integers(1, 2**20, count)
    return [Buffer(t, t + int(life), int(size)) for t, (life, size) in enumerate(zip(lives, sizes, strict=True))]


def tight() -> list[Buffer]:
    """A square of 36 x 36, cut by random guillotine cuts: no byte may be wasted, and first fits waste some."""
    draw = np.random.default_rng(1)
    pieces = [(0, 36, 0, 36)]
    while len(pieces) < 60:
        left, right, low, high = pieces.pop(int(np.argmax([(b - a) * (d - c) for a, b, c, d in pieces])))
        if right - left > high - low:
            cut = int(draw.integers(left + 1, right))
            pieces += [(left, cut, low, high), (cut, right, low, high)]
        else:
            cut = int(draw.integers(low + 1, high))
            pieces += [(left, right, low, cut), (left, right, cut, high)]
    return [Buffer(left, right, high - low) for left, right, low, high in pieces]


def optimum(buffers: list[Buffer]) -> int:
    """The smallest arena: some order, each buffer at the lowest free offset, is a best placement."""
    solid = [buffer for buffer in buffers if buffer.size]
    best = 10**9
    for order in permutations(solid):
        placed: list[tuple[Buffer, int]] = []
        for buffer in sorted(order, key=lambda buffer: buffer.offset is None):
            around = [(at, at + b.size) for b, at in placed if b.lower < buffer.upper and buffer.lower < b.upper]
            tops = [0, *(-(-end // buffer.alignment) * buffer.alignment for _, end in around)]
            free = [t for t in tops if all(t + buffer.size <= start or end <= t for start, end in around)]
            placed.append((buffer, min(free) if buffer.offset is None else buffer.offset))
        best = min(best, max((at + b.size for b, at in placed), default=0))
    return best


class AllocateTest(unittest.TestCase):
    @settings(max_examples=200)
    @given(buffers(most=5))
    def test_small_placements_are_optimal(self, given: list[Buffer]) -> None:
        best = optimum(given)
        placement = allocate(given, time_limit=0.2)
        self.assertEqual(conflicts(given, placement), [])
        self.assertLessEqual(placement.lower_bound_bytes, best)
        self.assertEqual(placement.arena_bytes, best)

    @given(buffers())
    def test_every_first_fit_is_sound(self, given: list[Buffer]) -> None:
        solid = [buffer for buffer in given if buffer.size]
        problem = Problem.of(solid)
        for method, offsets in filter(None, first_fits(problem)):
            top = int((offsets + [buffer.size for buffer in solid]).max(initial=0))
            self.assertEqual(conflicts(solid, Placement(tuple(offsets.tolist()), top)), [], method)

    def test_what_is_near_the_fullest_section_is_placed_in_the_order_of_time(self) -> None:
        logits = [Buffer(8, 11, 8), Buffer(9, 12, 8), Buffer(9, 13, 8), Buffer(10, 15, 8)]  # of a language model
        gradients = [Buffer(12, 100, 10), Buffer(13, 100, 10)]  # need the place of two logits each, as these go
        between = [Buffer(11, 16, 1), Buffer(12, 17, 1)]  # must not split these places
        others = [Buffer(0, 1, 1), Buffer(0, 2, 5), Buffer(1, 100, 40), Buffer(50, 51, 10)]
        problem = Problem.of([*logits, *gradients, *between, *others])
        tops = {name: int((offsets + problem.sizes).max()) for name, offsets in filter(None, first_fits(problem))}
        self.assertEqual(tops.pop("first fit by distance from the fullest, then size"), problem.bound)
        self.assertGreater(min(tops.values()), problem.bound)

    def test_first_fits_do_not_depend_on_how_the_buffers_are_given(self) -> None:
        draw = np.random.default_rng(0)
        lives, sizes = draw.integers(2, 40, 400), draw.choice([1, 2, 4, 8], 400)  # few sizes, so many are alike
        given = [Buffer(t, t + int(life), int(size)) for t, (life, size) in enumerate(zip(lives, sizes, strict=True))]
        given += [Buffer(t, t + 1, 999) for t in range(400)]  # so that each time is a section of its own
        shuffled = draw.permutation(len(given))
        fits = dict(filter(None, first_fits(Problem.of(given))))
        others = dict(filter(None, first_fits(Problem.of([given[index] for index in shuffled]))))
        for method, offsets in fits.items():
            self.assertEqual(offsets[shuffled].tolist(), others[method].tolist(), method)

    @given(buffers(most=20))
    def test_every_mended_fit_and_every_lowered_placement_is_sound(self, given: list[Buffer]) -> None:
        solid = [Buffer(0, 1, 1), *(buffer for buffer in given if buffer.size and buffer.offset is None)]
        problem = Problem.of(solid)
        fits = [offsets for _, offsets in filter(None, first_fits(problem))]
        fits.sort(key=lambda offsets: -(offsets + problem.sizes).max())  # the worst one has the first turn
        random = np.random.default_rng(0)
        tries = islice(filter(None, chain(lowered(problem, fits, random), mended_fits(problem, random))), 40)
        for method, offsets in tries:
            top = int((offsets + problem.sizes).max())
            self.assertEqual(conflicts(solid, Placement(tuple(offsets.tolist()), top)), [], method)

    @given(buffers(most=20))
    def test_the_tiles_agree_with_a_look_at_all_buffers(self, given: list[Buffer]) -> None:
        solid = [buffer for buffer in given if buffer.size and buffer.offset is None]
        tiles = empty_tiles(Problem.of(solid))
        placed: dict[int, int] = {}
        for index in [*range(len(solid)), *range(0, len(solid), 3)]:
            if index in placed:  # the second time
                remove(tiles, index)
                del placed[index]
            one = solid[index]
            around = {i: at for i, at in placed.items() if solid[i].lower < one.upper and one.lower < solid[i].upper}
            self.assertEqual(sorted(neighbours(tiles, index)), sorted(around))
            at = 0
            while any(at < begin + solid[i].size and begin < at + one.size for i, begin in around.items()):
                at += one.alignment
            self.assertEqual(lowest_free(tiles, index), at)
            insert(tiles, index, at)
            placed[index] = at

    def test_what_is_fixed_stays_where_it_is(self) -> None:
        draw = np.random.default_rng(3)
        given = [Buffer(i, i + int(draw.integers(1, 30)), int(draw.integers(1, 99))) for i in range(300)]
        given += [Buffer(0, 200, 10, offset=400), Buffer(100, 330, 64, alignment=64, offset=128)]
        placement = allocate(given, time_limit=2)
        self.assertEqual(conflicts(given, placement), [])

    @settings(max_examples=200)
    @given(buffers(most=5), st.integers(-2, 2), st.data())
    def test_the_search_is_exact(self, given: list[Buffer], slack: int, data: st.DataObject) -> None:
        solid = [buffer for buffer in given if buffer.size]
        problem = Problem.of(solid)
        capacity = optimum(given) + slack
        worth = np.array([data.draw(st.floats(-3, 3)) for _ in solid])
        status, _, offsets = searched(problem, capacity, worth, data.draw(st.sampled_from([0.0, 1.0, 1e9])))
        top = int((offsets + problem.sizes).max(initial=0))
        if slack < 0 and solid:
            fits = problem.fixed + problem.sizes <= capacity
            self.assertTrue(status == INFEASIBLE or not fits.all())
        else:
            self.assertEqual(status, SOLVED)
            self.assertLessEqual(top, max(capacity, 0))
            self.assertEqual(conflicts(solid, Placement(tuple(offsets.tolist()), top)), [])

    @given(buffers())
    def test_buffers_share_a_section_if_and_only_if_they_overlap_in_time(self, given: list[Buffer]) -> None:
        problem = Problem.of(given)
        for i, one in enumerate(given):
            for j, other in enumerate(given):
                together = one.lower < other.upper and other.lower < one.upper
                self.assertEqual(problem.first[i] <= problem.last[j] and problem.first[j] <= problem.last[i], together)
        for values in (problem.load, np.arange(len(problem.load))):
            for b, value in enumerate(problem.largest(values)):
                self.assertEqual(value, values[problem.first[b] : problem.last[b] + 1].max())

    @given(buffers())
    def test_the_same_buffers_give_the_same_placement(self, given: list[Buffer]) -> None:
        self.assertEqual(allocate(given, 100).offsets, allocate(given, 100).offsets)

    def test_a_capacity_ends_the_search(self) -> None:
        pair = [Buffer(0, 2, 3), Buffer(1, 3, 4)]
        self.assertEqual(allocate(pair, 7).arena_bytes, 7)
        with self.assertRaisesRegex(InfeasibleError, "within 6 bytes: at least 7 are needed") as caught:
            allocate(pair, 6)
        self.assertEqual((caught.exception.lower_bound_bytes, caught.exception.best_bytes), (7, 7))

    def test_a_capacity_below_the_largest_buffer(self) -> None:
        with self.assertRaisesRegex(InfeasibleError, "at least 9"):
            allocate([Buffer(0, 1, 9)], 8)

    def test_nothing_to_place(self) -> None:
        self.assertEqual(allocate([]).arena_bytes, 0)
        self.assertEqual(allocate([Buffer(0, 1, 0)]).offsets, (0,))

    def test_an_alignment_for_all(self) -> None:
        # The second one can only be at multiples of 12, the first one at multiples of 6.
        placement = allocate([Buffer(0, 1, 3), Buffer(0, 1, 3, alignment=4)], alignment=6)
        self.assertEqual((placement.offsets, placement.arena_bytes), ((6, 0), 9))

    def test_fixed_offsets_that_overlap(self) -> None:
        with self.assertRaisesRegex(InvalidBuffersError, "buffer a and buffer b have fixed offsets that overlap"):
            allocate([Buffer(0, 2, 4, offset=0, name="a"), Buffer(1, 3, 4, offset=3, name="b")])

    def test_a_fixed_offset_that_is_not_aligned(self) -> None:
        with self.assertRaisesRegex(InvalidBuffersError, "buffer 0 is fixed at 4, which is not a multiple of 8"):
            allocate([Buffer(0, 2, 4, offset=4)], alignment=8)

    def test_the_sequence_of_luby(self) -> None:
        self.assertEqual([_luby(i) for i in range(1, 16)], [1, 1, 2, 1, 1, 2, 4, 1, 1, 2, 1, 1, 2, 4, 8])

    def test_every_search_may_place_all_buffers(self) -> None:
        problem = Problem.of([Buffer(t, t + 2, 1) for t in range(1_500)])
        undecided = UNDECIDED, 0, np.zeros(1_500, np.int64)
        with mock.patch("olla.place.restarts.search", return_value=undecided) as called:
            found = list(searches(problem, 2, 6, np.random.default_rng(0), np.zeros_like(problem.load)))
        self.assertEqual((len(found), called.call_count), (12, 12))
        self.assertGreater(min(call.args[-1] for call in called.call_args_list), 1_500)

    def test_searches_prefer_the_longest_in_time_then_in_sections_then_the_largest(self) -> None:
        long, wide, large = Buffer(0, 99, 1), Buffer(99, 109, 2), Buffer(109, 114, 100)
        beside = [Buffer(t, t + 1, 1) for t in range(99, 114)]  # a section each
        problem = Problem.of([long, wide, large, *beside])
        undecided = UNDECIDED, 0, np.zeros(len(problem.sizes), np.int64)
        with mock.patch("olla.place.restarts.search", return_value=undecided) as called:
            list(searches(problem, 101, 5, np.random.default_rng(0), np.zeros_like(problem.load)))
        listed = [
            int(worth.argmax()) for *_, worth, weight, _, _ in (c.args for c in called.call_args_list) if weight > 9
        ]
        self.assertEqual(listed, [0, 1, 2])

    def test_the_load_that_is_left_decides_and_not_that_of_the_whole(self) -> None:
        lives = (
            *((12, 25, 2), (0, 12, 3), (11, 16, 7), (2, 12, 3), (11, 12, 8), (5, 12, 3), (19, 21, 7), (12, 16, 6)),
            *((16, 21, 6), (12, 16, 4), (16, 25, 4), (16, 23, 2), (16, 23, 5), (23, 30, 3), (12, 19, 1), (12, 16, 4)),
            *((16, 23, 4), (9, 12, 6), (12, 16, 6), (16, 19, 6)),
        )
        problem = Problem.of([Buffer(*life) for life in lives])
        length, load = (np.log(of) for of in (problem.last - problem.first + 1, problem.largest(problem.load)))
        nodes = []
        for worth, weight in ((1e6 * length, 1e9), (1e6 * length + 1e9 * load, 0.0)):
            status, visited, _ = searched(problem, problem.bound, worth, weight)
            self.assertEqual(status, SOLVED)
            nodes.append(visited)
        self.assertEqual(nodes[0], len(lives))  # none in vain
        self.assertGreater(nodes[1], 2 * len(lives))

    @given(buffers(most=5))
    def test_the_smallest_arena_is_a_multiple_of_the_unit(self, given: list[Buffer]) -> None:
        solid = [buffer for buffer in given if buffer.size]
        if solid:
            self.assertEqual(optimum(solid) % Problem.of(solid).unit, 0)

    def test_the_unit_of_sizes_fixed_offsets_and_alignments(self) -> None:
        self.assertEqual(Problem.of([Buffer(0, 2, 12), Buffer(1, 3, 8, alignment=2)]).unit, 4)
        self.assertEqual(Problem.of([Buffer(0, 2, 12), Buffer(1, 3, 8, offset=2)]).unit, 2)
        self.assertEqual(Problem.of([Buffer(0, 2, 12), Buffer(1, 3, 8, alignment=6)]).unit, 2)
        self.assertEqual(Problem.of([Buffer(0, 2, 3), Buffer(1, 3, 9, alignment=64)]).unit, 1)
        self.assertEqual(Problem.of([Buffer(0, 2, 12, alignment=9), Buffer(1, 3, 24, alignment=4)]).unit, 1)

    def test_ejections_begin_below_a_placement_that_is_known(self) -> None:
        given = stream(1_000, longest=40)
        problem = Problem.of(given)
        fits = sorted((int((offsets + problem.sizes).max()), offsets.tolist()) for _, offsets in first_fits(problem))
        (known, _), (worst, offsets) = fits[0], fits[-1]
        self.assertLess(known, worst)
        random = np.random.default_rng(0)
        lower = islice(filter(None, lowered(problem, [np.array(offsets)], random, known)), 3)
        tops = [known, *(int((found + problem.sizes).max()) for _, found in lower)]
        self.assertEqual(len(tops), 4)
        self.assertEqual(tops, sorted(set(tops), reverse=True))

    def test_a_tight_instance_is_solved(self) -> None:
        square = tight()
        problem = Problem.of(square)
        first_fit = min(int((offsets + problem.sizes).max()) for _, offsets in filter(None, first_fits(problem)))
        self.assertGreater(first_fit, 36)
        self.assertTrue(allocate(square, gap=1.0).method.startswith("first fit"))  # near enough
        placement = allocate(square, capacity=36)
        self.assertEqual(conflicts(square, placement), [])
        self.assertEqual((placement.arena_bytes, placement.lower_bound_bytes, placement.method), (36, 36, "search"))

    def test_a_large_placement_is_close_to_the_load(self) -> None:
        given = stream(20_000, longest=80)
        problem = Problem.of(given)
        first_fit = min(int((offsets + problem.sizes).max()) for _, offsets in filter(None, first_fits(problem)))
        self.assertGreater(first_fit, 1.003 * problem.bound)
        placement = allocate(given, time_limit=30)
        self.assertFalse(overlapping(given, placement))
        self.assertLessEqual(placement.gap, 0.0001)

    def test_windows_lower_a_large_placement_around_what_is_fixed(self) -> None:
        given = [*stream(4_000, longest=40), Buffer(1_000, 3_000, 2**20, offset=2**24)]
        problem = Problem.of(given)
        _, offsets = next(filter(None, first_fits(problem)))
        top = int((offsets + problem.sizes).max())
        self.assertGreater(top, 1.01 * problem.bound)
        (_, lower), *_ = filter(None, rebuilt(problem, offsets, np.random.default_rng(0)))
        placement = Placement(tuple(lower.tolist()), int((lower + problem.sizes).max()))
        self.assertLess(placement.arena_bytes, top)
        self.assertEqual(placement.offsets[-1], 2**24)
        self.assertFalse(overlapping(given, placement))

    def test_a_large_placement_ends_when_nothing_makes_it_lower(self) -> None:
        given = [Buffer(t, t + 2, 3, alignment=2) for t in range(3_001)]  # two at once: 6 bytes, which need 7
        placement = allocate(given, time_limit=60)
        self.assertEqual((placement.arena_bytes, placement.lower_bound_bytes), (7, 6))
        self.assertLess(placement.seconds, 60)  # before its time is over

    @unittest.skipUnless(os.environ.get("RUN_SKIPPED"), "compiles the search anew: RUN_SKIPPED=1 runs it")
    def test_compiling_is_not_counted(self) -> None:
        rows = [(buffer.lower, buffer.upper, buffer.size) for buffer in tight()]
        placed = f"allocate([Buffer(*row) for row in {rows}], time_limit=1)"
        code = f"from olla import Buffer, allocate; print({placed}.arena_bytes)"
        with tempfile.TemporaryDirectory() as fresh:
            environment = {**os.environ, "NUMBA_CACHE_DIR": fresh}
            found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        self.assertEqual((found.stdout, found.returncode), ("36\n", 0), found.stderr)

    def test_time_ends_the_improvement_of_a_large_placement(self) -> None:
        given = stream(10_000, longest=5_000)
        placement = allocate(given, time_limit=1)
        self.assertFalse(overlapping(given, placement))
        self.assertEqual(placement.status, "feasible")
        self.assertLess(placement.seconds, 10)
