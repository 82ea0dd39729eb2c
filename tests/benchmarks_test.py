from __future__ import annotations

import contextlib
import ctypes
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pandas
import torch
from torch import nn

import benchmarks
from bench.ilp import FORMS
from bench.log import read_log
from bench.models import MODELS, QUICK, Workload
from bench.process import apart
from bench.row import Row
from olla.solve import available


def tiny(batch: int) -> Workload:
    return Workload(nn.Linear(64, 64), (torch.randn(batch, 64),))


def deep(batch: int) -> Workload:
    layers = [layer for _ in range(2) for layer in (nn.Linear(8, 8), nn.Tanh())]
    return Workload(nn.Sequential(*layers), (torch.randn(batch, 8),))


def here(function: Callable[..., Any], *args: Any) -> Any:
    """In place of a process, which would know nothing of these models."""
    return function(*args)


def failing(batch: int) -> Workload:
    raise RuntimeError("no such layer")


def interrupted(batch: int) -> Workload:
    with contextlib.suppress(KeyboardInterrupt):  # as planners do
        signal.raise_signal(signal.SIGINT)
    return tiny(batch)


class BenchmarksTest(unittest.TestCase):
    def run_with(self, *arguments: str) -> tuple[int, pandas.DataFrame, str]:
        output = io.StringIO()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(output):
            path = Path(folder) / "log.csv"
            models = mock.patch.dict(MODELS, {"tiny": tiny, "deep": deep, "failing": failing})
            with models, mock.patch.object(benchmarks, "apart", here):
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

    def test_the_whole_evaluation_runs_steps_at_batch_1_and_plans_all(self) -> None:
        _, log, text = self.run_with("-m", "tiny")
        self.assertEqual(list(log.batch_size), [1, 1, 32, 32])
        self.assertEqual(list(log.measured_planned_bytes.isna()), [False, False, True, True])
        self.assertTrue((log.reserved_arena_bytes > 0).all())
        self.assertIn("The paper's claim, not measured here", text)

    def test_steps_can_be_left_out(self) -> None:
        _, log, _ = self.run_with("-m", "tiny", "-b", "1", "--mode", "train", "--skip-simulation")
        self.assertTrue(log.simulated_planned_bytes.isna().all())
        _, log, _ = self.run_with("-m", "tiny", "-b", "1", "--mode", "train", "--skip-node-ordering")
        self.assertEqual(log.simulated_planned_bytes[0], log.simulated_eager_bytes[0])

    def test_simulated_rows_allocate_nothing_and_are_compared_with_inductor(self) -> None:
        status, log, text = self.run_with("-m", "tiny", "-m", "resnet18", "-b", "4096", "--simulate")
        self.assertEqual(status, 0)
        self.assertTrue(log.error.isna().all())
        self.assertTrue(log.measured_planned_bytes.isna().all())
        for name in ("lpmf", "bfs", "dfs"):
            self.assertTrue((log[f"inductor_{name}_bytes"] >= log.simulated_planned_bytes).all())
        self.assertGreater(log.simulated_planned_bytes[2], 2**36)  # resnet18 in training
        for order in ("eager", "planned"):
            self.assertTrue((log[f"reserved_{order}_bytes"] >= log[f"simulated_{order}_bytes"]).all())
        self.assertTrue((log.reserved_arena_bytes >= log.simulated_planned_bytes).all())
        self.assertRegex(text, r"train │ +4096 │ +2 │")

    def test_half_of_the_bytes_costs_time_or_is_out_of_reach(self) -> None:
        _, log, _ = self.run_with("-m", "tiny", "-m", "resnet18", "-b", "64", "--simulate")
        training, inference = log[log["mode"] == "train"], log[log["mode"] == "eval"]
        is_reached = training.half_extra >= training.half_least_extra
        is_out_of_reach = training.smallest_bytes * 2 > training.simulated_eager_bytes
        self.assertTrue((is_reached ^ is_out_of_reach).all())
        self.assertGreater(training[training.model == "resnet18"].half_extra.item(), 0)
        self.assertTrue(inference[["half_extra", "smallest_bytes"]].isna().all(axis=None))

    def test_simulated_rows_have_addresses(self) -> None:
        _, log, _ = self.run_with("-m", "tiny", "-b", "8", "--simulate")
        self.assertGreater(log.simulated_arena_bytes[0], 0)  # in training; the inference makes nothing but its output
        self.assertTrue((log.simulated_fragmentation < 0.05).all())

    def test_a_profile_has_every_operator_of_both_steps(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        path = Path(folder.name) / "log.csv"
        arguments = ["-m", "tiny", "-b", "8", "--mode", "train", "--gpu-profile", "--profile-alloc-time"]
        with (
            mock.patch.dict(MODELS, tiny=tiny),
            mock.patch.object(benchmarks, "apart", here),
            contextlib.redirect_stdout(io.StringIO()),
        ):
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
        with self.assertRaises(SystemExit), contextlib.redirect_stderr(io.StringIO()) as error:
            self.run_with("-m", "tiny", "--profile-alloc-time")
        self.assertIn("--profile-alloc-time needs --gpu-profile", error.getvalue())

    def test_simulating_and_running_exclude_each_other(self) -> None:
        with self.assertRaises(SystemExit), contextlib.redirect_stderr(io.StringIO()):
            self.run_with("-m", "tiny", "--simulate", "--execute")

    def test_all_models_of_the_paper_are_there(self) -> None:
        vision = ["alexnet", "efficientnet_b0", "googlenet", "inception_v3", "mnasnet0_5", "mobilenet_v2", "r3d_18"]
        vision += ["resnet18", "resnet50", "squeezenet1_0", "vgg11", "vgg16", "vgg19", "vit_b_16"]
        paper = {*vision, "bert", "transformer", "transformer_dflt", "xlmr"}
        self.assertLessEqual(paper, set(MODELS))
        self.assertLessEqual(set(QUICK), set(MODELS))


class ProcessTest(unittest.TestCase):
    def test_what_is_measured_is_measured_in_another_process(self) -> None:
        self.assertNotEqual(apart(os.getpid), os.getpid())
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            path = Path(folder) / "log.csv"
            arguments = ["-m", "squeezenet1_0", "-b", "1", "--mode", "eval", "--skip-simulation", "--tuned-malloc"]
            with mock.patch.object(benchmarks, "tune_malloc", side_effect=AssertionError("not here")):
                self.assertEqual(benchmarks.main([*arguments, "--log-path", str(path)]), 0)
            [row] = read_log(path, Row)
        self.assertTrue(row.exact)

    def test_a_process_that_ends_is_an_error(self) -> None:
        with self.assertRaisesRegex(RuntimeError, "exit code 3"):
            apart(os._exit, 3)

    def test_an_interrupt_ends_it(self) -> None:
        # Where tests run in the background, it is ignored.
        self.addCleanup(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, signal.default_int_handler))
        before = signal.pthread_sigmask(signal.SIG_BLOCK, set())
        threading.Timer(0.5, signal.pthread_kill, (threading.get_ident(), signal.SIGINT)).start()
        with self.assertRaises(KeyboardInterrupt):
            apart(time.sleep, 60)
        self.assertEqual(multiprocessing.active_children(), [])
        self.assertEqual(signal.pthread_sigmask(signal.SIG_BLOCK, set()), before)


