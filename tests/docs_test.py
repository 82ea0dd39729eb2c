"""The README and the guides do what they say: snippets and commands run, and every message quoted exists."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import itertools
import os
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import olla
from olla.cli import main
from olla.graph.lifetimes import live_intervals, memory_profile, peak_bytes
from olla.order.bounds import CutBound, must_live
from olla.order.problem import Problem
from olla.order.reduce import Reduced
from olla.order.search import search

ROOT = Path(__file__).parents[1]
GUIDES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
BUFFERS = "id,lower,upper,size\na,0,2,3000\nb,1,3,4000\n"
TOOLS = ("benchmarks.py", "bench", "scripts", "tests")  # what commands in guides are run on
NOT_RUN = {  # commands that no test runs, and why
    'python3 -m venv .venv && .venv/bin/pip install -e ".[bench]" && .venv/bin/python benchmarks.py --quick':
        "installs PyTorch: .ci/run sets up such an environment and runs benchmarks in it",
    'python3 -m venv .venv && .venv/bin/pip install -e ".[test]" && '
    '.venv/bin/python -m unittest discover -s tests --pattern "*_test.py"':
        "installs PyTorch, and runs this test: .ci/run does both",
    "pip install olla[gurobi]": "changes the environment: setup.py is looked at instead",
    "pip install olla[highs]": "the same",
    "pip install olla[cpsat]": "the same",
}  # fmt: skip
takes_long = unittest.skipUnless(os.environ.get("RUN_SKIPPED"), "takes minutes: set RUN_SKIPPED=1")


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

    def follow(self, guide: Path, instead: dict[str, str] | None = None) -> tuple[dict[str, Any], str]:
        """Do what the guide says from top to bottom; what its snippets define, and all that they print.

        Words of it can be replaced by others. Commands that are not OLLA's own are run by a test of their own.
        """
        names, printed = prelude(), io.StringIO()
        with contextlib.redirect_stdout(printed), torch.random.fork_rng():
            for language, text in BLOCK.findall(guide.read_text()):
                if script := re.match(r"# (\w+\.py)\n", text):
                    Path(script[1]).write_text(text)
                elif language == "python":
                    for word, other in (instead or {}).items():
                        text = text.replace(word, other)
                    exec(compile(text, f"<{guide.name}>", "exec"), names)
                elif language == "sh":
                    for command in re.findall(r"^(?:.*/)?olla (.*)", text, re.MULTILINE):
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

    @unittest.skipUnless(importlib.util.find_spec("accelerate"), "Trainer needs accelerate")
    def test_trainer(self) -> None:
        guide = ROOT / "docs" / "trainer.md"
        names, text = self.follow(guide)
        self.assertIn("planned addresses", text)
        planned = re.search(r"^class PlannedTrainer.*?return self.step\(\*batch\)\n", guide.read_text(), re.S | re.M)
        self.assertIn(planned[0], (ROOT / "examples" / "trainer.py").read_text())
        self.assert_padding_does_not_count(names)

    def assert_padding_does_not_count(self, names: dict[str, Any]) -> None:
        model = names["model"].eval()  # without dropout, whose masks are another story for another length
        tokens = names["tokens"]
        alone = model(input_ids=tokens, labels=tokens).loss
        batch = names["padded"](tokens, tokens)
        self.assertEqual(batch["input_ids"].shape, (4, 16))
        step = olla.optimize(model, batch, loss_fn=lambda output: output.loss)
        results = []
        for noise in (0, 7):
            model.zero_grad()
            batch["input_ids"][:, 11:] = noise
            loss = step(**batch)
            torch.testing.assert_close(loss, alone.detach())
            results.append([loss, *(parameter.grad.clone() for parameter in model.parameters())])
        model.zero_grad()
        alone.backward()
        for one, other, parameter in zip(results[0][1:], results[1][1:], model.parameters(), strict=True):
            self.assertTrue(torch.equal(one, other))
            torch.testing.assert_close(one, parameter.grad)
        self.assertTrue(torch.equal(results[0][0], results[1][0]))

    def test_compile(self) -> None:
        self.addCleanup(torch._dynamo.reset)
        names, _ = self.follow(ROOT / "docs" / "compile.md")
        self.assertTrue(torch.equal(names["compiled"](names["inputs"]), names["model"](names["inputs"])))

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

    def test_command_line(self) -> None:
        _, text = self.follow(ROOT / "docs" / "command_line.md")
        self.assertIn("\nThe plan is sound.\n", text)
        self.assertIn("the measured peak is the planned one, to the byte", text)
        self.assertTrue(Path("frontier.png").exists() and Path("plan.html").exists())

    def test_cuda(self) -> None:
        on_cpu = {} if torch.cuda.is_available() else {'"cuda"': '"cpu"', '"host"': '"."'}
        names, _ = self.follow(ROOT / "docs" / "cuda.md", on_cpu)
        self.assertTrue(names["measured"].exact)
        self.assertTrue(names["small"].plan.recomputed or names["small"].plan.spills)

    def test_solvers(self) -> None:
        _, text = self.follow(ROOT / "docs" / "solvers.md")
        self.assertTrue(text.endswith("Status.OPTIMAL -6 [0. 1. 1.]\n"))
        setup = (ROOT / "setup.py").read_text()
        for package in re.findall(r"pip install olla\[(\w+)\]", (ROOT / "docs" / "solvers.md").read_text()):
            self.assertIn(f'"{package}": ', setup)

    def test_how_it_works(self) -> None:
        guide = ROOT / "docs" / "how_it_works.md"
        names, printed = self.follow(guide)
        for language, text in BLOCK.findall(guide.read_text()):
            if language == "text":
                self.assertIn(text, printed)
        self.check_by_hand(guide.read_text(), names["graph"], names["schedule"])

    def check_by_hand(self, said: str, graph: olla.Graph, found: olla.Schedule) -> None:
        """The figures that are worked out in the guide, by other means."""
        ops = [op.name for op in graph.ops]
        rows = [re.findall(r"\d+", row) for row in re.findall(r"^\| \$M\(t\)\$ (.*)$", said, re.MULTILINE)]
        for row, order in zip(rows, (range(len(ops)), found.order), strict=True):
            self.assertEqual(tuple(map(int, row)), memory_profile(graph, order))
        alive = [row.split(" | ") for row in re.findall(r"^\| alive \| (.*) \|$", said, re.MULTILINE)]
        for row, order in zip(alive, (range(len(ops)), found.order), strict=True):
            lives = live_intervals(graph, order)
            for step, cell in enumerate(row):
                there = {graph.storages[life.storage].name for life in lives if life.start <= step < life.end}
                self.assertEqual(set(cell.split()), there)

        within = [order for order in orders(graph) if peak_bytes(graph, order) <= 14]
        self.assertEqual(within, [found.order])
        problem = Problem.of(graph)
        self.assertEqual((must_live(problem)[ops.index("loss")], must_live(problem)[ops.index("dx2")]), (14, 10))
        self.assertEqual(CutBound(problem).at(ops.index("dx2")), 13)
        deadline = time.perf_counter() + 60
        self.assertEqual(search(problem, 13, nodes=2, deadline=deadline).bound, 14)
        self.assertEqual(search(problem, 14, nodes=2, deadline=deadline).order[:-1].tolist(), list(found.order))
        known: list[tuple[int, int]] = []  # what the target forces, one after the other
        for one, other, at, least in (("dw1", "dw2", "dw1", 23), ("dx2", "dw2", "dw2", 19), ("dw1", "sgd2", "dw1", 16)):
            supposed = problem.with_pairs([*known, (ops.index(one), ops.index(other))])
            self.assertEqual(must_live(supposed)[ops.index(at)], least)
            known.append((ops.index(other), ops.index(one)))
        self.assertEqual(Reduced.of(problem).merged().problem.op_count, 1)

    def test_every_family_of_rows_is_explained(self) -> None:
        stated = "\n".join(path.read_text() for path in (ROOT / "olla" / "ilp").glob("*.py"))
        families = re.findall(r"(?:constrain\(|_at_most\(program,|_never_more\(program,)\s*\"(\w+)\"", stated)
        explained = re.findall(r"^\| `(\w+)` \| .*\$", (ROOT / "docs" / "how_it_works.md").read_text(), re.MULTILINE)
        self.assertEqual(sorted(explained), sorted(set(families)))

    def test_the_reference_is_up_to_date(self) -> None:
        script = runpy.run_path(str(ROOT / "scripts" / "reference"))
        self.assertEqual(script["REFERENCE"].read_text(), script["reference"](), "run scripts/reference")

    def test_every_command_is_run_or_says_why_not(self) -> None:
        commands = [command for guide in GUIDES for command in commands_of(guide)]
        self.assertLessEqual(set(NOT_RUN), set(commands))
        for command in commands:
            self.assertTrue(command.startswith(("olla ", ".venv/bin/olla ", "python ")) or command in NOT_RUN, command)

    @takes_long
    def test_commands_that_take_long(self) -> None:
        for tool in TOOLS:
            Path(tool).symlink_to(ROOT / tool)
        for guide in GUIDES:
            for command in commands_of(guide):
                if command.startswith("python "):
                    with self.subTest(command):
                        if "cuda" in command and not torch.cuda.is_available():
                            self.skipTest("needs a GPU")
                        run = [sys.executable, *shlex.split(command)[1:]]
                        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
                        done = subprocess.run(run, capture_output=True, text=True, env=environment, check=False)
                        self.assertEqual(done.returncode, 0, done.stderr)

    def test_every_guide_is_followed(self) -> None:
        followed = {
            "README.md", "training.md", "own_step.md", "budgets.md", "troubleshooting.md", "graphs.md", "cuda.md",
            "solvers.md", "how_it_works.md", "command_line.md", "trainer.md", "compile.md",
            "distributed.md",
        }  # fmt: skip
        self.assertEqual({guide.name for guide in GUIDES} - {"reference.md", "results.md"}, followed)
        listed = {Path(target).name for target in LINK.findall((ROOT / "README.md").read_text())}
        self.assertLessEqual({guide.name for guide in GUIDES} - {"README.md"}, listed)

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


def commands_of(guide: Path) -> list[str]:
    """The lines of its blocks of sh."""
    return [
        line for language, text in BLOCK.findall(guide.read_text()) if language == "sh" for line in text.splitlines()
    ]


def orders(graph: olla.Graph) -> list[tuple[int, ...]]:
    """All of them."""
    ops = range(len(graph.ops))
    pairs = [(earlier, later) for later in ops for earlier in graph.predecessors[later]]
    return [order for order in itertools.permutations(ops) if all(order.index(a) < order.index(b) for a, b in pairs)]


def messages(path: Path) -> list[str]:
    """The texts of a file, one a line, with … for what is filled in."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return [text.replace("\n", " ") for text in found]
