"""Where a buffer is forced in, held against all offsets; which starts go on."""

from __future__ import annotations

import unittest
from collections.abc import Iterator
from itertools import product
from unittest import mock

import numpy as np

from olla import Buffer
from olla.place.eject import Numbers, _lightest, _sorted_by, lowered
from olla.place.problem import Integers, Problem
from olla.place.tiles import empty_tiles, insert, neighbours

CEILING = 400


class EjectTest(unittest.TestCase):
    def test_a_buffer_is_forced_in_where_those_in_the_way_weigh_least(self) -> None:
        draw, seen = np.random.default_rng(0), 0
        counts = (0, 1, *[5, 12, 25] * 8, 600)  # the last are so many that they are sorted by digits
        for count, alignment, fixed in product(counts, (1, 16), (0, 1, 3)):
            with self.subTest(count=count, alignment=alignment, fixed=fixed):
                bottoms, sizes = draw.integers(0, CEILING, count), draw.integers(1, 60, count)
                buffers = [
                    Buffer(0, 1, int(size), offset=int(bottom) if i < fixed else None)
                    for i, (bottom, size) in enumerate(zip(bottoms, sizes, strict=True))
                ]
                size = int(draw.integers(1, 100))
                problem = Problem.of([*buffers, Buffer(0, 1, size, alignment=alignment)])
                tiles = empty_tiles(problem)
                for buffer, bottom in enumerate(bottoms):
                    insert(tiles, buffer, bottom)
                weight = draw.integers(1, 10, count + 1).astype(np.float64)
                weight[:fixed] = 0  # so that nothing but their being fixed speaks against them

                at = _lightest(tiles, count, neighbours(tiles, count), CEILING, weight)
                totals = weights_in_the_way(bottoms, sizes, weight[:-1], size)
                is_fixed = (np.arange(count) < fixed).astype(np.float64)
                totals[weights_in_the_way(bottoms, sizes, is_fixed, size) > 0] = np.inf
                least = totals[::alignment].min()
                self.assertEqual(np.inf if at < 0 else totals[at], least)
                self.assertTrue(at < 0 or (at % alignment == 0 and at + size <= CEILING))
                seen += least < np.inf
        self.assertGreater(seen, 20)

    def test_the_starts_that_can_be_lowered_go_on(self) -> None:
        problem = Problem.of([Buffer(0, 1, 1_000), Buffer(1, 2, 1)])
        starts = [np.array([1_000, start]) for start in range(4)]  # the offset of the last buffer tells the start
        lowest = (1_900, 1_500, 1_200, 1_100)
        tried: list[tuple[int, int]] = []

        def below(_: Problem, offsets: Integers, ceiling: int, *__: object) -> Iterator[Integers | None]:
            tried.append((int(offsets[1]), ceiling))
            yield None
            if lowest[offsets[1]] <= ceiling:
                yield np.array([ceiling - 1_000, offsets[1]])

        with mock.patch("olla.place.eject._below", below):
            found = list(filter(None, lowered(problem, starts, np.random.default_rng(0))))
        self.assertEqual(
            tried[:8],
            [
                *((0, 1_750), (1, 1_750)),  # one after another, until one is low enough; a quarter of the way, then
                *((1, 1_375), (2, 1_375)),  # half of it, where 0 need not try,
                *((2, 1_000), (3, 1_000)),  # all of it, then half of it again, for the first two,
                *((2, 1_187), (2, 1_281)),  # and a quarter, for the first one
            ],
        )
        tops = [int(offsets[0]) + 1_000 for _, offsets in found]
        self.assertEqual(tops[:3], [1_750, 1_375, 1_281])
        self.assertEqual(tops, sorted(tops, reverse=True))
        self.assertLess(abs(tops[-1] - 1_200), 5)

    def test_values_of_any_size_are_sorted(self) -> None:
        draw = np.random.default_rng(0)
        for bits in (1, 11, 12, 13, 40, 62):
            values = draw.integers(-(2**bits), 2**bits, 1_000)
            self.assertEqual(values[_sorted_by(values)].tolist(), sorted(values.tolist()))


def weights_in_the_way(bottoms: Integers, sizes: Integers, weights: Numbers, size: int) -> Numbers:
    """Of a buffer of that size, at each offset below the ceiling."""
    at = np.arange(CEILING - size + 1)[:, None]
    return ((bottoms < at + size) & (at < bottoms + sizes)) @ weights
