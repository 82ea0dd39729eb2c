"""What pages quote from logs: figures that are worked by hand."""

from __future__ import annotations

import tempfile
import unittest
from pathlib import Path
from unittest import mock

from bench import blocks
from bench.contest import Result
from bench.document import fill, write_document
from bench.evidence import Evidence
from bench.row import Row
from olla.errors import OllaError

MADE = {"machine": "a machine", "date": "2026-01-02", "command": "python benchmarks.py"}
MIB = 2**20


def result(contender: str, peak: int, ratio: float, **more: float) -> Result:
    return Result("gpt2_6x384", "train", contender, peak_bytes=peak * MIB, time_ratio=ratio, **more, **MADE)


def row(model: str, device: str | None, **more: object) -> Row:
    return Row(model, 1, "train", device=device, **MADE, **more)


def simulated(model: str, **more: object) -> Row:
    figures = {
        "simulated_eager_bytes": 100, "simulated_planned_bytes": 50, "simulated_arena_bytes": 60, "gap": 0.0,
        "reserved_eager_bytes": 200, "reserved_planned_bytes": 150, "reserved_arena_bytes": 80,
        "simulated_fragmentation": 0.0, "planning_seconds": 0.5, "placing_seconds": 0.25,
        "inductor_lpmf_bytes": 75, "inductor_bfs_bytes": 100, "inductor_dfs_bytes": 100,
    }  # fmt: skip
    return row(model, None, **{**figures, **more})


def measured(model: str, device: str, **more: object) -> Row:
    figures = {
        "measured_eager_bytes": 8 * MIB, "measured_planned_bytes": 2 * MIB, "measured_saving": 0.75, "time_ratio": 0.5,
        "exact": True, "fragmentation": 0.0, "eager_step_seconds": 1.0,
    }  # fmt: skip
    return row(model, device, **{**figures, **more})


