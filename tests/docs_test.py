"""The README and the guides do what they say: snippets run, commands run, and every message quoted exists."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import shlex
import tempfile
import unittest
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import olla
from olla.cli import main

ROOT = Path(__file__).parents[1]
GUIDES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
BUFFERS = "id,lower,upper,size\na,0,2,3000\nb,1,3,4000\n"


def prelude() -> dict[str, Any]:
    """What the guides call your model, and what belongs to it."""
    torch.manual_seed(0)
    hidden = (nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(8))
    model = nn.Sequential(nn.Linear(32, 64), *hidden, nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters())
    batches = [(torch.randn(256, 32), torch.randint(0, 10, (256,))) for _ in range(4)]
    inputs, targets = batches[0]
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    return {
        "torch": torch, "nn": nn, "olla": olla, "model": model, "optimizer": optimizer, "scheduler": scheduler,
        "loss_fn": F.cross_entropy, "inputs": inputs, "targets": targets, "loader": batches,
    }  # fmt: skip


def without_numbers(text: str) -> str:
    """What is printed, but for figures, which differ a little from one machine to another."""
    return re.sub(r" *[\d.,]+", " 0", text)


class GuidesTest(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.addCleanup(os.chdir, Path.cwd())
        os.chdir(folder.name)
        Path("buffers.csv").write_text(BUFFERS)

    def follow(self, guide: Path) -> tuple[dict[str, Any], str]:
        """Do what the guide says from top to bottom; what its snippets define, and all that they print."""
        names, printed = prelude(), io.StringIO()
        with contextlib.redirect_stdout(printed), torch.random.fork_rng():
            for language, text in BLOCK.findall(guide.read_text()):
                if language == "python":
                    exec(compile(text, f"<{guide.name}>", "exec"), names)
                elif language == "sh":
                    for command in re.findall(r"^olla (.*)", text, re.MULTILINE):
                        self.assertEqual(main(shlex.split(command)), 0, command)
                elif language == "text":
                    self.assertIn(without_numbers(text), without_numbers(printed.getvalue()))
        return names, printed.getvalue()

    def test_readme(self) -> None:
        names, text = self.follow(ROOT / "README.md")
        self.assertTrue(names["step"].plan.peak_bytes < names["step"].plan.baseline_peak_bytes)
        self.assertIn("the measured peak is the planned one, to the byte", text)

    def test_training(self) -> None:
        names, text = self.follow(ROOT / "docs" / "training.md")
        self.assertTrue(names["measured"].exact, text)
        self.assertFalse(names["scores"].requires_grad)
        self.assertTrue(all(parameter.grad is None for parameter in names["model"].parameters()))

    def test_own_step(self) -> None:
        names, _ = self.follow(ROOT / "docs" / "own_step.md")
        self.assertEqual((names["loss"].dtype, names["norm"].shape), (torch.float32, ()))

    def test_budgets(self) -> None:
        names, _ = self.follow(ROOT / "docs" / "budgets.md")
        plan, spilling = names["step"].plan, names["spilling"].plan
        self.assertLessEqual(
            plan.persistent_bytes + plan.peak_bytes, plan.persistent_bytes / 2 + plan.baseline_peak_bytes / 2
        )
        self.assertTrue(plan.recomputed and not plan.spills)
        self.assertTrue(spilling.recomputed or spilling.spills)
        self.assertLessEqual(names["bound"], names["smallest"])

    def test_distributed(self) -> None:
        names, _ = self.follow(ROOT / "docs" / "distributed.md")
        self.assertTrue(any("start_sum" in op.name for op in names["step"]._current.draft.lowered.graph.ops))

    def test_troubleshooting(self) -> None:
        _, text = self.follow(ROOT / "docs" / "troubleshooting.md")
        self.assertEqual(text, f"{float(text)}\n")

    def test_graphs(self) -> None:
        guide = ROOT / "docs" / "graphs.md"
        _, text = self.follow(guide)
        self.assertTrue(text.startswith("(0, 1, 2) 2048 2048\n"))
        self.assertIn("\nThe plan is sound.\n", text)
        self.assertIn("\n(0, 4096) 5120 5120\n", text)
        self.assertTrue(Path("placed.png").exists())
        self.assertGreater(Path("joint.mps").stat().st_size, 0)
        example = next(block for language, block in BLOCK.findall(guide.read_text()) if language == "json")
        Path("example.json").write_text(example)
        self.assertEqual(olla.schedule(olla.Graph.load("example.json")).order, (0, 1))

    def test_every_guide_is_followed(self) -> None:
        followed = {"README.md", "training.md", "own_step.md", "distributed.md", "budgets.md"}
        followed |= {"troubleshooting.md", "graphs.md"}
        self.assertEqual({guide.name for guide in GUIDES}, followed)

    def test_links_lead_somewhere(self) -> None:
        for guide in GUIDES:
            for target in LINK.findall(guide.read_text()):
                self.assertTrue((guide.parent / target).exists(), f"{guide.name}: {target}")

    def test_every_message_that_is_explained_is_in_the_code(self) -> None:
        said = "\n".join(text for path in (ROOT / "olla").rglob("*.py") for text in messages(path))
        quoted = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
        self.assertGreater(len(quoted), 30)
        for message in quoted:
            pattern = ".*?".join(re.escape(part) for part in message.split("…"))
            with self.subTest(message):
                self.assertTrue(re.search(pattern, said))


def messages(path: Path) -> list[str]:
    """The texts of a file, one a line, with … for what is filled in."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return [text.replace("\n", " ") for text in found]