class LogTest(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = Path(folder.name)
        self.path = self.root / "log.csv"
        patch = mock.patch.object(benchmarks, "ROOT", self.root)
        patch.start()
        self.addCleanup(patch.stop)

    def run_with(self, *arguments: str, **models: object) -> tuple[int, str]:
        output = io.StringIO()
        with (
            mock.patch.dict(MODELS, {"tiny": tiny, "resnet18": tiny, **models}),
            mock.patch.object(benchmarks, "apart", here),
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
        ):
            status = benchmarks.main([*arguments, "--log-path", str(self.path)])
        return status, output.getvalue()

    def test_a_run_goes_on_with_the_rows_that_the_log_lacks(self) -> None:
        self.run_with("-m", "tiny", "-b", "1", "--mode", "eval")
        [first] = read_log(self.path, Row)
        with mock.patch("benchmarks.run_case", wraps=benchmarks.run_case) as run:
            _, text = self.run_with("-m", "tiny", "-b", "1", "--append-log")
            self.assertEqual([call.args[0].mode for call in run.call_args_list], ["train"])
        log = read_log(self.path, Row)
        self.assertEqual(log[0], first)
        self.assertEqual([row.mode for row in log], ["eval", "train"])
        self.assertIn(" eval ", text)
        _, text = self.run_with("-m", "tiny", "-b", "1", "--append-log", "--skip-node-ordering")
        self.assertEqual(len(read_log(self.path, Row)), 4)

    def test_a_new_run_sets_the_log_of_another_aside(self) -> None:
        self.run_with("-m", "tiny", "-b", "1", "--mode", "eval", "--simulate")
        first = self.path.read_bytes()
        _, text = self.run_with("-m", "tiny", "-b", "1", "--mode", "train", "--simulate")
        self.assertIn("log.csv, which is there already, is kept as ", text)
        self.assertEqual(self.path.with_name("log.before.csv").read_bytes(), first)
        self.assertEqual([row.mode for row in read_log(self.path, Row)], ["train"])

    def test_rows_that_failed_are_run_again(self) -> None:
        self.run_with("-m", "tiny", "-b", "2", "--simulate", tiny=failing)
        self.run_with("-m", "tiny", "-b", "2", "--simulate", "--append-log")
        self.assertEqual([row.error for row in read_log(self.path, Row)], ["", ""])

    def test_an_interrupted_run_leaves_a_whole_log_and_says_how_to_go_on(self) -> None:
        handler = signal.getsignal(signal.SIGINT)
        arguments = ["-m", "tiny", "-m", "resnet18", "-b", "1", "--mode", "train", "--simulate"]
        status, text = self.run_with(*arguments, resnet18=interrupted)
        self.assertEqual(status, 130)
        self.assertEqual([row.model for row in read_log(self.path, Row)], ["tiny"])
        self.assertIn("to go on, give the same options and --append-log", text)
        self.assertEqual(signal.getsignal(signal.SIGINT), handler)
        self.assertEqual(self.run_with(*arguments, "--append-log")[0], 0)
        self.assertEqual([row.model for row in read_log(self.path, Row)], ["tiny", "resnet18"])

    def test_a_picture_is_drawn_beside_the_log(self) -> None:
        self.run_with("-m", "tiny", "-m", "failing", "--mode", "train", failing=failing)
        self.assertTrue(self.path.with_suffix(".png").read_bytes().startswith(b"\x89PNG"))

    def test_a_log_that_is_none_is_named_and_left_as_it_is(self) -> None:
        self.run_with("-m", "tiny", "-b", "1", "--mode", "train", "--simulate")
        header, line = self.path.read_text().splitlines()
        wrong = {
            "has besides, 1 of its columns: ops;": f"{header.replace(',ops,', ',')}\n{line}\n",
            "line 3: batch_size is 'two'": f"{header}\n{line}\n{line.replace('tiny,1,', 'tiny,two,')}\n",
            "line 2: batch_size is ''": f"{header}\n{line.replace('tiny,1,', 'tiny,,')}\n",
            "line 2: mode is missing": f"{header}\ntiny,1\n",
            "line 2: more values than columns": f"{header}\n{line},1\n",
            "not a log of this version": "",
            "cannot be read": '"model\n',
        }
        for message, text in wrong.items():
            for arguments in (["-m", "tiny", "--append-log"], ["--write"]):
                with self.subTest(message, arguments=arguments):
                    self.path.write_text(text)
                    status, said = self.run_with(*arguments)
                    self.assertEqual(status, 2)
                    self.assertIn(str(self.path), said)
                    self.assertIn(message, said)
                    self.assertEqual(self.path.read_text(), text)

    def test_the_page_and_the_table_are_written_from_the_log_alone(self) -> None:
        around = "# Größe\n\n<!-- written: quick -->\n{}<!-- end of quick -->\n\n| by | hand |\n"
        around += "<!-- written: orders -->\n{}<!-- end of orders -->\n"
        readme, page = self.root / "README.md", self.root / "docs" / "results.md"
        readme.write_text(around.format("| old |\n", "old\n"))
        page.parent.mkdir()
        marked = "# Results\n\n<!-- written: orders -->\n<!-- end of orders -->\n\n{}<!-- end of soak -->\n"
        page.write_text(marked.format("<!-- written: soak -->\n"))
        self.run_with("-m", "tiny", "-m", "resnet18")
        with mock.patch("benchmarks.run_case") as run:
            self.assertEqual(self.run_with("--write")[0], 0)
            first = page.read_text(), readme.read_text()
            self.assertEqual(self.run_with("--write")[0], 0)
        run.assert_not_called()
        self.assertEqual((page.read_text(), readme.read_text()), first)
        text = readme.read_text()
        table, said = (text.partition(f"{name} -->\n")[2].partition("<!-- end")[0] for name in ("quick", "orders"))
        self.assertEqual(text, around.format(table, said))
        self.assertNotIn("old", table + said)
        self.assertIn("Over the 8 graphs of `benchmarks.py` (2 models, batch 1 and 32,", said)
        self.assertIn("the proven gap is at most 0.0000%, and zero on 8.", said)
        self.assertEqual([line.split()[1] for line in table.splitlines()[2:3]], ["resnet18"])
        [trained] = [
            row for row in read_log(self.path, Row) if (row.model, row.case[1:3]) == ("resnet18", (1, "train"))
        ]
        self.assertIn(f"{trained.measured_planned_bytes / 2**20:,.1f} MiB", table)
        for told in (trained.machine, trained.date, "`python benchmarks.py -m tiny -m resnet18`", "## Measured"):
            self.assertIn(told, page.read_text())
        for batch in (1, 32):
            self.assertIn(f"## Training, batch {batch}, simulated", page.read_text())
        self.assertTrue((self.root / "docs" / "results.png").exists())
        self.assertNotIn("## Over", page.read_text())
        with mock.patch("benchmarks.STEPS", 200):
            self.assertEqual(self.run_with("--soak")[0], 0)
        self.assertEqual(self.run_with("--write")[0], 0)
        before, _, section = page.read_text().partition("## Over 200 steps\n")
        self.assertEqual(before + "<!-- end of soak -->\n", first[0])
        self.assertIn("0 allocations of all steps", section)
        self.assertIn("made by `python benchmarks.py --soak`", section)
        self.assertTrue((self.root / "docs" / "soak.png").read_bytes().startswith(b"\x89PNG"))

    def test_nothing_is_written_if_something_is_missing(self) -> None:
        readme = self.root / "README.md"
        (self.root / "docs").mkdir()
        (self.root / "docs" / "results.md").write_text("<!-- written: orders -->\n<!-- end of orders -->\n")
        self.run_with("-m", "resnet18", "-b", "1", "--mode", "train", "--simulate")
        readme.write_text("<!-- written: quick -->\n<!-- end of quick -->\n")
        status, said = self.run_with("--write")
        self.assertEqual(status, 2)
        self.assertIn("run benchmarks.py --quick first", said)
        self.run_with("-m", "resnet18", "-b", "1", "--mode", "train")
        readme.write_text("<!-- written: quick -->\nno end\n")
        status, said = self.run_with("--write")
        self.assertEqual(status, 2)
        self.assertIn("must stand there once", said)
        self.assertEqual([*(self.root / "docs").iterdir()], [self.root / "docs" / "results.md"])
        self.assertEqual(readme.read_text(), "<!-- written: quick -->\nno end\n")

    def test_a_log_that_cannot_be_written_is_found_out_before_anything_runs(self) -> None:
        with self.assertRaises(SystemExit), contextlib.redirect_stderr(io.StringIO()) as error:
            benchmarks.main(["-m", "resnet18", "--log-path", str(self.root / "none" / "log.csv")])
        self.assertIn("there is no folder", error.getvalue())

    def test_what_is_written_runs_nothing(self) -> None:
        with self.assertRaises(SystemExit), contextlib.redirect_stderr(io.StringIO()) as error:
            benchmarks.main(["--write", "-m", "resnet18"])
        self.assertIn("--write runs nothing", error.getvalue())

    def test_a_long_run_has_a_model_of_its_own(self) -> None:
        for other in (["-m", "resnet18"], ["--append-log"], ["--tuned-malloc"]):
            with self.assertRaises(SystemExit), contextlib.redirect_stderr(io.StringIO()) as error:
                benchmarks.main(["--soak", *other])
            self.assertIn("--soak has a model of its own", error.getvalue())
