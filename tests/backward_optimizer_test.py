"""Parameters updated inside the backward pass of compiled models train as with ``optimizer.step()``, in less memory."""

from __future__ import annotations

import copy
import gc
import unittest
import warnings
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torchvision
import transformers
from compile_test import CLASSES, CompiledTestCase, slow, small_network
from eager import sgd
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer

from olla.backend.backend import olla
from olla.backend.joint import Joint, joint_of
from olla.backend.split import split
from olla.backend.updates import insert_updates, is_update
from olla.capture import pieces
from olla.capture.trial import Footprint, footprint
from olla.errors import CaptureError, ExecutionError, InvalidOptionError
from olla.run.emit import emit
from olla.torch_private import aot_backend, boxed

transformers.logging.set_verbosity_error()
STEPS = 5
Call = Callable[[Callable[..., Any]], Tensor]


def adamw(parameters: Any) -> Optimizer:
    return AdamW(parameters, lr=1e-3)


class Side:
    """A model in a loop as users write it; compiled with its optimizer, or not."""

    def __init__(self, model: nn.Module, make: Callable[[Any], Optimizer], **options: Any) -> None:
        self.model = copy.deepcopy(model).train()
        self.optimizer = make(self.model.parameters())
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.run: Any = self.model
        if options.pop("compiled", True):
            options = {"optimizer": self.optimizer, **options}
            given = {name: value for name, value in options.items() if value is not None}
            self.run = torch.compile(self.model, backend=olla, options=given)

    def step(self, call: Call) -> tuple[Tensor, set[str]]:
        """The loss, and the names of the parameters whose gradients backward returned."""
        self.optimizer.zero_grad()
        loss = call(self.run)
        loss.backward()
        left = {name for name, parameter in self.model.named_parameters() if parameter.grad is not None}
        self.optimizer.step()
        self.scheduler.step()
        return loss.detach(), left


class MeanSquare(nn.Module):
    def forward(self, outputs: Tensor) -> Tensor:
        return outputs.square().mean()


class OptimizerTestCase(CompiledTestCase):
    def assert_training_same_as_eager(
        self,
        model: nn.Module,
        call: Call,
        make: Callable[[Any], Optimizer] = sgd,
        left: set[str] | None = None,
        **options: Any,
    ) -> Side:
        """Five steps; from the second on, backward returns gradients of no parameters but those in ``left``."""
        torch._dynamo.reset()
        eager, planned = Side(model, make, compiled=False), Side(model, make, **options)
        for number in range(STEPS):
            torch.manual_seed(number)
            expected, names = eager.step(call)
            torch.manual_seed(number)
            loss, returned = planned.step(call)
            self.assert_same(loss, expected, f"loss of step {number}")
            self.assertEqual(returned, names if number == 0 else left or set(), f"gradients of step {number}")
            self.assert_same(planned.model.state_dict(), eager.model.state_dict(), f"state after step {number}")
            states = [dict(sorted(side.optimizer.state_dict()["state"].items())) for side in (planned, eager)]
            self.assert_same(*states, f"state of the optimizer after step {number}")
        return planned

    def peak_of_step(self, side: Side, call: Call) -> int:
        side.step(call)
        side.optimizer.zero_grad()

        def step() -> None:
            side.step(call)
            side.optimizer.zero_grad()

        return self.peak_of(step)

    def assert_saves(self, model: nn.Module, call: Call, make: Callable[[Any], Optimizer]) -> None:
        planned = self.assert_training_same_as_eager(model, call, make)
        peak = self.peak_of_step(planned, call)
        torch._dynamo.reset()
        self.assertLess(peak, self.peak_of_step(Side(model, make, optimizer=None), call))


