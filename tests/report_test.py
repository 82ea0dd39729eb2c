from __future__ import annotations

import json
import sys
import unittest
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from eager import sgd
from graphs import diamond, tangled
from torch import Tensor, nn

import olla
from olla.graph.graph import Graph, Op, Storage
from olla.graph.plan import Plan, Schedule
from olla.order.schedule import program_order, schedule
from olla.place.place import place
from olla.show.advice import advice
from olla.show.report import Report
from olla.show.size import format_bytes


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(256, 256) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class ReportTest(unittest.TestCase):
    def test_it_shows_plan_and_measurement_side_by_side(self) -> None:
        model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
        x = torch.randn(4, 256)
        step = olla.optimize(model, x, optimizer=sgd(model.parameters()))
        self.assertIn("not yet: call step.measure", str(step.report()))
        measured = step.measure(x)
        text, markdown = str(step.report()), step.report().to_markdown()
        for size in (step.plan.peak_bytes, step.plan.baseline_peak_bytes, measured.peak_bytes):
            self.assertIn(f"{size / 2**20:,.2f} MiB", text)
            self.assertIn(f"{size / 2**20:,.2f} MiB", markdown)
        self.assertIn(step.plan.method, text)
        data = json.loads(json.dumps(step.report().to_dict()))
        self.assertEqual(data["measured"]["peak_bytes"], measured.peak_bytes)
        self.assertEqual(data["measured"]["arena"]["hits"], measured.arena.hits)

    def test_it_names_what_is_in_memory_at_the_peak_and_the_lines_of_the_model(self) -> None:
        model, x = Model(), torch.randn(4096, 256)
        step = olla.optimize(model, x, optimizer=sgd(model.parameters()))
        report = step.report()
        text = str(report)
        self.assertLess(len(text.splitlines()), 40)
        data = json.loads(json.dumps(report.to_dict()))
        self.assertIsNone(data["measured"])
        storages = data["peak"]["storages"]
        self.assertEqual(sum(storage["bytes"] for storage in storages), step.plan.peak_bytes)
        self.assertEqual(storages, sorted(storages, key=lambda storage: -storage["bytes"]))
        lines = Path(__file__).read_text().splitlines()
        made = [s for s in storages if s["op"] == "aten.addmm.default"]
        self.assertGreaterEqual(len(made), 3)
        for storage in made:
            file, line = storage["source"].rsplit(":", 1)
            self.assertEqual(file, __file__)
            self.assertIn("torch.tanh(layer(x))", lines[int(line) - 1])
            self.assertIn(f"tests/report_test.py:{line}", text)
        self.assertIn("backward of tests/report_test.py", text)

    def test_it_is_a_table_for_pandas(self) -> None:
        model, x = Model(), torch.randn(8, 256)
        report = olla.optimize(model, x, optimizer=sgd(model.parameters())).report()
        table = report.to_pandas()
        self.assertEqual(table["bytes"].sum(), report.plan.peak_bytes)
        self.assertEqual(table.to_dict("records"), report.to_dict()["peak"]["storages"])
        with mock.patch.dict(sys.modules, pandas=None), self.assertRaisesRegex(olla.OllaError, "pip install pandas"):
            report.to_pandas()

    def test_an_empty_step_has_a_report(self) -> None:
        graph = Graph((Op("nothing"),), ())
        report = Report(graph, Plan.of(graph, program_order(graph)), None)
        self.assertIn("at the peak, step 0 of 1: nothing", str(report))
        self.assertTrue(report.to_pandas().empty)
        self.assertIn("| bytes | storage |", report.to_markdown())

    def test_bytes_are_written_for_people(self) -> None:
        sizes = {1000: "1,000 bytes", 2048: "2.00 KiB", 2**20: "1.00 MiB", 10 * 2**30: "10.00 GiB"}
        for size, text in sizes.items():
            self.assertEqual(format_bytes(size), text)


class AdviceTest(unittest.TestCase):
    def test_a_proven_order_is_left_to_a_budget(self) -> None:
        graph = tangled(30, seed=1)
        plan = Plan.of(graph, schedule(graph))
        self.assertEqual(plan.gap, 0)
        self.assertRegex(advice(graph, plan)[0], "^no order needs less: memory_budget= ")

    def test_an_order_with_a_gap_may_be_improved(self) -> None:
        graph = tangled(30, seed=1)
        found = program_order(graph)
        found = replace(found, lower_bound_bytes=found.peak_bytes // 2)
        self.assertRegex(
            advice(graph, Plan.of(graph, found))[0], "^another order may need up to 50.31% less: .*time_limit="
        )

    def test_an_op_that_is_the_peak_by_itself_is_named(self) -> None:
        graph = diamond()
        wide = replace(graph, storages=tuple(replace(s, size=9999) if s.name == "wide" else s for s in graph.storages))
        self.assertRegex(advice(wide, Plan.of(wide, schedule(wide)))[0], "^op 'widen' alone is 100.0% of the peak")

    def test_with_a_budget_time_is_the_price(self) -> None:
        graph = Graph(
            (Op("a", creates=(0,)), Op("b", creates=(1,), reads=(0,)), Op("c", creates=(2,)), Op("d", reads=(0, 1, 2))),
            (Storage("a", 6), Storage("b", 1), Storage("c", 4)),
        )
        plan = Plan.of(graph, Schedule((0, 1, 2, 0, 3), 12, 11, "by hand", 0.0))
        self.assertRegex(advice(graph, plan)[0], "^a smaller memory_budget= takes more time, spill_dir= ")

    def test_fragmentation_and_what_persists_are_told_where_they_matter(self) -> None:
        graph = diamond()
        plan = Plan.of(graph, schedule(graph))
        plan = plan.at(place(graph, plan.order, alignment=1))
        [_, persistent] = advice(graph, plan)
        self.assertIn("87% of all bytes live across steps", persistent)  # 100 of 115
        wasteful = replace(plan, arena_bytes=20, arena_lower_bound_bytes=15, persistent_bytes=3)
        [_, fragmented] = advice(graph, wasteful)
        self.assertIn("25.00% of the arena is fragmentation: a larger time_limit=", fragmented)
