from __future__ import annotations

import json
import tempfile
import unittest
from pathlib import Path

from graphs import diamond

from olla import InvalidPlanError, Plan
from olla.graph.plan import Addresses, Schedule, Spill, Workspace, extra_runs

ADDRESSES = Addresses((0, 4, None, 0, 1), (Workspace(2, 12, 8),), 20, 15)


def example(addresses: Addresses | None = None) -> Plan:
    return Plan.of(diamond(), Schedule((0, 1, 3, 2, 4, 5), 15, 14, "by hand", 0.5), addresses)


class PlanTest(unittest.TestCase):
    def test_a_plan_knows_the_baseline_and_the_persistent_bytes_of_its_graph(self) -> None:
        plan = example()
        self.assertEqual((plan.baseline_peak_bytes, plan.persistent_bytes), (15, 100))

    def test_gap_saving_and_status(self) -> None:
        plan = example()
        self.assertAlmostEqual(plan.gap, 1 / 14)
        self.assertEqual(plan.saving, 0)
        self.assertEqual(plan.status, "feasible")
        optimal = Plan.of(diamond(), Schedule(tuple(range(6)), 15, 15, "by hand", 0.0))
        self.assertEqual((optimal.gap, optimal.status), (0.0, "optimal"))

    def test_fragmentation_is_what_the_arena_wastes(self) -> None:
        self.assertIsNone(example().fragmentation)
        self.assertEqual(example(ADDRESSES).fragmentation, 0.25)

    def test_extra_runs_are_declared(self) -> None:
        self.assertEqual(extra_runs((0, 1, 2, 1, 0, 1)), (0, 1, 1))

    def test_json_round_trip(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "plan.json"
            spilled = Plan.of(
                diamond(), Schedule((0, 1, 3, 2, 4, 5), 14, 14, "by hand", 0.5, (Spill(1, 2, 3),), 0.25, 0.125)
            )
            for plan in (example(), example(ADDRESSES), spilled):
                plan.save(path)
                self.assertEqual(Plan.load(path), plan)

    def test_what_is_no_plan_is_refused(self) -> None:
        good = example().to_dict()
        bad = [
            [],
            {},
            {**good, "format": "other"},
            {**good, "order": None},
            {**good, "order": [0, "1"]},
            {**good, "peak_bytes": "15"},
            {**good, "offsets": 3},
            {**good, "offsets": ["0"]},
            {**good, "workspaces": [[1, 2]]},
            {**good, "spills": [[1, 2]]},
            {**good, "spills": 3},
            {**good, "extra_seconds": "1"},
            {**good, "workspaces": [[1, 2, "3"]]},
            {**good, "surprise": 1},
            {key: value for key, value in good.items() if key != "method"},
        ]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "plan.json"
            for data in bad:
                path.write_text(json.dumps(data))
                with self.assertRaises(InvalidPlanError):
                    Plan.load(path)
            path.write_bytes(b"\xff{")
            with self.assertRaisesRegex(InvalidPlanError, "is not JSON"):
                Plan.load(path)