class Models(OptimizerTestCase):
    def test_a_network_with_batch_norm_and_dropout(self) -> None:
        images, classes = torch.randn(4, 3, 16, 16), torch.randint(0, CLASSES, (4,))
        self.assert_training_same_as_eager(small_network(), lambda net: F.cross_entropy(net(images), classes))

    def test_wide_layers(self) -> None:
        model, x = nn.Sequential(*[nn.Linear(128, 128) for _ in range(6)]), torch.randn(3, 128)
        for make in (sgd, adamw):
            with self.subTest(make.__name__):
                self.assert_saves(model, lambda net: net(x).square().mean(), make)

    def test_large_weights_are_updated_in_pieces(self) -> None:
        model, x = nn.Sequential(nn.Linear(256, 2048), nn.Linear(2048, 4)), torch.randn(3, 256)

        def call(net: Callable[..., Any]) -> Tensor:
            return net(x).square().mean()

        peaks = list[int]()
        for most in (2**30, 2**18):
            with mock.patch.object(pieces, "_MOST", most):
                planned = self.assert_training_same_as_eager(model, call, adamw)
                peaks.append(self.peak_of_step(planned, call))
        largest = model[0].weight.nbytes
        self.assertLess(peaks[1], peaks[0] - largest + 2**18 + 10_000)

    @slow
    def test_resnet18(self) -> None:
        images, classes = torch.randn(2, 3, 64, 64), torch.randint(0, CLASSES, (2,))
        model = torchvision.models.resnet18(num_classes=CLASSES)
        for make in (sgd, adamw):
            with self.subTest(make.__name__):
                self.assert_saves(model, lambda net: F.cross_entropy(net(images), classes), make)

    @slow
    def test_vision_transformer(self) -> None:
        images, classes = torch.randn(2, 3, 32, 32), torch.randint(0, CLASSES, (2,))
        model = torchvision.models.VisionTransformer(32, 8, 3, 4, 64, 128, dropout=0.1, num_classes=CLASSES)
        for make in (sgd, adamw):
            with self.subTest(make.__name__):
                self.assert_saves(model, lambda net: F.cross_entropy(net(images), classes), make)

    @slow
    def test_gpt2(self) -> None:
        ids = torch.randint(5, 100, (2, 16))
        config = transformers.GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=2, use_cache=False)
        for make in (sgd, adamw):
            with self.subTest(make.__name__):
                model = transformers.GPT2LMHeadModel(config)
                self.assert_saves(model, lambda net: net(input_ids=ids, labels=ids).loss, make)


class MlpTestCase(OptimizerTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 4))
        self.x = torch.randn(3, 8)

    def call(self, run: Callable[..., Any]) -> Tensor:
        return run(self.x).square().mean()

    def begun(self, make: Callable[[Any], Optimizer] = sgd) -> Side:
        """A side whose parameters are updated inside backward."""
        side = Side(self.model, make)
        for _ in range(2):
            side.step(self.call)
        self.assertEqual(side.step(self.call)[1], set())
        return side


