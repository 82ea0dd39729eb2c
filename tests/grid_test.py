"""What is large is placed first, in whole units where sizes are few, and what is small around it."""

from __future__ import annotations

import unittest
from collections.abc import Iterator

import numpy as np

from olla import Buffer, allocate
from olla.place.allocate import _Search
from olla.place.grid import Grid, grids
from olla.place.problem import Problem

UNIT, UNITS, STEPS = 605_184, 40, 64


def dense(seed: int) -> list[Buffer]:
    """A full rectangle of UNITS by STEPS, cut up at random, and a strip of small buffers beside it; sizes are bytes."""
    random = np.random.default_rng(seed)
    rectangles, pieces = [(0, STEPS, UNITS)], []
    while rectangles:
        begin, end, units = rectangles.pop()
        if (end - begin) * units < 60:
            pieces.append(Buffer(begin, end, units * UNIT))
        elif end - begin > 1 and (units == 1 or random.random() < 0.5):
            at = int(random.integers(begin + 1, end))
            rectangles += [(begin, at, units), (at, end, units)]
        else:
            at = int(random.integers(1, units))
            rectangles += [(begin, end, at), (begin, end, units - at)]
    return [*pieces, *(Buffer(step, step + 1, 64 * int(random.integers(1, 9))) for step in range(STEPS))]


def rounded(problem: Problem) -> Iterator[Grid]:
    return (grid for grid in grids(problem, 1_000) if grid.is_rounded)


class GridTest(unittest.TestCase):
    def test_first_comes_what_is_large_as_it_is_if_little_is_small(self) -> None:
        problem = Problem.of(dense(0))
        finest = next(grids(problem, 1_000))
        self.assertFalse(finest.is_rounded)
        self.assertEqual(finest.large.tolist(), (problem.sizes >= UNIT).tolist())
        self.assertEqual(finest.problem.bound * finest.unit, UNITS * UNIT)
        much_is_small = [*dense(0), *[Buffer(STEPS, STEPS + 1, 2_000)] * 130]
        self.assertNotIn(False, [grid.is_rounded for grid in grids(Problem.of(much_is_small), 1_000)])

    def test_the_unit_is_found(self) -> None:
        problem = Problem.of(dense(0))
        grid = next(rounded(problem))
        self.assertEqual((grid.unit, grid.problem.bound), (UNIT, UNITS))
        self.assertEqual(grid.large.tolist(), (problem.sizes >= UNIT).tolist())
        self.assertEqual(grid.problem.sizes.tolist(), (problem.sizes[grid.large] // UNIT).tolist())

    def test_sizes_that_nearly_fit_are_rounded_up(self) -> None:
        buffers = [Buffer(b.lower, b.upper, b.size - (b.size > 3 * UNIT)) for b in dense(1)]
        grid = next(rounded(Problem.of(buffers)))
        self.assertEqual(grid.problem.sizes.tolist(), [-(-b.size // UNIT) for b in buffers if b.size > UNIT // 2])

    def test_nothing_is_rounded_where_that_costs_too_much(self) -> None:
        random = np.random.default_rng(0)
        buffers = [Buffer(k % 7, k % 7 + 3, int(random.integers(10**6, 10**8))) for k in range(60)]
        self.assertEqual(list(rounded(Problem.of(buffers))), [])

    def test_of_more_buffers_than_are_searched_there_is_the_finest_or_none(self) -> None:
        problem = Problem.of(dense(0))
        finest, *others = grids(problem, 1_000)
        large = int(finest.large.sum())
        self.assertTrue(others)
        self.assertLess(large, len(problem.sizes))
        self.assertEqual([grid.is_rounded for grid in grids(problem, large)], [False])
        self.assertEqual(list(grids(problem, large - 1)), [])

    def test_there_is_none_around_fixed_buffers(self) -> None:
        fixed = Buffer(0, 1, UNIT, offset=0)
        self.assertEqual(list(grids(Problem.of([*dense(0), fixed]), 1_000)), [])

    def test_a_grid_leads_to_a_sound_placement_at_the_bound(self) -> None:
        for seed in range(6):
            buffers = dense(seed)
            problem = Problem.of(buffers)
            found = _Search(problem, None, 0.0, float("inf"))
            found._search_grids()
            self.assertEqual(found.top, problem.bound)
            free = [
                Buffer(b.lower, b.upper, b.size, offset=int(at)) for b, at in zip(buffers, found.offsets, strict=True)
            ]
            self.assertEqual(allocate(free).arena_bytes, problem.bound)  # it refuses offsets that overlap

    def test_a_unit_is_a_multiple_of_the_alignment(self) -> None:
        buffers = [Buffer(b.lower, b.upper, b.size, alignment=512) for b in dense(2)]
        for grid in grids(Problem.of(buffers), 1_000):
            self.assertEqual(grid.unit % 512, 0)


if __name__ == "__main__":
    unittest.main()
