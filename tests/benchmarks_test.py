from __future__ import annotations

import contextlib
import io
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import pandas
import torch
from torch import nn

import benchmarks


def tiny(batch: int) -> benchmarks.Workload:
    return benchmarks.Workload(nn.Linear(64, 64), (torch.randn(batch, 64),))


def failing(batch: int) -> benchmarks.Workload:
    raise RuntimeError("no such layer")


class BenchmarksTest(unittest.TestCase):
    def run_with(self, *arguments: str) -> tuple[int, pandas.DataFrame, str]:
        output = io.StringIO()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(output):
            path = Path(folder) / "log.csv"
            with mock.patch.dict(benchmarks.MODELS, {"tiny": tiny, "failing": failing}):
                status = benchmarks.main([*arguments, "--log-path", str(path)])
                if "--append-log" in arguments:
                    status = benchmarks.main([*arguments, "--log-path", str(path)])
            return status, pandas.read_csv(path), output.getvalue()

    def test_a_row_for_each_case_with_both_peaks(self) -> None:
        status, log, text = self.run_with("-m", "tiny", "-b", "1", "-b", "2")
        self.assertEqual(status, 0)
        cases = [("tiny", 1, "train"), ("tiny", 1, "eval"), ("tiny", 2, "train"), ("tiny", 2, "eval")]
        self.assertEqual(list(zip(log.model, log.batch_size, log["mode"], strict=True)), cases)
        self.assertTrue((log.measured_planned_bytes <= log.measured_eager_bytes).all())
        self.assertTrue((log.measured_planned_bytes > 0).all())
        self.assertIn("tiny", text)

    def test_a_failing_model_is_a_row_with_its_error(self) -> None:
        status, log, _ = self.run_with("-m", "failing", "-m", "tiny", "-b", "1", "--mode", "train")
        self.assertEqual(status, 0)
        self.assertEqual(log.error[0], "RuntimeError: no such layer")
        self.assertEqual(log.ops[1], log.ops[1])

    def test_only_failures_is_a_failure(self) -> None:
        self.assertEqual(self.run_with("-m", "failing", "-b", "1")[0], 1)

    def test_a_log_is_continued(self) -> None:
        _, log, _ = self.run_with("-m", "tiny", "-b", "1", "--mode", "eval", "--append-log")
        self.assertEqual(len(log), 2)

    def test_steps_can_be_left_out(self) -> None:
        _, log, _ = self.run_with("-m", "tiny", "-b", "1", "--mode", "train", "--no-execute")
        self.assertTrue(log.measured_planned_bytes.isna().all())
        _, log, _ = self.run_with("-m", "tiny", "-b", "1", "--mode", "train", "--skip-simulation")
        self.assertTrue(log.simulated_planned_bytes.isna().all())
        _, log, _ = self.run_with("-m", "tiny", "-b", "1", "--mode", "train", "--skip-node-ordering", "--no-execute")
        self.assertEqual(log.simulated_planned_bytes[0], log.simulated_eager_bytes[0])

    def test_simulated_rows_allocate_nothing_and_are_compared_with_inductor(self) -> None:
        status, log, text = self.run_with("-m", "tiny", "-m", "resnet18", "-b", "4096", "--simulate")
        self.assertEqual(status, 0)
        self.assertTrue(log.error.isna().all())
        self.assertTrue(log.measured_planned_bytes.isna().all())
        for name in ("lpmf", "bfs", "dfs"):
            self.assertTrue((log[f"inductor_{name}_bytes"] >= log.simulated_planned_bytes).all())
        self.assertGreater(log.simulated_planned_bytes[2], 2**36)  # resnet18 in training
        self.assertIn("train: 2 graphs, gap at most 0.01 % on 2", text)
        self.assertIn("in 0 of 8 comparisons", text)
        for order in ("eager", "planned"):
            self.assertTrue((log[f"reserved_{order}_bytes"] >= log[f"simulated_{order}_bytes"]).all())
            self.assertRegex(text, rf"fragmentation: .*{order} \d+\.\d% \(median\), \d+\.\d% \(worst\)")

    def test_simulating_and_running_exclude_each_other(self) -> None:
        with self.assertRaises(SystemExit), contextlib.redirect_stderr(io.StringIO()):
            self.run_with("-m", "tiny", "--simulate", "--execute")

    def test_all_models_of_the_paper_are_there(self) -> None:
        vision = ["alexnet", "efficientnet_b0", "googlenet", "inception_v3", "mnasnet0_5", "mobilenet_v2", "r3d_18"]
        vision += ["resnet18", "resnet50", "squeezenet1_0", "vgg11", "vgg16", "vgg19", "vit_b_16"]
        paper = {*vision, "bert", "transformer", "transformer_dflt", "xlmr"}
        self.assertLessEqual(paper, set(benchmarks.MODELS))
        self.assertLessEqual(set(benchmarks.QUICK), set(benchmarks.MODELS))
