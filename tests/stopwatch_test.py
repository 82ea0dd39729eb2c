"""Seconds of ops: each from when it was told to have begun, for the last time, to its end."""

from __future__ import annotations

import unittest
from unittest import mock

import torch

from olla.run.stopwatch import Stopwatch


class StopwatchTest(unittest.TestCase):
    def seconds(self, told: list[tuple[int | None, float]], order: tuple[int, ...]) -> tuple[float, ...]:
        """``told`` holds position and time; None: the op that runs has ended."""
        positions: list[int] = []
        watch = Stopwatch(positions.append, torch.device("cpu"))
        for position, now in told:
            with mock.patch("time.perf_counter", return_value=now):
                if position is None:
                    watch.stop()
                else:
                    watch.tell(position)
        self.assertEqual(positions, [position for position, _ in told if position is not None])
        return watch.seconds(order, max(order) + 1)

    def test_an_op_ends_when_the_next_one_begins(self) -> None:
        self.assertEqual(self.seconds([(0, 1.0), (1, 3.0), (None, 7.0)], (1, 0)), (4.0, 2.0))

    def test_the_fastest_of_its_runs_counts(self) -> None:
        self.assertEqual(self.seconds([(0, 1.0), (1, 3.0), (2, 4.0), (None, 5.0)], (0, 1, 0)), (1.0, 1.0))

    def test_what_moves_before_and_after_an_op_is_not_counted(self) -> None:
        told = [(0, 1.0), (None, 2.0), (1, 10.0), (1, 20.0), (None, 23.0), (None, 99.0)]
        self.assertEqual(self.seconds(told, (0, 1)), (1.0, 3.0))

    def test_what_comes_back_in_the_end_belongs_to_no_op(self) -> None:
        self.assertEqual(self.seconds([(0, 1.0), (None, 2.0), (1, 5.0), (None, 9.0)], (0,)), (1.0,))


if __name__ == "__main__":
    unittest.main()
