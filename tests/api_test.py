"""The front door: nothing is left changed, and bad input gets a clear error."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import unittest
from pathlib import Path
from typing import Any

import torch
from eager import EagerTestCase, sgd
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import olla
from olla.graph.lifetimes import eager_peak_bytes, peak_bytes


class Net(nn.Module):
    """Everything that a careless capture could change."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)
        self.calls = 0
        self.cache: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.cache = F.relu(self.norm(self.conv(x)))
        return self.head(self.drop(self.cache).mean((2, 3)))


class Failing(Net):
    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        if output.sum() > 0:  # needs the value of a tensor
            return output
        return -output


def example() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 3, 6, 6), torch.randint(0, 3, (4,))


class NothingChangesTest(EagerTestCase):
    def everything(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return copy.deepcopy(
            {
                "model": dict(model.state_dict()),
                "gradients": [p.grad for p in model.parameters()],
                "optimizer": optimizer.state_dict(),
                "attributes of the optimizer": sorted(vars(optimizer)),
                "modes": [module.training for module in model.modules()],
                "attributes": [sorted(vars(module)) for module in model.modules()],
                "calls": model.calls,
                "random state": torch.get_rng_state(),
            }
        )

    def check(self, model: nn.Module, *, fails: bool) -> None:
        x, y = example()
        optimizer = torch.optim.Adam(model.parameters())
        model.norm.eval()
        model.cache = None
        for parameter in list(model.parameters())[:3]:
            parameter.grad = torch.ones_like(parameter)
        before = self.everything(model, optimizer)
        identities = [id(p) for p in model.parameters()], [id(group) for group in optimizer.param_groups]
        for attempt in (self.optimize, self.optimize_step, self.plan):
            with self.subTest(attempt.__name__):
                if fails:
                    with self.assertRaises(olla.CaptureError):
                        attempt(model, x, y, optimizer)
                else:
                    attempt(model, x, y, optimizer)
                self.assert_same(self.everything(model, optimizer), before, "everything")
                self.assertIsNone(model.cache)
                self.assertEqual(
                    identities, ([id(p) for p in model.parameters()], [id(group) for group in optimizer.param_groups])
                )

    def optimize(self, model: nn.Module, x: Tensor, y: Tensor, optimizer: Any) -> None:
        olla.optimize(model, x, loss_fn=F.cross_entropy, targets=y, optimizer=optimizer)

    def plan(self, model: nn.Module, x: Tensor, y: Tensor, optimizer: Any) -> None:
        olla.plan(model, x, loss_fn=F.cross_entropy, targets=y, optimizer=optimizer)

    def optimize_step(self, model: nn.Module, x: Tensor, y: Tensor, optimizer: Any) -> None:
        def step(x: Tensor, y: Tensor) -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

        olla.optimize_step(step, (x, y), model=model, optimizer=optimizer)

    def test_when_it_succeeds(self) -> None:
        with self.assertLogs("olla", "WARNING") as logs:
            self.check(Net(), fails=False)
        self.assertIn("model.calls", logs.output[0])

    def test_when_it_fails(self) -> None:
        self.check(Failing(), fails=True)

    def test_when_a_step_is_measured(self) -> None:
        model, (x, y) = Net(), example()
        model.cache = None
        optimizer = torch.optim.Adam(model.parameters())
        step = olla.optimize(model, x, loss_fn=F.cross_entropy, targets=y, optimizer=optimizer)
        step(x, targets=y)
        before = self.everything(model, optimizer)
        step.measure(x, targets=y)
        after = self.everything(model, optimizer)
        for key in ("calls", "attributes"):  # the eager step runs the model's own code, which changes these
            del before[key], after[key]
        self.assert_same(after, before, "everything")


class BadInputTest(unittest.TestCase):
    def check(self, message: str, model: Any, inputs: Any, **options: Any) -> None:
        with self.assertRaisesRegex(olla.CaptureError, message):
            olla.optimize(model, inputs, **options)

    def test_no_inputs(self) -> None:
        self.check("fails on these inputs.*missing 1 required positional argument", Net(), ())

    def test_inputs_of_no_known_form(self) -> None:
        self.check("inputs is a NoneType: pass a tensor", Net(), None)
        self.check("inputs is a str", Net(), "image.png")

    def test_inputs_that_the_model_rejects(self) -> None:
        self.check(
            r"fails on these inputs at .*api_test\.py:\d+: self\.cache = .*expected input",
            Net(),
            torch.randn(1, 5, 6, 6),
        )

    def test_control_flow_that_depends_on_data_names_the_line(self) -> None:
        self.check(
            r"asks for the value of a tensor at .*api_test\.py:\d+: if output\.sum\(\) > 0", Failing(), example()[0]
        )

    def test_an_item_that_is_read_names_the_line(self) -> None:
        class Reading(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(3, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.layer(x) * x.max().item()

        self.check(
            r"value of a tensor at .*api_test\.py:\d+: return self\.layer\(x\) \* x\.max", Reading(), torch.randn(2, 3)
        )

    def test_a_shape_that_depends_on_data_names_the_line(self) -> None:
        class Selecting(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(3, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.layer(x[x[:, 0] > 0])

        self.check(r"value of a tensor at .*api_test\.py:\d+: return self\.layer\(x\[", Selecting(), torch.randn(2, 3))

    def test_an_optimizer_over_other_parameters(self) -> None:
        x, y = example()
        other = sgd(Net().parameters())
        self.check("belongs to none of the modules", Net(), x, loss_fn=F.cross_entropy, targets=y, optimizer=other)

    def test_something_that_is_no_optimizer(self) -> None:
        x, y = example()
        self.check("not a torch.optim.Optimizer", Net(), x, loss_fn=F.cross_entropy, targets=y, optimizer=object())

    def test_a_compiled_model(self) -> None:
        self.check("wrapped in OptimizedModule: .*torch.compile", torch.compile(Net()), example()[0])

    def test_a_wrapped_model(self) -> None:
        self.check("wrapped in DataParallel: pass its .module", nn.DataParallel(Net()), example()[0])

    def test_a_wrapped_part_of_a_model(self) -> None:
        self.check("submodule '0' is wrapped in DataParallel", nn.Sequential(nn.DataParallel(Net())), example()[0])

    def test_a_scripted_model(self) -> None:
        self.check("TorchScript", torch.jit.script(nn.Linear(2, 2)), torch.randn(1, 2))

    def test_something_that_is_no_model(self) -> None:
        self.check("not a torch.nn.Module", lambda x: x, torch.randn(1))

    def test_targets_without_a_loss(self) -> None:
        self.check("targets without a loss_fn", Net(), example()[0], targets=example()[1])

    def test_a_loss_that_is_no_number(self) -> None:
        x, y = example()
        self.check(r"returns a tensor of shape \(4, 3\)", Net(), x, loss_fn=lambda o, t: o, targets=y)
        self.check("returns float", Net(), x, loss_fn=lambda o, t: 1.0, targets=y)

    def test_an_input_that_requires_a_gradient(self) -> None:
        self.check("an input requires a gradient", nn.Linear(3, 3), torch.randn(2, 3, requires_grad=True))

    def test_an_argument_that_cannot_be_compared(self) -> None:
        self.check("holds a set, which OLLA cannot compare", nn.Linear(3, 3), (torch.randn(2, 3), {1, 2}))

    def test_a_result_that_nobody_can_open(self) -> None:
        class Box:
            def __init__(self, value: Tensor) -> None:
                self.value = value

        class Boxing(nn.Module):
            def forward(self, x: Tensor) -> Box:
                return Box(x + 1)

        self.check("the step returns a Box", Boxing().eval(), torch.randn(2))

    def test_a_parameter_of_a_module_that_was_not_given(self) -> None:
        model, forgotten = nn.Linear(3, 3), nn.Linear(3, 3)

        def step(x: Tensor) -> None:
            forgotten(model(x)).sum().backward()

        with self.assertRaisesRegex(olla.CaptureError, "belongs to none of the modules given"):
            olla.optimize_step(step, (torch.randn(2, 3),), model=model)
        self.assertTrue(all(parameter.grad is None for parameter in forgotten.parameters()))

    def test_a_scheduler_inside_the_step(self) -> None:
        model = nn.Linear(3, 3)
        optimizer = sgd(model.parameters())
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

        def step(x: Tensor) -> None:
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step()
            scheduler.step()

        with self.assertRaisesRegex(olla.CaptureError, "changes 'lr' of parameter group 0"):
            olla.optimize_step(step, (torch.randn(2, 3),), model=model, optimizer=optimizer)
        self.assertEqual(optimizer.param_groups[0]["lr"], 0.01)

    def test_an_optimizer_that_calls_back_inside_a_step_of_ones_own(self) -> None:
        model = nn.Linear(3, 3)
        optimizer = torch.optim.LBFGS(model.parameters())

        def step(x: Tensor) -> None:
            optimizer.step(lambda: model(x).sum())

        with self.assertRaisesRegex(olla.CaptureError, "LBFGS.step calls the model back"):
            olla.optimize_step(step, (torch.randn(2, 3),), model=model, optimizer=optimizer)

    def test_example_args_that_are_a_bare_tensor(self) -> None:
        with self.assertRaisesRegex(olla.CaptureError, "example_args is a tensor"):
            olla.optimize_step(lambda x: x, torch.randn(2), model=nn.Linear(2, 2))

    def test_every_error_is_an_olla_error(self) -> None:
        for error in (olla.CaptureError, olla.ExecutionError, olla.InvalidGraphError, olla.InvalidPlanError):
            self.assertTrue(issubclass(error, olla.OllaError))


class PlanOnlyTest(unittest.TestCase):
    """``olla.plan`` needs no bytes: meta and fake models give the plan of the real one."""

    def plan(self, model: nn.Module, x: Tensor, y: Tensor) -> olla.Plan:
        optimizer = torch.optim.Adam(model.parameters())
        return olla.plan(model, x, loss_fn=F.cross_entropy, targets=y, optimizer=optimizer)

    def test_meta_and_fake_models_give_the_plan_of_the_real_one(self) -> None:
        x, y = example()
        real = self.plan(Net(), x, y)
        with torch.device("meta"):
            meta = self.plan(Net(), x.to("meta"), y.to("meta"))
        with FakeTensorMode() as mode:
            inside = self.plan(Net(), mode.from_tensor(x), mode.from_tensor(y))
        with FakeTensorMode() as mode:
            model, fakes = Net(), (mode.from_tensor(x), mode.from_tensor(y))
        outside = self.plan(model, *fakes)
        for other in (meta, inside, outside):
            self.assertEqual(other.graph_digest, real.graph_digest)
            self.assertEqual((other.order, other.peak_bytes), (real.order, real.peak_bytes))

    def test_a_model_larger_than_this_machine(self) -> None:
        with torch.device("meta"):
            model = nn.Sequential(*(nn.Linear(65536, 65536, bias=False) for _ in range(16)))  # 256 GiB
            plan = olla.plan(model, torch.empty(8, 65536), optimizer=sgd(model.parameters()))
        self.assertEqual(plan.persistent_bytes, 2 * 16 * 65536**2 * 4 + 8 * 65536 * 4)
        self.assertLess(plan.peak_bytes, plan.baseline_peak_bytes / 2)

    def test_the_graph_that_is_planned_can_be_had(self) -> None:
        model, (x, y) = Net(), example()
        optimizer = sgd(model.parameters())
        graph = olla.to_graph(model, x, loss_fn=F.cross_entropy, targets=y, optimizer=optimizer)
        plan = olla.plan(model, x, loss_fn=F.cross_entropy, targets=y, optimizer=optimizer)
        self.assertEqual(graph.digest, plan.graph_digest)
        self.assertEqual(olla.schedule(graph).peak_bytes, plan.peak_bytes)

    def test_program_order_can_be_kept(self) -> None:
        plan, graph = olla.plan(Net(), example()[0], reorder=False), olla.to_graph(Net(), example()[0])
        self.assertEqual(plan.order, tuple(range(len(plan.order))))
        self.assertEqual(plan.peak_bytes, peak_bytes(graph, plan.order))
        self.assertEqual(plan.baseline_peak_bytes, eager_peak_bytes(graph))


class ImportTest(unittest.TestCase):
    def test_graphs_and_plans_need_no_torch(self) -> None:
        code = "import sys, olla, olla.order.schedule, olla.graph.check; assert 'torch' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True)

    def test_private_names_of_torch_are_in_one_file(self) -> None:
        package = Path(olla.__file__).parent
        private = re.compile(
            r"torch(\.\w+)*\._[a-z]|from torch[\w.]* import .*\b_[a-z]|\._(schema|modules|parameters|buffers)\b"
        )
        for path in sorted(package.rglob("*.py")):
            if path.name != "torch_private.py":
                self.assertIsNone(private.search(path.read_text().replace('torch.utils._pytree"', "")), path.name)

    def test_public_names_exist(self) -> None:
        for name in olla.__all__:
            self.assertIsNotNone(getattr(olla, name), name)
        with self.assertRaises(AttributeError):
            _ = olla.nothing
