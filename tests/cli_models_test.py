from __future__ import annotations

import json
import os
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from command import run_main
from torch import nn

import olla
from olla.cli.target import Request
from olla.cli.zoo import torchvision_model, transformers_model

SCRIPT = """
import sys
import torch
from torch import nn
from helper import width

model = nn.Sequential(nn.Linear(32, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
inputs, targets = torch.randn(512, 32), torch.randint(10, (512,))
loss_fn = nn.functional.cross_entropy
optimizer = torch.optim.Adam(model.parameters())
print("on", inputs.device, "as", __name__, "with", sys.argv)
"""


def of_script() -> dict[str, Any]:
    """What the script defines, as arguments of ``olla.plan``."""
    layers = (nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    model = nn.Sequential(*layers)
    return {
        "model": model, "inputs": torch.randn(512, 32), "targets": torch.randint(10, (512,)),
        "loss_fn": nn.functional.cross_entropy, "optimizer": torch.optim.Adam(model.parameters()),
    }  # fmt: skip


class FolderTest(unittest.TestCase):
    """Runs in an empty folder, with a script in it."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.addCleanup(os.chdir, Path.cwd())
        for name in ("helper", "mine"):
            self.addCleanup(sys.modules.pop, name, None)
        os.chdir(folder.name)
        Path("train.py").write_text(SCRIPT)
        Path("helper.py").write_text("width = 64\n")

    def run_json(self, *arguments: object) -> Any:
        status, out, error = run_main(*arguments, "--json")
        self.assertEqual(status, 0, error)
        return json.loads(out)

    def assert_refused(self, message: str, *arguments: object) -> None:
        with self.subTest(arguments):
            status, out, error = run_main(*arguments)
            self.assertEqual((status, out), (2, ""))
            self.assertRegex(error, message)
            self.assertEqual(error.count("\n"), 1, error)


class ScriptTest(FolderTest):
    def test_it_is_planned_as_in_python(self) -> None:
        plan, same = olla.Plan.from_dict(self.run_json("plan", "train.py")), olla.plan(**of_script(), place=False)
        self.assertEqual((plan.order, plan.peak_bytes), (same.order, same.peak_bytes))
        self.assertEqual(plan.graph_digest, same.graph_digest)

    def test_it_runs_on_the_meta_device_under_another_name_and_its_prints_go_to_standard_error(self) -> None:
        arguments, path = list(sys.argv), list(sys.path)
        _, out, error = run_main("plan", "train.py")
        self.assertEqual(error, "on meta as olla_target with ['train.py']\n")
        self.assertIn("optimal, gap 0.0000%", out)
        self.assertEqual((sys.argv, sys.path), (arguments, path))
        self.assertIn("on cpu", run_main("plan", "train.py", "--device", "cpu")[2])

    def test_plan_and_graph_are_written_for_the_other_commands(self) -> None:
        self.assertEqual(run_main("plan", "train.py", "--place", "--out", "p.json", "--graph-out", "g.json")[0], 0)
        self.assertEqual(run_main("check", "g.json", "p.json")[:2], (0, "The plan is sound.\n"))
        self.assertEqual(run_main("draw", "g.json", "arena.svg", "--plan", "p.json", "--what", "addresses")[0], 0)
        again = olla.Plan.from_dict(self.run_json("plan", "g.json"))
        self.assertEqual(again.peak_bytes, olla.Plan.load("p.json").peak_bytes)

    def test_the_graph_that_is_written_is_the_one_that_is_planned(self) -> None:
        # Gradients of large weights are computed in slices only where the peak is, so planning changes the graph.
        Path("wide.py").write_text(
            "import torch\nfrom torch import nn\n"
            "model = nn.Sequential(nn.Conv2d(256, 512, 3), nn.Conv2d(512, 1024, 3))\n"
            "inputs = torch.randn(1, 256, 7, 7)\n"
        )
        arguments = ("plan", "wide.py", "--optimizer", "sgd", "--out", "p.json", "--graph-out", "g.json")
        self.assertEqual(run_main(*arguments)[0], 0)
        self.assertEqual(run_main("check", "g.json", "p.json")[0], 0)
        model = nn.Sequential(nn.Conv2d(256, 512, 3), nn.Conv2d(512, 1024, 3))
        optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
        captured = olla.to_graph(model, torch.randn(1, 256, 7, 7), optimizer=optimizer)
        self.assertNotEqual(captured.digest, olla.Graph.load("g.json").digest)

    def test_a_budget_is_kept_or_does_not_fit(self) -> None:
        plan = olla.Plan.from_dict(self.run_json("plan", "train.py", "--budget", "0.8"))
        budget = 0.8 * (plan.persistent_bytes + plan.baseline_peak_bytes)
        self.assertLessEqual(plan.persistent_bytes + plan.peak_bytes, budget)
        self.assertEqual(olla.Plan.from_dict(self.run_json("plan", "train.py", "--budget=80%")).order, plan.order)
        status, out, error = run_main("plan", "train.py", "--budget", "1KiB")
        self.assertEqual((status, out), (1, ""))
        self.assertRegex(error, "the smallest budget is [0-9,]+ bytes")

    def test_a_plan_may_recompute_and_spill(self) -> None:
        least = self.run_json("frontier", "train.py", "--points", 2, "--spill-dir", ".")["points"][-1]
        self.assertTrue(least["recomputed"] or least["spilled"])
        budget = least["peak_bytes"] + olla.plan(**of_script()).persistent_bytes
        arguments = ("plan", "train.py", "--budget", budget, "--spill-dir", ".", "--place")
        status, out, _ = run_main(*arguments, "--out", "p.json", "--graph-out", "g.json")
        self.assertEqual(status, 0)
        self.assertRegex(out, r"recomputed +\d+ ops\nspilled +\d+ storages\nextra time")
        self.assertEqual(run_main("check", "g.json", "p.json")[0], 0)

    def test_inference_needs_no_loss(self) -> None:
        script = of_script()
        plan = olla.Plan.from_dict(self.run_json("plan", "train.py", "--inference"))
        self.assertEqual(plan.order, olla.plan(script["model"].eval(), script["inputs"]).order)

    def test_the_frontier_is_that_of_python(self) -> None:
        found, same = self.run_json("frontier", "train.py", "--points", 3), olla.frontier(**of_script(), points=3)
        self.assertEqual(found, same.to_dict())
        status, out, _ = run_main("frontier", "train.py", "--points", 3, "--draw", "curve.png")
        self.assertEqual(status, 0)
        self.assertEqual(out.rsplit("\n", 2)[0], str(same))
        self.assertIn(f"\n{same.persistent_bytes:,} bytes live across steps", out)
        self.assertTrue(Path("curve.png").read_bytes().startswith(b"\x89PNG"))

    def test_bench_measures_what_was_planned(self) -> None:
        report = self.run_json("bench", "train.py")
        self.assertEqual(report["measured"]["peak_bytes"], report["plan"]["peak_bytes"])
        self.assertLess(report["measured"]["peak_bytes"], report["measured"]["baseline_peak_bytes"])
        status, out, error = run_main("bench", "train.py", "--optimizer", "SGD")
        self.assertEqual((status, out), (2, ""))
        self.assertIn("train.py defines its own optimizer: --optimizer would change nothing", error)

    def test_what_is_wrong_with_a_script_is_said_in_a_line(self) -> None:
        scripts = {
            "empty.py": "",
            "number.py": "model = 3",
            "blind.py": "from torch import nn\nmodel = nn.Linear(2, 2)",
            "raises.py": "def parse():\n    import json\n    json.loads('?')\n\nparse()",
            "leaves.py": "import sys\n\nsys.exit(3)",
            "broken.py": "model = (",
            "value.py": "import torch\nif torch.ones(2).sum().item() > 1:\n    pass",
            "imports.py": "import a_package_that_is_not_there",
        }
        for name, text in scripts.items():
            Path(name).write_text(text)
        for name, message in {
            "missing.py": "missing.py: no such script",
            "empty.py": "empty.py defines no model",
            "number.py": "number.py: the model is a int, not a torch.nn.Module",
            "blind.py": "blind.py defines no inputs: .* or give a --shape",
            "raises.py": r"raises.py fails at raises.py:3: json.loads\('\?'\): JSONDecodeError: ",
            "leaves.py": r"leaves.py fails at leaves.py:3: sys.exit\(3\): SystemExit: 3",
            "broken.py": r"broken.py fails: SyntaxError: .*line 1",
            "value.py": r"value.py fails at value.py:2: .*\(--device cpu gives tensors values\)",
            "imports.py": "imports.py fails at imports.py:1: .*ModuleNotFoundError: No module named 'a_package",
        }.items():
            self.assert_refused(message, "plan", name)
        self.assertEqual(run_main("plan", "blind.py", "--shape", 2)[0], 0)

    def test_what_a_model_rejects_is_said_in_a_line(self) -> None:
        Path("small.py").write_text(
            "import torch\nfrom torch import nn\nmodel = nn.MaxPool2d(3)\ninputs = torch.randn(1, 1, 2, 2)\n"
        )
        with self.assertNoLogs("torch._subclasses.fake_tensor"):
            self.assert_refused("the step fails on these inputs.*Output size is too small", "plan", "small.py")


class ModuleTest(FolderTest):
    def setUp(self) -> None:
        super().setUp()
        Path("mine.py").write_text(
            "import torch\nfrom torch import nn\n\nmodel = nn.Linear(8, 4)\nsize = 3\n\n"
            "class Builders:\n    @staticmethod\n    def both():\n        return nn.Linear(8, 4), torch.randn(2, 8)\n\n"
            "def bad():\n    raise ValueError('no weights')\n"
        )

    def test_a_model_or_what_makes_it_is_imported_from_the_folder(self) -> None:
        expected = olla.plan(nn.Linear(8, 4), torch.randn(2, 8)).order
        shape = ("--shape", 8, "--batch-size", 2)
        for target, options in {"mine:model": shape, "mine:Builders.both": ()}.items():
            plan = olla.Plan.from_dict(self.run_json("plan", target, *options))
            self.assertEqual(plan.order, expected)
        trained = olla.Plan.from_dict(self.run_json("plan", "mine:model", *shape, "--optimizer", "adam"))
        self.assertGreater(trained.persistent_bytes, 3 * 36 * 4)

    def test_what_is_wrong_with_it_is_said_in_a_line(self) -> None:
        for message, arguments in {
            "there is no module 'nowhere'": ("nowhere:model",),
            "there is no module 'mine.deep'": ("mine.deep:model",),
            "mine has no 'modell': did you mean model?": ("mine:modell",),
            "mine:size is a int: name a model": ("mine:size",),
            "mine:bad fails at .*mine.py:13: raise ValueError.*: no weights": ("mine:bad",),
            "mine:model defines no inputs": ("mine:model",),
            "mine:Builders.both defines its own inputs: --shape would": ("mine:Builders.both", "--shape", 8),
            "torch.optim has no optimizer 'adamm': did you mean Adam": ("mine:model", "--shape=8", "--optimizer=adamm"),
            "'model' is no target: write GRAPH.json, torchvision:NAME": ("model",),
            "the memory budget '6gb' cannot be read": ("mine:model", "--budget", "6gb"),
            "no such solver: 'abacus'": ("mine:model", "--solver", "abacus"),
        }.items():
            self.assert_refused(message, "plan", *arguments)
        self.assert_refused(
            "points is 1: a curve has two ends, ask for at least 2", "frontier", "mine:model", "--shape=8", "--points=1"
        )

    def test_without_torch_a_model_is_an_error(self) -> None:
        with mock.patch.dict(sys.modules, torch=None):
            self.assert_refused("mine:model needs PyTorch: pip install torch", "plan", "mine:model")


class ZooTest(FolderTest):
    def test_models_of_torchvision_get_inputs_that_they_are_made_for(self) -> None:
        for name, shape in {
            "squeezenet1_1": (2, 3, 224, 224), "inception_v3": (2, 3, 299, 299), "vit_h_14": (2, 3, 224, 224),
            "r3d_18": (2, 3, 16, 112, 112), "fcn_resnet50": (2, 3, 520, 520),
        }.items():  # fmt: skip
            with self.subTest(name), torch.device("meta"):
                target = torchvision_model(name, Request(batch_size=2))
                self.assertEqual(target.inputs.shape, shape)
                self.assertEqual(target.loss_fn(target.model(target.inputs), target.targets).shape, ())
                self.assertTrue(target.model.training and target.optimizer)

    def test_models_of_transformers_compute_their_loss(self) -> None:
        small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        types = {
            "BertForMaskedLM": ("bert", small),
            "GPT2LMHeadModel": ("gpt2", {"n_embd": 8, "n_layer": 1, "n_head": 2}),
            "T5ForConditionalGeneration": ("t5", {"d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 2}),
            "ViTForImageClassification": ("vit", small),
        }
        with mock.patch.dict("olla.cli.zoo._NAMED", types):
            for name in types:
                with self.subTest(name), torch.device("meta"):
                    target = transformers_model(name, Request())
                    self.assertEqual(type(target.model).__name__, name)
                    _, plan = target.planned()
                    _, forward = transformers_model(name, Request(train=False)).planned()
                    self.assertGreater(len(plan.order), 2 * len(forward.order))

    def test_names_that_are_well_known_are_configurations(self) -> None:
        with torch.device("meta"):
            model = transformers_model("gpt2-medium", Request(shape=(16,), optimizer="AdamW")).model
        self.assertEqual(sum(p.numel() for p in model.parameters()), 354_823_168)

    def test_they_are_planned(self) -> None:
        import torchvision

        arguments = ("torchvision:squeezenet1_1", "--inference", "--shape", "3x64x64", "--batch-size", 2)
        plan = olla.Plan.from_dict(self.run_json("plan", *arguments))
        same = olla.plan(torchvision.models.squeezenet1_1().eval(), torch.randn(2, 3, 64, 64))
        self.assertEqual((plan.order, plan.peak_bytes), (same.order, same.peak_bytes))
        plan = olla.Plan.from_dict(self.run_json("plan", "transformers:distilbert", "--inference", "--shape", 8))
        self.assertLessEqual(plan.peak_bytes, plan.baseline_peak_bytes)

    def test_what_is_not_there_is_said_in_a_line(self) -> None:
        for message, target in {
            "torchvision has no model 'resnet5': did you mean .*resnet50": "torchvision:resnet5",
            "torchvision:ssd300_vgg16 is a model for detection": "torchvision:ssd300_vgg16",
            "transformers has no model type 'gpt-2': did you mean gpt2": "transformers:gpt-2",
            "transformers:detr is neither a language model nor": "transformers:detr",
        }.items():
            self.assert_refused(message, "plan", target)
        with mock.patch.dict(sys.modules, torchvision=None):
            self.assert_refused("needs torchvision: pip install torchvision", "plan", "torchvision:resnet18")
