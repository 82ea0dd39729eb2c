"""The contests of `benchmarks.py --peers` and `--compile`, with a model that is small."""

from __future__ import annotations

import contextlib
import io
import tempfile
import unittest
from functools import partial
from pathlib import Path
from unittest import mock

import pandas
import torch
from torch import nn
from torch._functorch import config
from torch.nn import functional as F

import benchmarks
from bench import page
from bench.backends import BUDGET, COMPILED, WITHIN, backends
from bench.contest import Result
from bench.log import read_log
from bench.models import Workload
from bench.peers import (
    EAGER,
    OLLA,
    checkpoint_all_but_products,
    checkpoint_blocks,
    compile_model,
    contenders,
    plan,
    update_in_backward,
)
from bench.training import SUBJECTS, Subject, Training


class Network(nn.Sequential):
    """PyTorch before 2.14 leaves a module as it is that is to compile itself and whose ``forward`` is PyTorch's own."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images)


def network(batch: int) -> Workload:
    blocks = [nn.Sequential(nn.Linear(128, 128), nn.BatchNorm1d(128), nn.Tanh(), nn.Tanh()) for _ in range(6)]
    return Workload(Network(*blocks), (torch.randn(batch, 128),), F.mse_loss, torch.randn(batch, 128))


SUBJECT = Subject(100, network, list, budgets=(1,))


def scale_gradients(training: Training) -> None:
    for parameter in training.model.parameters():
        parameter.register_hook(lambda gradient: gradient * 2)


def fail(training: Training) -> None:
    raise RuntimeError("no such\nmeans")


class ContestTestCase(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.path = Path(folder.name) / "log.csv"


class PeersTest(ContestTestCase):
    def run_with(self, changes: dict[str, object]) -> tuple[int, pandas.DataFrame, str]:
        with (
            mock.patch.dict(SUBJECTS, {"network": SUBJECT}),
            mock.patch("benchmarks.contenders", return_value=changes),
            mock.patch("benchmarks.tune_malloc"),  # it is for good
            contextlib.redirect_stdout(io.StringIO()) as output,
        ):
            status = benchmarks.main(["--peers", "-m", "network", "--log-path", str(self.path)])
        log = pandas.read_csv(self.path.with_suffix(".peers.csv"))
        return status, log.set_index("contender"), output.getvalue()

    def test_all_are_held_against_eager_pytorch(self) -> None:
        changes = {
            EAGER: (),
            "optimizer": (update_in_backward,),
            "checkpoint": (checkpoint_blocks,),
            "every 2nd": (partial(checkpoint_blocks, every=2),),
            "selective": (checkpoint_all_but_products,),
            "both": (checkpoint_blocks, update_in_backward),
            "other": (scale_gradients,),
            OLLA: (plan,),
        }
        status, log, text = self.run_with(changes)
        self.assertEqual((status, list(log.index)), (0, list(changes)))
        self.assertTrue(log.error.isna().all())
        self.assertEqual(list(log.index[~log.same_numbers]), ["other"])
        # A batch norm that is run again counts its batch again, but not in OLLA; "other" differs in the second step.
        repeating = ["checkpoint", "every 2nd", "selective", "both", "other"]
        self.assertEqual(list(log.index[~log.same_buffers]), repeating)
        peaks = log.peak_bytes
        self.assertLessEqual(peaks["optimizer"], peaks[EAGER])
        self.assertLess(peaks["checkpoint"], peaks["every 2nd"])
        self.assertLess(peaks["every 2nd"], peaks[EAGER])
        self.assertLess(peaks["selective"], peaks[EAGER])
        self.assertLess(peaks["both"], peaks["checkpoint"])
        self.assertEqual(log.saving[OLLA], 1 - peaks[OLLA] / peaks[EAGER])
        self.assertEqual(log.time_ratio[EAGER], 1)
        self.assertTrue((log.step_seconds > 0).all())
        for name in changes:
            self.assertIn(name, text)
        self.assertTrue(self.path.with_suffix(".peers.png").read_bytes().startswith(b"\x89PNG"))

    def test_budgets_are_kept_and_a_failing_contender_is_a_row(self) -> None:
        changes = {
            EAGER: (),
            "failing": (fail,),
            "1 MiB": (partial(plan, budget=1),),
            "0 MiB": (partial(plan, budget=0),),
        }
        status, log, text = self.run_with(changes)
        self.assertEqual(status, 0)
        self.assertEqual(log.error["failing"], "RuntimeError: no such means")
        self.assertIn("InfeasibleError", log.error["0 MiB"])
        self.assertLessEqual(log.peak_bytes["1 MiB"], 2**20)
        self.assertGreater(log.peak_bytes[EAGER], 2**20)
        self.assertTrue(log.same_numbers["1 MiB"])
        self.assertGreaterEqual(log.extra["1 MiB"], log.least_extra["1 MiB"])
        self.assertGreater(log.planning_seconds["1 MiB"], 0)
        self.assertGreater(log.persistent_bytes[EAGER], 6 * 128 * 129 * 2 * 4)  # weights, biases and their momentum
        self.assertIn("no such means", text)

    def test_without_eager_pytorch_there_is_no_contest(self) -> None:
        status, log, _ = self.run_with({EAGER: (fail,), OLLA: (plan,)})
        self.assertEqual((status, list(log.index)), (1, [EAGER]))

    def test_each_compiled_contender_is_compiled_with_its_own_budget(self) -> None:
        budgets: list[float] = []

        def compile_fx(graph: nn.Module, inputs: object) -> object:
            budgets.append(config.activation_memory_budget)
            return graph.forward

        with mock.patch("torch._inductor.compile_fx.compile_fx", compile_fx):
            for budget in (1.0, 0.5, 0.5):
                training = SUBJECT.training()
                compile_model(training, budget=budget)
                training.step()
        self.assertEqual(budgets, [1.0, 0.5, 0.5])

    def test_olla_enters_without_a_budget_and_within_each(self) -> None:
        names = list(contenders((7, 5)))
        self.assertEqual((names[0], names[-3:]), (EAGER, [OLLA, f"{OLLA}, 7 MiB", f"{OLLA}, 5 MiB"]))

    def test_options_that_would_be_ignored_are_refused(self) -> None:
        wrong = (["--peers", "-b", "1"], ["--peers", "-m", "resnet18"], ["-m", "vit_6x384"], ["--compile", "--peers"])
        for arguments in wrong:
            with self.assertRaises(SystemExit), contextlib.redirect_stderr(io.StringIO()) as error:
                benchmarks.main(arguments)
            self.assertIn("--peers", error.getvalue())


class BackendsTest(ContestTestCase):
    def test_each_backend_has_its_peak_and_the_numbers_of_eager_pytorch_or_not(self) -> None:
        def entering(mode: str) -> dict[str, object]:
            found = {name: changes for name, changes in backends(mode).items() if name != "inductor"}  # it takes long
            return found | {"other": (scale_gradients,), "failing": (fail,)} if mode == "train" else found

        with (
            mock.patch.dict(COMPILED, {"network": Subject(1000, network, list, ())}),
            mock.patch("benchmarks.backends", side_effect=entering),
            mock.patch("benchmarks.tune_malloc"),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            self.assertEqual(benchmarks.main(["--compile", "-m", "network", "--log-path", str(self.path)]), 0)
        results = read_log(self.path.with_name("log.compile.csv"), Result)
        found = {(result.mode, result.contender): result for result in results}
        self.assertEqual(list(found), [(mode, name) for mode in ("train", "eval") for name in entering(mode)])
        self.assertEqual([name for name in found if found[name].error], [("train", "failing")])
        wrong = [("train", "other"), ("train", "failing")]
        self.assertEqual([name for name in found if not found[name].same_numbers], wrong)
        peaks = {name: result.peak_bytes for (mode, name), result in found.items() if mode == "train"}
        self.assertLessEqual(peaks["olla"], peaks["aot_eager"])
        self.assertLessEqual(peaks["olla, optimizer in backward"], peaks["olla"])
        planned, eager = found["train", WITHIN], found["train", EAGER]
        self.assertLessEqual(
            planned.persistent_bytes + planned.peak_bytes, BUDGET * (eager.persistent_bytes + eager.peak_bytes)
        )
        self.assertLessEqual(found["eval", "olla"].peak_bytes, found["eval", "aot_eager"].peak_bytes)
        self.assertLess(found["eval", EAGER].peak_bytes, eager.peak_bytes)
        text = page.backends(results)
        self.assertIn("| model | eager PyTorch | aot_eager | olla |", text)
        self.assertIn(f"| {peaks['olla'] / 2**20:,.1f} |", text)
        self.assertIn("Of 4 runs compiled with OLLA, 4 had the numbers of eager PyTorch", text)