class Loops(MlpTestCase):
    """What a loop may do."""

    def test_groups_have_their_own_rates(self) -> None:
        def make(parameters: Any) -> Optimizer:
            first, *others = parameters
            return SGD([{"params": [first], "lr": 0.5}, {"params": others, "momentum": 0.5}], lr=0.1)

        self.assert_training_same_as_eager(self.model, self.call, make)

    def test_a_scheduler_does_not_warn(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            self.begun()

    def test_frozen_layers_stay(self) -> None:
        self.model[2].requires_grad_(False)
        self.assert_training_same_as_eager(self.model, self.call)

    def test_parameters_that_the_optimizer_lacks_keep_their_gradients(self) -> None:
        self.assert_training_same_as_eager(
            self.model, self.call, lambda parameters: sgd([*parameters][:4]), left={"4.weight", "4.bias"}
        )

    def test_tied_weights_are_one_parameter(self) -> None:
        tied = nn.Linear(8, 8)
        model = nn.Sequential(tied, nn.GELU(), tied, nn.Linear(8, 8))
        self.assert_training_same_as_eager(model, self.call)

    def test_a_parameter_of_two_graphs_is_left_to_the_step(self) -> None:
        class Broken(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.shared, self.own = nn.Linear(8, 8), nn.Linear(8, 8)

            def forward(self, x: Tensor) -> Tensor:
                x = self.own(self.shared(x).tanh())
                torch._dynamo.graph_break()
                return self.shared(x.tanh())

        self.assert_training_same_as_eager(Broken(), self.call, left={"shared.weight", "shared.bias"})

    def test_a_parameter_that_the_loss_uses_is_left_to_the_step(self) -> None:
        def call(run: Any) -> Tensor:
            return self.call(run) + 0.1 * getattr(run, "0").weight.square().sum()

        self.assert_training_same_as_eager(self.model, call, left={"0.weight"})

    def test_a_model_that_is_called_twice_is_left_to_the_step(self) -> None:
        def call(run: Any) -> Tensor:
            return self.call(run) + run(self.x.sin()).mean()

        self.assert_training_same_as_eager(self.model, call, left={name for name, _ in self.model.named_parameters()})

    def test_a_gradient_that_is_on_an_input_or_on_another_is_left_to_the_step(self) -> None:
        class Sum(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = (nn.Parameter(torch.randn(3, 8)) for _ in range(2))
                self.third = nn.Linear(8, 8)

            def forward(self, x: Tensor) -> Tensor:
                return self.third(x).tanh() + self.first + self.second

        self.assert_training_same_as_eager(Sum(), self.call, left={"first", "second"})

    def test_a_sparse_gradient_is_left_to_the_step(self) -> None:
        model, x = nn.Sequential(nn.Embedding(50, 8, sparse=True), nn.Linear(8, 4)), torch.tensor([1, 2, 3])
        self.assert_training_same_as_eager(
            model, lambda run: run(x).square().mean(), lambda parameters: SGD(parameters, lr=0.1), left={"0.weight"}
        )

    def test_hooks_see_gradients(self) -> None:
        seen = []
        self.model[0].weight.register_hook(lambda gradient: seen.append(1))
        self.model[2].weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(2))
        optimizer = sgd(self.model.parameters())
        run = torch.compile(self.model, backend=olla, options={"optimizer": optimizer})
        for _ in range(3):
            self.call(run).backward()
            optimizer.step()
            left = {name for name, parameter in self.model.named_parameters() if parameter.grad is not None}
            optimizer.zero_grad()
        self.assertEqual((seen, left), ([1, 2] * 3, {"0.weight", "2.weight"}))

    def test_gradients_that_are_there_are_added_to(self) -> None:
        eager, planned = Side(self.model, sgd, compiled=False), self.begun()
        for _ in range(3):
            eager.step(self.call)
        for side in (eager, planned):
            side.optimizer.zero_grad()
            for parameter in side.model.parameters():
                parameter.grad = torch.ones_like(parameter)
            self.call(side.run).backward()
            side.optimizer.step()
        self.assert_same(planned.model.state_dict(), eager.model.state_dict(), "state")

    def test_gradients_that_are_zeroed_in_place_stay(self) -> None:
        eager, planned = Side(self.model, sgd, compiled=False), Side(self.model, sgd)
        for side in (eager, planned):
            for _ in range(3):
                self.call(side.run).backward()
                side.optimizer.step()
                side.optimizer.zero_grad(set_to_none=False)
        self.assert_same(planned.model.state_dict(), eager.model.state_dict(), "state")

    def test_gradients_that_are_asked_for_change_nothing(self) -> None:
        side = self.begun()
        parameters = [*side.model.parameters()]
        before = copy.deepcopy(side.model.state_dict())
        expected = torch.autograd.grad(self.call(side.model), parameters)
        self.assert_same(torch.autograd.grad(self.call(side.run), parameters), expected, "gradients")
        self.call(side.run).backward(inputs=[parameters[0]], create_graph=False)
        self.assertIsNone(parameters[1].grad)
        changed = [name for name, value in side.model.state_dict().items() if not torch.equal(value, before[name])]
        self.assertEqual(changed, ["0.weight"])

    def test_another_model_in_the_same_code_keeps_its_gradients(self) -> None:
        other = copy.deepcopy(self.model)
        optimizer = sgd(self.model.parameters())
        run = torch.compile(lambda net, x: net(x), backend=olla, options={"optimizer": optimizer})
        for _ in range(3):
            for net in (self.model, other):
                run(net, self.x).square().mean().backward()
            optimizer.step()
            left = [[parameter.grad is not None for parameter in net.parameters()] for net in (self.model, other)]
            optimizer.zero_grad()
        self.assertEqual(left, [[False] * 6, [True] * 6])

    def test_parts_that_are_compiled_one_by_one_share_the_optimizer(self) -> None:
        eager, planned = Side(self.model, adamw, compiled=False), Side(self.model, adamw, compiled=False)
        for part in (planned.model[0], planned.model[2]):
            part.compile(backend=olla, options={"optimizer": planned.optimizer})
        for number in range(STEPS):
            expected, _ = eager.step(self.call)
            loss, left = planned.step(self.call)
            self.assert_same(loss, expected, "loss")
            self.assert_same(planned.model.state_dict(), eager.model.state_dict(), "state")
            if number:
                self.assertEqual(left, {"4.weight", "4.bias"})

    def test_a_budget_is_kept(self) -> None:
        """Of the forward and backward pass: the loss is in them, so that the caller allocates nothing in between."""
        hidden = [nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.LayerNorm(32)) for _ in range(6)]
        model, x = nn.Sequential(*hidden, nn.Linear(32, CLASSES), MeanSquare()), torch.randn(512, 32)
        state = sum(parameter.nbytes for parameter in model.parameters())  # the momentum
        budget = x.nbytes + 2 * state + 500_000

        def call(net: Any) -> Tensor:
            return net(x)

        side = self.assert_training_same_as_eager(model, call, memory_budget=budget, time_limit=20.0)
        peak = self.peak_of_step(side, call)
        self.assertLessEqual(peak, 500_000)
        torch._dynamo.reset()
        self.assertGreater(self.peak_of_step(Side(model, sgd), call), 500_000)

    def test_the_optimizer_goes_with_its_last_user(self) -> None:
        side = self.begun()
        optimizer, parameter = weakref.ref(side.optimizer), weakref.ref(next(side.model.parameters()))
        del side
        torch._dynamo.reset()
        gc.collect()
        self.assertIsNone(optimizer())
        self.assertIsNone(parameter())


class Errors(MlpTestCase):
    """What would not be the same numbers is said before a parameter has changed, where that can be known."""

    def assert_step_declined(self, message: str, change: Callable[[Side], None], before: Side | None = None) -> None:
        side = before or Side(self.model, sgd)
        state = copy.deepcopy(side.model.state_dict())
        with self.assertRaisesRegex(ExecutionError, message):
            change(side)
        self.assert_same(side.model.state_dict(), state, "parameters")

    def test_clipping(self) -> None:
        def loop(side: Side) -> None:
            self.call(side.run).backward()
            nn.utils.clip_grad_norm_(side.model.parameters(), 1.0)
            side.optimizer.step()

        self.assert_step_declined("is changed between its backward pass and", loop)

    def test_a_scaler(self) -> None:
        def loop(side: Side) -> None:
            scaler = torch.amp.GradScaler("cpu")
            scaler.scale(self.call(side.run)).backward()
            scaler.step(side.optimizer)

        self.assert_step_declined("GradScaler", loop)

    def test_a_scaler_that_leaves_unscaling_to_the_optimizer(self) -> None:
        def loop(side: Side) -> None:
            scaler = torch.amp.GradScaler("cpu")
            scaler.scale(self.call(side.run)).backward()
            scaler.step(side.optimizer)

        side = Side(self.model, lambda parameters: AdamW(parameters, fused=True))
        self.assert_step_declined("GradScaler", loop, side)

    def test_accumulation(self) -> None:
        def loop(side: Side) -> None:
            for _ in range(2):
                self.call(side.run).backward()
            side.optimizer.step()

        self.assert_step_declined("accumulation", loop)

    def test_two_backward_passes_before_a_step(self) -> None:
        side = self.begun()
        self.call(side.run).backward()  # updates
        self.assert_step_declined("another gradient before", lambda side: self.call(side.run).backward(), side)

    def test_a_gradient_from_elsewhere_that_comes_later(self) -> None:
        side = self.begun()
        loss = self.call(side.run) + side.model[0].weight.square().sum()
        with self.assertRaisesRegex(ExecutionError, "another gradient before"):
            loss.backward()

    def assert_compiling_declined(self, error: type[Exception], message: str, optimizer: object) -> None:
        with self.assertRaises(BackendCompilerFailed) as raised:
            torch.compile(self.model, backend=olla, options={"optimizer": optimizer})(self.x)
        self.assertIsInstance(raised.exception.inner_exception, error)
        self.assertIn(message, str(raised.exception))

    def test_what_is_no_optimizer(self) -> None:
        self.assert_compiling_declined(InvalidOptionError, "is a str, not a torch.optim.Optimizer", "sgd")

    def test_lbfgs(self) -> None:
        optimizer = torch.optim.LBFGS(self.model.parameters())
        self.assert_compiling_declined(CaptureError, "LBFGS.step calls the model back", optimizer)

    def test_an_optimizer_that_couples_parameters(self) -> None:
        class Clipped(SGD):
            def step(self, closure: Any = None) -> Any:  # type: ignore[override]
                nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 1.0)
                return super().step(closure)

        optimizer = Clipped(self.model.parameters(), lr=0.1)
        self.assert_compiling_declined(CaptureError, "Clipped couples its parameters", optimizer)

    def test_hooks_on_the_step(self) -> None:
        optimizer = sgd(self.model.parameters())
        optimizer.register_step_post_hook(lambda *_: None)
        self.assert_compiling_declined(CaptureError, "hooks on the step of SGD", optimizer)

    def test_the_optimizer_of_another_model(self) -> None:
        optimizer = sgd(copy.deepcopy(self.model).parameters())
        self.assert_compiling_declined(CaptureError, "holds none of the 6 parameters", optimizer)


