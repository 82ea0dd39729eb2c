"""The long run of ``benchmarks.py --soak``, with fewer steps: what it notes is what happened."""

from __future__ import annotations

import unittest
from unittest import mock

import torch

from bench.soak import soak


class SoakTest(unittest.TestCase):
    def test_a_moment_every_hundred_steps_and_no_address_is_missed(self) -> None:
        moments = list(soak(200))
        self.assertEqual([moment.steps for moment in moments], [0, 100, 200])
        self.assertEqual([moment.missed for moment in moments], [0] * 3)

    def test_what_grows_is_seen(self) -> None:
        resident, kept = [], []
        for moment in soak(200):
            resident.append(moment.resident_bytes)
            kept.append(torch.ones(2**23))  # 32 MiB
        self.assertGreater(resident[-1] - resident[0], 0.9 * 2 * 2**25)

    def test_what_misses_its_address_is_counted(self) -> None:
        with mock.patch("olla.run.arena.Counts.missed", property(lambda counts: 1)), self.assertLogs("olla", "WARNING"):
            self.assertGreater([*soak(100)][-1].missed, 0)


if __name__ == "__main__":
    unittest.main()
