"""Planned steps with many optimizers equal eager ones; schedulers, checkpoints and hooks keep working."""

from __future__ import annotations

import copy
import tempfile
import unittest
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from eager import EagerTestCase, Side, sgd, side
from torch import Tensor, nn, optim
from torch.nn import functional as F

import olla
from olla.capture import pieces
from olla.capture.pieces import piece_bytes, pieces_of, update_in_pieces
from olla.capture.trial import Footprint, divisible, footprint, separable
from olla.capture.updates import Update, UpdateRecorder, chunks
from olla.torch_private import FakeTensorMode


class Net(nn.Module):
    """Convolution, batch norm, dropout and a linear layer: parameters of one, two and four dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.drop(F.relu(self.norm(self.conv(images))).mean((2, 3))))


class Matrices(nn.Module):
    """Only parameters of two dimensions, which is what Muon takes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16, bias=False)
        self.second = nn.Linear(16, 5, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.second(F.relu(self.first(images.flatten(1)[:, :12])))


class NormalizedTogether(optim.SGD):
    """Scales all gradients by their common norm: parameters cannot be updated one by one."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if gradients:
            norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
            for gradient in gradients:
                gradient.div_(norm)
        return super().step(closure)


class SignOfMomentum(optim.Optimizer):
    """A third-party optimizer in the manner of Lion."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "beta": 0.9})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["beta"])
                parameter.add_(state["momentum"].sign(), alpha=-group["lr"])


class Accumulating(optim.Optimizer):
    """A third-party optimizer that has its state from the start."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {"steps": torch.zeros(()), "sum": torch.full_like(parameter, 0.5)}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state["steps"] += 1
                    state["sum"].addcmul_(parameter.grad, parameter.grad)
                    parameter.addcdiv_(parameter.grad, state["sum"].sqrt() * state["steps"], value=-group["lr"])


def images() -> Tensor:
    return torch.randn(4, 3, 8, 8)


def labels() -> Tensor:
    return torch.randint(0, 5, (4,))


def in_pieces_of(size: int) -> Any:
    """Update all that is larger, in bytes, in pieces."""
    return mock.patch.object(pieces, "_MOST", size)


class OptimizersTest(EagerTestCase):
    def check(
        self,
        make: Callable[[Any], optim.Optimizer],
        *,
        separable: bool = True,
        divisible: bool = True,
        model: Any = Net,
    ) -> None:
        torch.manual_seed(0)
        net = model()
        recorder = UpdateRecorder([make(net.parameters())])
        self.assertEqual(list(recorder._separable.values()), [separable])
        training = {"loss_fn": F.cross_entropy, "targets": labels, "make_optimizer": make}
        self.assert_training_same(net, images, **training)
        calls = 0

        def update(*arguments: Any) -> None:  # no mock, which would keep gradients
            nonlocal calls
            calls += 1
            update_in_pieces(*arguments)

        with in_pieces_of(100), mock.patch("olla.capture.updates.update_in_pieces", update):
            recorder = UpdateRecorder([make(net.parameters())])
            self.assertEqual(list(recorder._divisible.values()), [divisible])
            self.assert_training_same(net, images, **training)
        self.assertEqual(calls > 0, divisible)

    def test_sgd(self) -> None:
        self.check(lambda p: optim.SGD(p, lr=0.1), divisible=False)  # all in place

    def test_sgd_with_nesterov_momentum(self) -> None:
        self.check(lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01))

    def test_sgd_that_maximizes(self) -> None:
        self.check(lambda p: optim.SGD(p, lr=0.1, maximize=True))

    def test_adam(self) -> None:
        self.check(optim.Adam)

    def test_adam_amsgrad(self) -> None:
        self.check(lambda p: optim.Adam(p, amsgrad=True))

    def test_adamw_fused(self) -> None:
        self.check(lambda p: optim.AdamW(p, fused=True), divisible=False)

    def test_adamw_foreach(self) -> None:
        self.check(lambda p: optim.AdamW(p, foreach=True))

    def test_adamax(self) -> None:
        self.check(optim.Adamax)

    def test_nadam(self) -> None:
        self.check(optim.NAdam)

    def test_radam(self) -> None:
        self.check(optim.RAdam)

    def test_rmsprop(self) -> None:
        self.check(lambda p: optim.RMSprop(p, momentum=0.9, centered=True))

    def test_rprop(self) -> None:
        self.check(optim.Rprop)

    def test_adagrad(self) -> None:
        self.check(optim.Adagrad)

    def test_adadelta(self) -> None:
        self.check(optim.Adadelta)

    def test_asgd(self) -> None:
        self.check(optim.ASGD, divisible=False)  # all in place

    def test_adafactor(self) -> None:
        self.check(optim.Adafactor, divisible=False)

    def test_muon(self) -> None:
        self.check(optim.Muon, divisible=False, model=Matrices)

    def test_third_party(self) -> None:
        self.check(lambda p: SignOfMomentum(p, lr=0.01))

    def test_third_party_with_state_from_the_start(self) -> None:
        self.check(Accumulating)

    def test_state_from_the_start_has_no_bytes_on_meta(self) -> None:
        for device in ("cpu", "meta"):
            with torch.device(device):
                matrix = nn.Parameter(torch.randn(10, 20))
                optimizer = Accumulating([matrix, nn.Parameter(torch.randn(()))])
                self.assertTrue(separable(optimizer))
                self.assertEqual(footprint(optimizer, matrix), Footprint(state=804, workspace=1600))

    def test_sparse_gradients(self) -> None:
        for make in (optim.SparseAdam, lambda p: optim.SGD(p, lr=0.1)):
            self.assert_training_same(
                nn.Embedding(50, 4, sparse=True), lambda: torch.randint(0, 50, (6,)), make_optimizer=make
            )

    def test_one_that_couples_all_parameters(self) -> None:
        self.check(lambda p: NormalizedTogether(p, lr=0.1), separable=False, divisible=False)

    def test_lbfgs_calls_the_planned_step_back(self) -> None:
        torch.manual_seed(0)
        net = Net()
        eager, planned = (
            side(one, lambda p: optim.LBFGS(p, lr=0.1, max_iter=4, history_size=3)) for one in (net, copy.deepcopy(net))
        )
        step = olla.optimize(
            planned.model, images(), loss_fn=F.cross_entropy, targets=labels(), optimizer=planned.optimizer
        )
        for number in range(3):
            x, y = images(), labels()

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                eager.optimizer.zero_grad()
                loss = F.cross_entropy(eager.model(x), y)
                loss.backward()
                return loss

            torch.manual_seed(number)
            expected = eager.optimizer.step(closure)
            torch.manual_seed(number)
            self.assert_same(step(x, targets=y), expected, "loss")
            self.assert_same(planned.model.state_dict(), eager.model.state_dict(), "model")

    def test_parameter_groups_with_settings_of_their_own(self) -> None:
        torch.manual_seed(0)
        net = Net()
        eager = Side(
            net,
            optim.AdamW([{"params": net.conv.parameters(), "weight_decay": 0.0}, {"params": net.head.parameters()}]),
        )
        planned = eager.copy()
        step = olla.optimize(
            planned.model, images(), loss_fn=F.cross_entropy, targets=labels(), optimizer=planned.optimizer
        )

        def eager_step(x: Tensor, targets: Tensor) -> Tensor:
            eager.optimizer.zero_grad()
            loss = F.cross_entropy(eager.model(x), targets)
            loss.backward()
            eager.optimizer.step()
            return loss

        batches = [((images(),), {"targets": labels()}) for _ in range(3)]
        self.assert_steps_same(planned, eager, step, eager_step, batches)
        # The norm is trained by nobody: its gradients add up in .grad, as they do in eager PyTorch.
        for name in ("weight", "bias"):
            self.assert_same(getattr(planned.model.norm, name).grad, getattr(eager.model.norm, name).grad, name)


class SchedulersTest(EagerTestCase):
    def test_a_scheduler_takes_effect_at_once_and_warns_of_nothing(self) -> None:
        torch.manual_seed(0)
        eager = side(Net(), sgd)
        planned = eager.copy()
        schedulers = [optim.lr_scheduler.ExponentialLR(one.optimizer, 0.5) for one in (eager, planned)]
        step = olla.optimize(
            planned.model, images(), loss_fn=F.cross_entropy, targets=labels(), optimizer=planned.optimizer
        )
        made = step._planned
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for number in range(4):
                x, y = images(), labels()
                torch.manual_seed(number)
                step(x, targets=y)
                torch.manual_seed(number)
                eager.optimizer.zero_grad()
                F.cross_entropy(eager.model(x), y).backward()
                eager.optimizer.step()
                for scheduler in schedulers:
                    scheduler.step()
                self.assert_sides_same(planned, eager)
        self.assertEqual(len(made), 1, "planned once")

    def test_step_hooks_run_once_per_step(self) -> None:
        net = Net()
        optimizer = sgd(net.parameters())
        calls: list[str] = []
        optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
        optimizer.register_step_post_hook(lambda *_: calls.append("after"))
        step = olla.optimize(net, images(), loss_fn=F.cross_entropy, targets=labels(), optimizer=optimizer)
        self.assertEqual(calls, [])
        step(images(), targets=labels())
        self.assertEqual(calls, ["before", "after"])

    def test_a_hook_that_is_added_later_runs_once_per_step_too(self) -> None:
        net = Net()
        optimizer = sgd(net.parameters())
        step = olla.optimize(net, images(), loss_fn=F.cross_entropy, targets=labels(), optimizer=optimizer)
        step(images(), targets=labels())
        calls: list[str] = []
        optimizer.register_step_post_hook(lambda *_: calls.append("after"))
        with self.assertLogs("olla", "WARNING") as logs:
            step(images(), targets=labels())
        self.assertIn("hooks of an optimizer", logs.output[0])
        self.assertEqual(calls, ["after"])

    def test_a_checkpoint_of_eager_pytorch_is_resumed(self) -> None:
        torch.manual_seed(0)
        eager = side(Net(), optim.Adam)

        def eager_step(x: Tensor, targets: Tensor) -> Tensor:
            eager.optimizer.zero_grad()
            loss = F.cross_entropy(eager.model(x), targets)
            loss.backward()
            eager.optimizer.step()
            return loss

        for _ in range(2):
            eager_step(images(), labels())
        planned = side(Net(), optim.Adam)
        step = olla.optimize(
            planned.model, images(), loss_fn=F.cross_entropy, targets=labels(), optimizer=planned.optimizer
        )
        step(images(), targets=labels())
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "checkpoint.pt"
            torch.save([eager.model.state_dict(), eager.optimizer.state_dict()], path)
            model_state, optimizer_state = torch.load(path)
        planned.model.load_state_dict(model_state)
        planned.optimizer.load_state_dict(optimizer_state)
        batches = [((images(),), {"targets": labels()}) for _ in range(3)]
        self.assert_steps_same(planned, eager, step, eager_step, batches)


class RemembersEverything(optim.SGD):
    """Keeps its own list of parameters and its own books, as some third-party optimizers do."""

    def __init__(self, parameters: Any, lr: float) -> None:
        self.mine = list(parameters)
        self.book: list[int] = []
        self.count = torch.zeros(())
        super().__init__(self.mine, lr=lr)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        self.book.append(len(self.book))
        self.count += 1
        with torch.no_grad():
            for parameter in self.mine:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad + 0 * torch.rand(()), alpha=-self.param_groups[0]["lr"])


class TrialTest(EagerTestCase):
    def test_a_learning_rate_of_zero_hides_no_coupling(self) -> None:
        parameters = list(Net().parameters())
        self.assertFalse(separable(NormalizedTogether(parameters, lr=0.0)))
        self.assertTrue(separable(optim.SGD(parameters, lr=0.0)))
        self.assertTrue(separable(optim.SGD(parameters, lr=torch.tensor(0.0))))

    def test_an_optimizer_that_the_trial_cannot_reach_is_taken_as_a_whole_and_left_alone(self) -> None:
        net = Net()
        F.cross_entropy(net(images()), labels()).backward()  # real gradients, which a careless trial would use
        before = copy.deepcopy([(p.detach(), p.grad) for p in net.parameters()])
        optimizer = RemembersEverything(net.parameters(), lr=0.1)
        random_state = torch.get_rng_state()
        self.assertFalse(separable(optimizer))
        footprint(optimizer, net.conv.weight)
        self.assert_same([(p.detach(), p.grad) for p in net.parameters()], before, "parameters and gradients")
        self.assertEqual((optimizer.book, optimizer.count.item()), ([], 0))
        self.assertTrue(torch.equal(torch.get_rng_state(), random_state))


class PiecesTest(EagerTestCase):
    """Some rows of a parameter after the others."""

    def assert_updated_same(self, make: Callable[[Any], optim.Optimizer], *parameters: Tensor) -> None:
        """Three steps of eager PyTorch, and of updates in pieces, with a learning rate that changes."""
        ours = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
        theirs = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
        planned, eager = make(ours), make(theirs)
        for number in range(3):
            for optimizer in (planned, eager):
                for group in optimizer.param_groups:
                    group["lr"] = 0.1 / (1 + number)
            for one, other in zip(ours, theirs, strict=True):
                other.grad = torch.randn_like(other)
                with in_pieces_of(1000):
                    Update(planned, [one], whole=False, in_pieces=True)(other.grad.clone())
            eager.step()
        self.assert_same([*map(Tensor.detach, ours)], [*map(Tensor.detach, theirs)], "parameters")
        self.assertTrue(all(one.grad is None for one in ours))
        self.assertEqual(len(planned.state), len(eager.state))  # no piece is left
        for one, other in zip(ours, theirs, strict=True):
            self.assert_same(dict(planned.state[one]), dict(eager.state[other]), "state")

    def test_parameters_of_any_layout(self) -> None:
        torch.manual_seed(0)
        parameters = (
            torch.randn(1001),
            torch.randn(3, 700),  # each row is a piece
            torch.randn(40, 5, 3, 3).to(memory_format=torch.channels_last),
            torch.randn(30, 50).t(),
            torch.randn(7),
        )
        for make in (optim.AdamW, optim.Adagrad, lambda p: optim.SGD(p, lr=0.1), lambda p: optim.SGD(p, momentum=0.9)):
            self.assert_updated_same(make, *parameters)

    def test_state_that_is_not_new(self) -> None:
        for make in (lambda p: optim.AdamW([{"params": p[:1]}, {"params": p[1:], "betas": (0.5, 0.6)}]), Accumulating):
            self.assert_updated_same(make, torch.randn(90, 40), torch.randn(80, 50))

    def test_momentum_that_comes_later(self) -> None:
        eager, planned = nn.Parameter(torch.randn(600)), nn.Parameter(torch.zeros(600))
        planned.data.copy_(eager.detach())
        theirs, ours = optim.SGD([eager], lr=0.1), optim.SGD([planned], lr=0.1)
        for momentum in (0.0, 0.9, 0.9):
            for optimizer in (theirs, ours):
                optimizer.param_groups[0]["momentum"] = momentum
            eager.grad = torch.randn(600)
            with in_pieces_of(1000):
                Update(ours, [planned], whole=False, in_pieces=True)(eager.grad.clone())
            theirs.step()
        self.assert_same(planned.detach(), eager.detach(), "parameter")
        self.assert_same(dict(ours.state[planned]), dict(theirs.state[eager]), "state")

    def test_a_failure_leaves_the_optimizer_as_it_was(self) -> None:
        parameter = nn.Parameter(torch.randn(600))
        optimizer = optim.Adam([parameter])
        with in_pieces_of(1000):
            update = Update(optimizer, [parameter], whole=False, in_pieces=True)
        groups = optimizer.param_groups
        interrupted = mock.patch.object(torch.Tensor, "addcdiv_", side_effect=KeyboardInterrupt)
        with interrupted, self.assertRaises(KeyboardInterrupt):
            update(torch.randn(600))
        self.assertIs(optimizer.param_groups, groups)
        self.assertEqual([id(p) for p in groups[0]["params"]], [id(parameter)])
        self.assertLessEqual(set(optimizer.state), {parameter})

    def test_pieces_are_about_as_large_as_each_other(self) -> None:
        with in_pieces_of(1000):
            self.assertEqual([each.stop - each.start for each in pieces_of(torch.empty(101, 5))], [34, 34, 33])
            self.assertEqual(piece_bytes(torch.empty(101, 5)), 34 * 5 * 4)
            self.assertEqual(len(pieces_of(torch.empty(3, 700))), 3)
            for small in (torch.empty(50, 5), torch.empty(()), torch.empty(0, 5)):
                self.assertEqual((pieces_of(small), piece_bytes(small)), ([], small.nbytes))

    def test_what_takes_rows_together_is_found_out(self) -> None:
        vector, matrix = nn.Parameter(torch.randn(50)), nn.Parameter(torch.randn(5, 60))
        with in_pieces_of(100):
            self.assertTrue(divisible(optim.Adam([vector, matrix])))
            self.assertFalse(divisible(NormalizedTogether([vector], lr=0.1)))
            self.assertFalse(divisible(optim.Adafactor([vector, matrix])))
        self.assertFalse(divisible(optim.Adam([vector, matrix])))  # which are small

    def test_the_plan_holds_what_a_piece_needs(self) -> None:
        model = nn.Embedding(4096, 256)
        optimizer = optim.AdamW(model.parameters())
        training = {"loss_fn": lambda out: out.square().mean(), "optimizer": optimizer}
        inputs = torch.randint(0, 4096, (4,))
        whole = 4096 * 256 * 4
        with in_pieces_of(2**30):
            self.assertGreater(olla.plan(model, inputs, **training).peak_bytes, 1.9 * whole)
        with in_pieces_of(whole // 8):
            step = olla.optimize(model, inputs, **training)
            self.assertLess(step.plan.peak_bytes, 1.4 * whole)
            measured = step.measure(inputs)
        self.assertTrue(measured.exact)
        eager = olla.plan(model, inputs, **training).baseline_peak_bytes
        self.assertAlmostEqual(step.plan.baseline_peak_bytes / eager, 1, delta=1e-4)


class ChunksTest(unittest.TestCase):
    """Bytes of parameters, and how many of them are updated at once."""

    def at_once(self, *sizes: int, device: str) -> list[int]:
        with FakeTensorMode():
            pairs = [(torch.empty(size, dtype=torch.uint8, device=device), None) for size in sizes]
            return [len(chunk) for chunk in chunks(pairs, sum(sizes))]

    def test_on_cpus_what_is_small_beside_all_waits_for_its_neighbours(self) -> None:
        self.assertEqual(self.at_once(960, 1, 1, 1, 1, 1, 35, device="cpu"), [1, 5, 1])

    def test_on_gpus_as_much_waits_as_the_largest_needs_anyway(self) -> None:
        self.assertEqual(self.at_once(*[30] * 40, device="cuda"), [1] * 40)
        self.assertEqual(self.at_once(*[10] * 30, 12, *[10] * 30, device="cuda"), [1] * 61)
        self.assertEqual(self.at_once(*[10] * 30, 20, *[10] * 30, device="cuda"), [2] * 15 + [1] + [2] * 15)

    def test_on_gpus_the_largest_of_few_does_not_make_all_wait(self) -> None:
        self.assertEqual(self.at_once(1200, *[10] * 120, device="cuda"), [1] + [10] * 12)

    def test_on_gpus_there_are_never_many_calls(self) -> None:
        self.assertEqual(self.at_once(*[1] * 1000, device="cuda"), [20] * 50)


class FootprintTest(EagerTestCase):
    def test_the_workspace_is_that_of_the_update(self) -> None:
        weight = nn.Parameter(torch.randn(40, 30))
        size = weight.numel() * 4
        for optimizer, expected in (
            (optim.SGD([weight], lr=0.1, momentum=0.9), 0),  # all in place
            (optim.SGD([weight], lr=0.1, weight_decay=0.1), size),  # gradient + decay
            (optim.Adam([weight]), 2 * size),  # a square root, and its quotient
        ):
            self.assertAlmostEqual(footprint(optimizer, weight).workspace / size, expected / size, delta=0.02)

    def test_the_state_that_the_first_step_will_make_is_foreseen(self) -> None:
        for make in (sgd, optim.Adam, optim.Adafactor, optim.RMSprop, optim.Adagrad):
            net = Net()
            optimizer = make(net.parameters())
            foreseen = [footprint(optimizer, parameter).state for parameter in net.parameters()]
            F.cross_entropy(net(images()), labels()).backward()
            optimizer.step()
            for parameter, size in zip(net.parameters(), foreseen, strict=True):
                tensors = [value for value in optimizer.state[parameter].values() if isinstance(value, Tensor)]
                self.assertEqual(size, sum(t.numel() * t.element_size() for t in tensors), type(optimizer).__name__)

    def test_trying_out_changes_nothing(self) -> None:
        net = Net()
        optimizer = optim.Adam(net.parameters())
        before = copy.deepcopy(optimizer.state_dict())
        parameters = [p.clone() for p in net.parameters()]
        random_state = torch.get_rng_state()
        UpdateRecorder([optimizer])
        self.assert_same(optimizer.state_dict(), before, "optimizer")
        self.assert_same(list(net.parameters()), parameters, "parameters")
        self.assertTrue(torch.equal(torch.get_rng_state(), random_state))