class EvidenceTest(unittest.TestCase):
    def test_the_latest_row_counts_and_a_gpu_is_another_machine(self) -> None:
        rows = [measured("resnet18", "cpu"), measured("resnet18", "cuda"), measured("resnet18", "cpu", time_ratio=0.25)]
        rows += [measured("gpt2", "cuda", wanted_saving=0.5), measured("gpt2", "cpu", options="--tuned-malloc")]
        evidence = Evidence(rows)
        self.assertEqual(evidence.measured(), [rows[2]])
        self.assertEqual(evidence.measured(tuned=True), [rows[4]])
        self.assertEqual(evidence.measured("cuda"), [rows[1]])
        self.assertEqual(evidence.within_budgets, [rows[3]])

    def test_orders_are_summed_up(self) -> None:
        rows = [
            simulated("alexnet", half_extra=0.02),
            simulated("resnet18", gap=1e-6, half_extra=0.04, planning_seconds=1.5),
            simulated("vgg11", simulated_fragmentation=0.002, inductor_dfs_bytes=40),
            row("gpt2", None, error="ValueError: no"),
            row("gpt2", "cuda", error="ValueError: no GPU"),
        ]
        text = " ".join(blocks.orders(Evidence(rows)).split())
        for said in (
            "Over the 3 graphs of `benchmarks.py` (3 models, batch 1, training and inference; 1 more fail)",
            "the proven gap is at most 0.0001%, and zero on 2.",
            "Planning takes 0.50 s in the median for training,",
            "and at most 1.5 s (resnet18 at batch 1).",
            "are better on 1 of the graphs",
            "its best one needs up to 1.5 times as much",
            "for the planned order 0.75 of what eager PyTorch makes it reserve (median),",
            "the live bytes fall to 0.50. The arena needs 0.30, with 2 of all 3 graphs placed",
            "arenas reserve 60% less than eager PyTorch in training at batch 1",
            "peak costs 3.0% more time in training at batch 1, in the mean of the 2 of 3 models",
        ):
            self.assertIn(said, text)

    def test_peers_are_beaten_in_bytes_and_in_time_or_not(self) -> None:
        results = [
            result("eager PyTorch", 100, 1.0),
            result("optimizer in backward", 90, 0.9),  # in time, not
            result("torch.compile", 70, 1.0),
            result("torch.compile, budget 0.5", 30, 1.5),  # in bytes, not
            result("OLLA", 80, 0.95),
            result("OLLA, 60 MiB", 60, 1.0, extra=0.05, least_extra=0.04, planning_seconds=2.0),
            result("OLLA, 40 MiB", 40, 1.25, extra=0.25, least_extra=0.125, planning_seconds=4.0),
        ]
        text = blocks.peers(results)
        self.assertIn("| **OLLA**, within a budget | 40.0 MiB, 1.25 x |", text)
        self.assertIn("| eager PyTorch | 100.0 MiB, 1.00 x |", text)
        self.assertIn("| checkpoint every block, optimizer in backward | - |", text)
        text = " ".join(text.split())
        self.assertIn("eager PyTorch, 1 of 2 need at least", text)
        self.assertIn("whose kernels give other bits, 1 of 2.", text)
        self.assertIn("at most 12.5% (gpt2_6x384, OLLA, 40 MiB). Planning took 2 to 4 seconds.", text)
        with self.assertRaisesRegex(OllaError, "no plan within a budget"):
            blocks.peers(results[:5])

    def test_a_gpu_has_tables_of_its_own(self) -> None:
        rows = [
            measured("gpt2", "cuda"),
            measured("gpt2", "cuda", wanted_saving=0.75, recomputed=7),
            measured("gpt2", "cuda", wanted_saving=0.5, recomputed=5, spilled_bytes=3 * MIB, options="--spilling"),
            row("gpt2", "cuda", options="--gpu-profile", reserved_eager_bytes=6 * MIB, reserved_planned_bytes=5 * MIB,
                arena_bytes=4 * MIB),
        ]  # fmt: skip
        short, whole = blocks.gpu_in_short(Evidence(rows)), blocks.gpu(Evidence(rows))
        self.assertIn("| gpt2 | 1 | train | 75 % | 8.0 MiB | 2.0 MiB | 75.0% | yes | 0.50 x |", short)
        self.assertNotIn("50 %", short)
        self.assertIn(
            "| gpt2 | 1 | train | 50 % | 8.0 MiB | 2.0 MiB | 75.0% | yes | yes | 5 | 3.0 MiB | 0.50 x |", whole
        )
        self.assertIn("| gpt2 | 1 | 6.0 MiB | 5.0 MiB | 4.0 MiB |", whole)

    def test_what_the_logs_do_not_hold_stays_as_it_was(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        root = Path(folder.name)
        (root / "docs").mkdir()
        marked = "".join(
            f"<!-- written: {name} -->\nold {name}\n<!-- end of {name} -->\n"
            for name in ("quick", "orders", "peers", "compile", "soak", "gpu")
        )
        readme, results, cuda = root / "README.md", root / "docs" / "results.md", root / "docs" / "cuda.md"
        for page in (readme, results, cuda):
            page.write_text(marked)
        rows = [simulated("resnet18"), measured("resnet18", "cpu")]
        with mock.patch("bench.document.draw_peaks"):
            write_document(Evidence(rows), root)
            for old, page in (("gpu", readme), ("peers", readme), ("peers", results), ("compile", results)):
                self.assertIn(f"old {old}\n", page.read_text())
            for new, page in (("quick", readme), ("orders", readme), ("orders", results)):
                self.assertNotIn(f"old {new}\n", page.read_text())
            self.assertEqual(cuda.read_text(), marked)
            write_document(Evidence([*rows, measured("gpt2", "cuda")]), root)
            for page in (readme, cuda):
                self.assertNotIn("old gpu", page.read_text())
            self.assertNotIn("| gpt2 |", results.read_text())
            before = results.read_text()
            write_document(Evidence([], compiled=[result("aot_eager", 5, 1.0, same_numbers=True)]), root)
        self.assertEqual(
            results.read_text().partition("<!-- written: compile")[0], before.partition("<!-- written: compile")[0]
        )
        self.assertIn("| gpt2_6x384 | 5.0 |", results.read_text())
        with self.assertRaisesRegex(OllaError, "the logs hold nothing"):
            write_document(Evidence([]), root)

    def test_markers_must_be_there_once(self) -> None:
        path = Path("README.md")
        self.assertEqual(
            fill("a<!-- written: x -->b<!-- end of x -->c", "x", "d", path),
            "a<!-- written: x -->\nd\n<!-- end of x -->c",
        )
        for text in ("", "<!-- written: x -->", "<!-- written: x --><!-- written: x --><!-- end of x -->"):
            with self.assertRaisesRegex(OllaError, "README.md: .* must stand there once"):
                fill(text, "x", "d", path)