class InTheGraph(CompiledTestCase):
    def test_updates_are_ops_that_use_gradients_up(self) -> None:
        model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
        optimizer, found, needs = adamw(model.parameters()), list[Joint](), list[Footprint]()

        def backend(module: fx.GraphModule, given: Any) -> Any:
            live = dict(enumerate(given))

            def partition(module: fx.GraphModule, _: Any, *, num_fwd_outputs: int, **__: Any) -> Any:
                needs.extend(footprint(optimizer, parameter) for parameter in model.parameters())
                insert_updates(module, num_fwd_outputs, optimizer, live)
                found.append(joint_of(module, num_fwd_outputs))
                lowered = found[0].lowered
                return split(emit(module, lowered, range(len(lowered.graph.ops))), num_fwd_outputs)

            def as_it_is(part: fx.GraphModule, _: Any) -> Any:
                return boxed(part)

            return aot_backend(partition, as_it_is, as_it_is, as_it_is)(module, given)

        torch.compile(model, backend=backend)(torch.randn(3, 64)).sum().backward()
        graph, nodes = found[0].lowered.graph, found[0].lowered.nodes
        updates = [index for index, node in enumerate(nodes) if is_update(node)]
        self.assertEqual(len(updates), 4)
        sizes = [
            sum(graph.storages[s].size for s in graph.ops[i].writes if graph.storages[s].persistent) for i in updates
        ]
        self.assertEqual(sizes, [p.nbytes + n.state for p, n in zip(model.parameters(), needs, strict=True)])
        self.assertEqual([graph.ops[index].workspace for index in updates], [need.workspace for need in needs])
        for index in updates:
            parameter, gradient = graph.ops[index].writes[:2]
            self.assertNotIn(gradient, graph.outputs)
            before = graph.predecessors[index]
            readers = [other for other, op in enumerate(graph.ops) if parameter in op.reads]
            self.assertTrue(set(readers) <= set(before))
            self.assertIn(found[0].boundary, before)


if __name__ == "__main__":
    unittest.main()
