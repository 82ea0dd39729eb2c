"""The examples run as they are copied, and the steps in them give what eager PyTorch gives."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import runpy
import subprocess
import sys
import tempfile
import unittest
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers

import olla

EXAMPLES = Path(__file__).parents[1] / "examples"
PLANNING = ("optimize", "optimize_step", "frontier")


class ExamplesTest(unittest.TestCase):
    def setUp(self) -> None:
        self.addCleanup(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # workspaces of convolutions grow with the number of threads
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.plans = folder.name  # what runs again is not planned again

    def run_example(self, name: str) -> tuple[str, dict[str, Any]]:
        kept = {call: partial(getattr(olla, call), cache_dir=self.plans) for call in PLANNING}
        with (
            contextlib.redirect_stdout(io.StringIO()) as printed,
            torch.random.fork_rng(),
            mock.patch.multiple(olla, **kept),
        ):
            names = runpy.run_path(str(EXAMPLES / f"{name}.py"))
        return printed.getvalue(), names

    def assert_less_memory(self, text: str, share: float) -> None:
        found = re.search(r"eager ([\d,]+) bytes, planned ([\d,]+)", text)
        self.assertIsNotNone(found, text)
        eager, planned = (int(number.replace(",", "")) for number in found.groups())
        self.assertLess(planned, share * eager)

    def assert_trains_as_eager(self, name: str, share: float) -> tuple[str, dict[str, Any]]:
        text, names = self.run_example(name)
        self.assertTrue(names["measured"].exact)
        self.assert_less_memory(text, share)
        with mock.patch.object(olla.Step, "__call__", olla.Step._eager):
            _, eager = self.run_example(name)
        self.assertTrue(torch.equal(names["loss"], eager["loss"]))
        state, expected = names["model"].state_dict(), eager["model"].state_dict()
        self.assertTrue(all(torch.equal(state[key], expected[key]) for key in expected))
        return text, names

    def test_training(self) -> None:
        text, _ = self.assert_trains_as_eager("training", 0.6)
        accuracies = [float(share) for share in re.findall(r"accuracy ([\d.]+)%", text)]
        self.assertEqual(len(accuracies), 3)
        self.assertGreater(accuracies[-1], accuracies[0])

    def test_own_step(self) -> None:
        self.assert_trains_as_eager("own_step", 0.9)

    def test_hugging_face(self) -> None:
        text, names = self.assert_trains_as_eager("hugging_face", 0.6)
        held = re.search(r"inputs: ([\d,]+) and ([\d,]+)", text)
        eager, planned = (int(number.replace(",", "")) for number in held.groups())
        self.assertLessEqual(planned, 0.5 * eager)
        self.assertTrue(names["step"].plan.recomputed)

    def test_lightning_style(self) -> None:
        self.assert_trains_as_eager("lightning_style", 0.6)

    @unittest.skipUnless(importlib.util.find_spec("accelerate"), "Trainer needs accelerate")
    def test_trainer(self) -> None:
        text, names = self.run_example("trainer")
        self.assertEqual(text.count("resumed, and equal bit for bit: True"), 2)
        for name, trainer in names["trainers"].items():
            with self.subTest(name), tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
                torch.manual_seed(0)
                unmodified = names["make_trainer"](names[name](), folder, transformers.Trainer)
                unmodified.train()
                history = self.history(unmodified)
                self.assertEqual(self.history(trainer), history)
                self.assertEqual(sum("loss" in entry for entry in history), 20)
                self.assertEqual(sum("eval_loss" in entry for entry in history), 4)
                state, expected = trainer.model.state_dict(), unmodified.model.state_dict()
                self.assertTrue(all(torch.equal(state[key], expected[key]) for key in expected))
                self.assertEqual(trainer.step._current.replay.counts.missed, 0)

        trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
        with self.assertRaisesRegex(olla.CaptureError, "train with bf16=True"):
            trainer.training_step(trainer.model, {})

    def history(self, trainer: transformers.Trainer) -> list[dict[str, float]]:
        """What was logged (losses, norms of gradients, learning rates), without times."""
        timed = ("runtime", "per_second")
        return [
            {key: value for key, value in entry.items() if not key.endswith(timed)}
            for entry in trainer.state.log_history
        ]

    def test_spilling(self) -> None:
        _, names = self.assert_trains_as_eager("spilling", 0.2)
        self.assertGreater(names["measured"].spilled_bytes, 0)
        needed = names["step"].plan.persistent_bytes + names["measured"].peak_bytes
        self.assertLessEqual(needed, names["budget"])

    def test_inference(self) -> None:
        text, names = self.run_example("inference")
        self.assertIn("equal, bit for bit: True", text)
        self.assertTrue(names["measured"].exact)
        self.assert_less_memory(text, 0.6)

    def test_placement_loads_no_torch(self) -> None:
        code = "import runpy, sys; runpy.run_path(sys.argv[1]); assert 'torch' not in sys.modules"
        command = [sys.executable, "-c", code, EXAMPLES / "placement.py"]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        self.assertIn("optimal, gap 0.00%", text)
        self.assertRegex(text, r"no placement within [\d,]+ bytes: at least [\d,]+ are needed")

    def test_every_example_is_tested(self) -> None:
        tested = {
            "training", "own_step", "hugging_face", "trainer", "lightning_style", "inference", "placement", "spilling"
        }  # fmt: skip
        self.assertEqual({path.stem for path in EXAMPLES.glob("*.py")}, tested)
