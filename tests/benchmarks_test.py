from __future__ import annotations

import contextlib
import ctypes
import io
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import pandas
import torch
from torch import nn

import benchmarks
from bench.ilp import FORMS
from bench.models import MODELS, QUICK, Workload
from olla.solve import available


def tiny(batch: int) -> Workload:
    return Workload(nn.Linear(64, 64), (torch.randn(batch, 64),))


def deep(batch: int) -> Workload:
    layers = [layer for _ in range(2) for layer in (nn.Linear(8, 8), nn.Tanh())]
    return Workload(nn.Sequential(*layers), (torch.randn(batch, 8),))


def failing(batch: int) -> Workload:
    raise RuntimeError("no such layer")


class BenchmarksTest(unittest.TestCase):
    def run_with(self, *arguments: str) -> tuple[int, pandas.DataFrame, str]:
        output = io.StringIO()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(output):
            path = Path(folder) / "log.csv"
            with mock.patch.dict(MODELS, {"tiny": tiny, "deep": deep, "failing": failing}):
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
        self.assertTrue(log.exact.all())
        self.assertTrue((log.missed == 0).all())
        self.assertTrue((log.fragmentation < 0.01).all())
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

    def test_simulated_rows_can_have_addresses(self) -> None:
        _, log, _ = self.run_with("-m", "tiny", "-b", "8", "--simulate", "--generate-addresses")
        self.assertGreater(log.arena_bytes[0], 0)  # in training; the inference makes nothing but its output
        self.assertTrue((log.placing_seconds > 0).all())
        self.assertTrue((log.fragmentation < 0.05).all())

    def test_a_profile_has_every_operator_of_both_steps(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        path = Path(folder.name) / "log.csv"
        arguments = ["-m", "tiny", "-b", "8", "--mode", "train", "--gpu-profile", "--profile-alloc-time"]
        with mock.patch.dict(MODELS, tiny=tiny), contextlib.redirect_stdout(io.StringIO()):
            for _ in range(2):  # the second run replaces the files of the first
                self.assertEqual(benchmarks.main([*arguments, "--log-path", str(path)]), 0)
        log, ops = pandas.read_csv(path), pandas.read_csv(path.with_suffix(".ops.csv"))
        self.assertEqual(set(ops.order), {"eager", "planned"})
        self.assertEqual((ops.position == 0).sum(), 2)
        for order in ("eager", "planned"):
            peak = ops[ops.order == order].allocated_bytes.max()
            self.assertEqual(peak, log[f"measured_{order}_bytes"][0])
            self.assertGreaterEqual(log[f"reserved_{order}_bytes"][0], peak)
        self.assertTrue((log.allocation_seconds > 0).all() and (log.arena_allocation_seconds > 0).all())

    @unittest.skipUnless(available(), "no solver is installed")
    def test_the_integer_program_is_solved_in_each_form(self) -> None:
        status, log, text = self.run_with("--ilp", "-m", "deep", "-b", "99", "--solver", available()[0])
        self.assertEqual(status, 0)
        self.assertEqual(list(log.form), list(FORMS))
        self.assertTrue((log.variables > 0).all() and (log.constraints > 0).all())
        for row in log[log.form.isin(["order", "address", "joint"])].itertuples():
            self.assertEqual((row.status, row.objective), ("optimal", row.bound))
        [spill] = log[log.form == "spill"].itertuples()
        self.assertGreater(spill.objective, 0)
        self.assertIn("not measured here", text)

    def test_budgets_are_run_and_measured(self) -> None:
        for option in ("--rematerialization", "--spilling"):
            with self.subTest(option):
                status, log, _ = self.run_with(option, "-m", "deep", "-b", "999")
                self.assertEqual(status, 0)
                self.assertEqual(list(log.wanted_saving), [0.1, 0.25, 0.5, 0.75, 1.0])
                run = log[log.measured_planned_bytes.notna()]
                self.assertGreater(len(run), 2)
                self.assertTrue(run.exact.all())
                saved = run[run.wanted_saving < 1]
                limit = saved.measured_eager_bytes * (1 - saved.wanted_saving)
                self.assertTrue((saved.measured_planned_bytes <= limit).all())
                self.assertTrue((run.least_extra_seconds <= run.extra_seconds).all())
                self.assertGreater(run.recomputed.max() + run.spilled_bytes.max(), 0)
        self.assertGreater(run.spilled_bytes.max(), 0)

    @unittest.skipUnless(hasattr(ctypes.CDLL(None), "mallopt"), "needs the malloc of glibc")
    def test_malloc_can_be_tuned(self) -> None:
        script = "from bench.malloc import tune_malloc; tune_malloc()"  # for good, so in a process of its own
        subprocess.run([sys.executable, "-c", script], cwd=Path(benchmarks.__file__).parent, check=True)

    def test_options_that_need_others_say_so(self) -> None:
        for option in ("--generate-addresses", "--profile-alloc-time"):
            with self.assertRaises(SystemExit), contextlib.redirect_stderr(io.StringIO()) as error:
                self.run_with("-m", "tiny", option)
            self.assertIn(f"{option} needs", error.getvalue())

    def test_simulating_and_running_exclude_each_other(self) -> None:
        with self.assertRaises(SystemExit), contextlib.redirect_stderr(io.StringIO()):
            self.run_with("-m", "tiny", "--simulate", "--execute")

    def test_all_models_of_the_paper_are_there(self) -> None:
        vision = ["alexnet", "efficientnet_b0", "googlenet", "inception_v3", "mnasnet0_5", "mobilenet_v2", "r3d_18"]
        vision += ["resnet18", "resnet50", "squeezenet1_0", "vgg11", "vgg16", "vgg19", "vit_b_16"]
        paper = {*vision, "bert", "transformer", "transformer_dflt", "xlmr"}
        self.assertLessEqual(paper, set(MODELS))
        self.assertLessEqual(set(QUICK), set(MODELS))
