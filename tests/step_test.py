"""The step as users call it: their own step functions, all kinds of models, other signatures."""

from __future__ import annotations

import copy
import threading
import warnings
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import torch
from eager import EagerTestCase, Side, sgd, side
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree
from torch.utils.checkpoint import checkpoint

import olla

Pair = namedtuple("Pair", "first second")


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 4))


def batch(size: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 6), torch.randint(0, 4, (size,))


class OwnStepTest(EagerTestCase):
    """``olla.optimize_step`` against the same function run eagerly."""

    def check(self, make_step: Any, *, steps: int = 5, model: nn.Module | None = None) -> olla.Step:
        torch.manual_seed(0)
        eager = side(model or mlp(), sgd)
        planned = eager.copy()
        batches = [(batch(), {}) for _ in range(steps)]
        step = olla.optimize_step(
            make_step(planned.model, planned.optimizer), batches[0][0], model=planned.model, optimizer=planned.optimizer
        )
        self.assert_steps_same(planned, eager, step, make_step(eager.model, eager.optimizer), batches)
        return step

    def test_autocast_to_bfloat16(self) -> None:
        def make(model: nn.Module, optimizer: Any) -> Any:
            def step(x: Tensor, y: Tensor) -> Tensor:
                optimizer.zero_grad()
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                return loss

            return step

        step = self.check(make)
        self.assertIn("bfloat16", step.code)

    def test_clipping_by_the_global_norm(self) -> None:
        def make(model: nn.Module, optimizer: Any) -> Any:
            def step(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                return loss, norm

            return step

        self.check(make)

    def test_gradient_accumulation(self) -> None:
        def make(model: nn.Module, optimizer: Any) -> Any:
            def step(x: Tensor, y: Tensor) -> list[Tensor]:
                optimizer.zero_grad()
                losses = []
                for part, target in zip(x.chunk(4), y.chunk(4), strict=True):
                    loss = F.cross_entropy(model(part), target) / 4
                    loss.backward()
                    losses.append(loss)
                optimizer.step()
                return losses

            return step

        self.check(make)

    def test_two_losses_with_a_backward_each(self) -> None:
        def make(model: nn.Module, optimizer: Any) -> Any:
            def step(x: Tensor, y: Tensor) -> dict[str, Tensor]:
                optimizer.zero_grad()
                output = model(x)
                first, second = F.cross_entropy(output, y), output.square().mean()
                first.backward(retain_graph=True)
                second.backward()
                optimizer.step()
                return {"first": first, "second": second}

            return step

        self.check(make)

    def test_zero_grad_at_the_end(self) -> None:
        def make(model: nn.Module, optimizer: Any) -> Any:
            def step(x: Tensor, y: Tensor) -> Tensor:
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                return loss

            return step

        self.check(make)

    def test_gradients_that_are_never_cleared_add_up_as_in_eager_pytorch(self) -> None:
        def make(model: nn.Module, optimizer: Any) -> Any:
            def step(x: Tensor, y: Tensor) -> Tensor:
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                return loss

            return step

        with self.assertLogs("olla", "WARNING"):  # planned again once gradients are there
            self.check(make)

    def test_gradients_that_are_zeroed_instead_of_dropped(self) -> None:
        def make(model: nn.Module, optimizer: Any) -> Any:
            def step(x: Tensor, y: Tensor) -> Tensor:
                optimizer.zero_grad(set_to_none=False)
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                return loss

            return step

        with self.assertLogs("olla", "WARNING"):
            self.check(make)

    def test_activation_checkpointing(self) -> None:
        def make(model: nn.Module, optimizer: Any) -> Any:
            def step(x: Tensor, y: Tensor) -> Tensor:
                optimizer.zero_grad()
                hidden = checkpoint(model[0], x, use_reentrant=False, preserve_rng_state=False)
                loss = F.cross_entropy(model[1:](hidden), y)
                loss.backward()
                optimizer.step()
                return loss

            return step

        self.check(make)

    def test_two_models_and_two_optimizers(self) -> None:
        torch.manual_seed(0)

        class Sides:
            def __init__(self) -> None:
                self.maker, self.critic = nn.Linear(3, 6), mlp()
                self.optimizers = (sgd(self.maker.parameters()), torch.optim.Adam(self.critic.parameters()))

            def step(self, noise: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
                for optimizer in self.optimizers:
                    optimizer.zero_grad()
                made = self.maker(noise)
                critic_loss = self.critic(made.detach()).mean() - self.critic(real).mean()
                critic_loss.backward()
                self.optimizers[1].step()
                self.optimizers[1].zero_grad()
                maker_loss = -self.critic(made).mean()
                maker_loss.backward()
                self.optimizers[0].step()
                return maker_loss, critic_loss

        eager = Sides()
        planned = copy.deepcopy(eager)
        step = olla.optimize_step(
            planned.step,
            (torch.randn(4, 3), torch.randn(4, 6)),
            model=[planned.maker, planned.critic],
            optimizer=planned.optimizers,
        )
        for seed in range(3):
            noise, real = torch.randn(4, 3), torch.randn(4, 6)
            torch.manual_seed(seed)
            expected = eager.step(noise, real)
            torch.manual_seed(seed)
            self.assert_same(step(noise, real), expected, "losses")
            self.assert_same(planned.maker.state_dict(), eager.maker.state_dict(), "maker")
            self.assert_same(planned.critic.state_dict(), eager.critic.state_dict(), "critic")


class ModelsTest(EagerTestCase):
    """Unusual models, each in training and inference."""

    def check(self, model: nn.Module, inputs: Any, **options: Any) -> olla.Step:
        self.assert_inference_same(copy.deepcopy(model), inputs)
        return self.assert_training_same(model, inputs, **options)

    def test_a_parameter_among_the_results_of_an_inference_is_detached(self) -> None:
        class Open(nn.Linear):
            def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                return super().forward(x), self.weight, self.weight.detach()

        model, x = Open(8, 8).eval(), torch.randn(2, 8)
        with olla.optimize(model, x) as step:
            for _ in range(4):
                results = step(x)
                self.assert_same(results, tuple(result.detach() for result in model(x)), "results")
                self.assertFalse(any(result.requires_grad for result in results))
                self.assertEqual(results[1].data_ptr(), model.weight.data_ptr())

    def test_tied_weights_stay_tied(self) -> None:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed = nn.Embedding(10, 6)
                self.head = nn.Linear(6, 10, bias=False)
                self.head.weight = self.embed.weight

            def forward(self, ids: Tensor) -> Tensor:
                return self.head(self.embed(ids))

        model = Tied()
        self.check(model, lambda: torch.randint(0, 10, (4, 5)))
        self.assertIs(model.head.weight, model.embed.weight)

    def test_keyword_arguments_in_nested_containers(self) -> None:
        class Nested(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(3, 2)

            def forward(self, *, batch: dict[str, list[Tensor]], scale: float) -> dict[str, Any]:
                outputs = [self.layer(x) * scale for x in batch["parts"]]
                return {"outputs": tuple(outputs), "scale": scale, "pair": Pair(outputs[0], None)}

        self.assert_inference_same(Nested(), lambda: {"batch": {"parts": [torch.randn(2, 3)] * 2}, "scale": 0.5})

    def test_in_place_operators_and_buffers(self) -> None:
        class Counting(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(4, 4)
                self.register_buffer("count", torch.zeros((), dtype=torch.long))
                self.register_buffer("mean", torch.zeros(4))

            def forward(self, x: Tensor) -> Tensor:
                x = self.layer(x).relu_().clone()
                x[:, 0].add_(1)
                x[:, 1:3].mul_(2)
                self.count += 1
                self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)  # replaced, not written in place
                return x + self.mean

        self.check(Counting(), lambda: torch.randn(5, 4))

    def test_operators_that_reshape_their_tensor_in_place(self) -> None:
        class Reshaping(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(4, 6)

            def forward(self, x: Tensor) -> Tensor:
                y = self.layer(x).clone()
                before = y[0]
                y.t_()
                y.unsqueeze_(0)
                return y.sum(0).t() + before

        self.assert_inference_same(Reshaping(), lambda: torch.randn(5, 4))

    def test_mixed_dtypes(self) -> None:
        class Mixed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.low = nn.Linear(4, 4).to(torch.bfloat16)
                self.high = nn.Linear(4, 4).double()

            def forward(self, x: Tensor) -> Tensor:
                return self.high(self.low(x.bfloat16()).double()).float()

        self.check(Mixed(), lambda: torch.randn(3, 4))

    def test_recurrent_layers(self) -> None:
        class Recurrent(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.lstm = nn.LSTM(4, 8, 2, batch_first=True, dropout=0.1)
                self.head = nn.Linear(8, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(self.lstm(x)[0])

        self.check(Recurrent(), lambda: torch.randn(2, 5, 4))

    def test_frozen_parameters(self) -> None:
        model = mlp()
        model[0].weight.requires_grad_(False)
        before = model[0].weight.clone()
        self.check(model, lambda: torch.randn(4, 6))
        self.assertTrue(torch.equal(before, model[0].weight))

    def test_tensors_that_are_no_buffers_are_constants(self) -> None:
        class Constant(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(4, 4)
                self.scale = torch.arange(4.0)

            def forward(self, x: Tensor) -> Tensor:
                return self.layer(x) * self.scale + torch.tensor([1.0, 2.0, 3.0, 4.0])

        self.check(Constant(), lambda: torch.randn(3, 4))

    def test_a_result_that_is_an_input_or_a_view_of_it(self) -> None:
        class Passing(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(4, 4)

            def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                y = self.layer(x)
                return x, x[1:], y[:, 0]

        self.assert_inference_same(Passing(), lambda: torch.randn(3, 4))

    def test_a_registered_dataclass_as_result(self) -> None:
        @dataclass
        class Result:
            value: Tensor
            name: str

        _pytree.register_dataclass(Result)

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Result:
                return Result(self.layer(x), "linear")

        self.assert_inference_same(Model(), lambda: torch.randn(3, 4))

    def test_channels_last(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).to(memory_format=torch.channels_last)
        self.check(model, lambda: torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last))

    def test_a_loss_module_with_parameters_of_its_own(self) -> None:
        class Loss(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.ones(4))

            def forward(self, output: Tensor, target: Tensor) -> Tensor:
                return F.cross_entropy(output * self.weight, target)

        model, loss_fn = mlp(), Loss()
        optimizer = sgd([*model.parameters(), *loss_fn.parameters()])
        x, y = batch()
        step = olla.optimize(model, x, loss_fn=loss_fn, targets=y, optimizer=optimizer)
        step(x, targets=y)
        self.assertFalse(torch.equal(loss_fn.weight, torch.ones(4)))


class GradientsTest(EagerTestCase):
    def test_without_an_optimizer_gradients_add_up_in_grad(self) -> None:
        torch.manual_seed(0)
        eager = Side(mlp().train(), None)
        planned = eager.copy()
        x, y = batch()
        step = olla.optimize(planned.model, x, loss_fn=F.cross_entropy, targets=y)
        for seed in range(3):
            torch.manual_seed(seed)
            F.cross_entropy(eager.model(x), y).backward()
            torch.manual_seed(seed)
            step(x, targets=y)
            for (name, a), b in zip(planned.model.named_parameters(), eager.model.parameters(), strict=True):
                self.assert_same(a.grad, b.grad, name)

    def test_gradients_that_the_optimizer_used_up_are_gone(self) -> None:
        model, (x, y) = mlp(), batch()
        step = olla.optimize(model, x, loss_fn=F.cross_entropy, targets=y, optimizer=sgd(model.parameters()))
        F.cross_entropy(model(x), y).backward()  # left over from before
        step(x, targets=y)
        self.assertTrue(all(p.grad is None for p in model.parameters()))


class SignaturesTest(EagerTestCase):
    """What makes the step plan again, once."""

    def setUp(self) -> None:
        torch.manual_seed(0)
        self.eager = side(mlp(), sgd)
        self.planned = self.eager.copy()
        x, y = batch()
        self.step = olla.optimize(
            self.planned.model, x, loss_fn=F.cross_entropy, targets=y, optimizer=self.planned.optimizer
        )

    def plans(self) -> int:
        return len(self.step._planned)

    def run_both(self, x: Tensor, y: Tensor) -> None:
        torch.manual_seed(1)
        self.eager.optimizer.zero_grad()
        F.cross_entropy(self.eager.model(x), y).backward()
        self.eager.optimizer.step()
        torch.manual_seed(1)
        self.step(x, targets=y)
        self.assert_sides_same(self.planned, self.eager)

    def test_another_shape_is_planned_once(self) -> None:
        with self.assertLogs("olla", "WARNING") as logs:
            for size in (8, 5, 8, 5, 5):
                self.run_both(*batch(size))
        self.assertEqual(self.plans(), 2)
        self.assertEqual(len(logs.output), 1)
        self.assertIn("another shape", logs.output[0])

    def test_another_dtype_is_planned(self) -> None:
        model = nn.Embedding(10, 3).eval()
        step = olla.optimize(model, torch.tensor([1, 2]))
        with self.assertLogs("olla", "WARNING"):
            result = step(torch.tensor([1, 2], dtype=torch.int32))
        self.assert_same(result, model(torch.tensor([1, 2])).detach(), "rows")

    def test_eval_mode_is_planned(self) -> None:
        for one in (self.planned, self.eager):
            one.model.eval()
        with self.assertLogs("olla", "WARNING") as logs:
            self.run_both(*batch())
        self.assertIn("setting of a module", logs.output[0])

    def test_another_dropout_rate_is_planned(self) -> None:
        for one in (self.planned, self.eager):
            one.model[2].p = 0.7
        with self.assertLogs("olla", "WARNING"):
            self.run_both(*batch())

    def test_another_stride_is_planned(self) -> None:
        model = nn.Conv2d(1, 1, 1).eval()
        step = olla.optimize(model, torch.randn(1, 1, 4, 4))
        model.stride = (2, 2)
        with self.assertLogs("olla", "WARNING"):
            self.assertEqual(step(torch.randn(1, 1, 4, 4)).shape, (1, 1, 2, 2))

    def test_freezing_a_parameter_is_planned(self) -> None:
        for one in (self.planned, self.eager):
            one.model[0].weight.requires_grad_(False)
        with self.assertLogs("olla", "WARNING") as logs:
            self.run_both(*batch())
        self.assertIn("requires_grad", logs.output[0])

    def test_autocast_around_the_step_is_planned(self) -> None:
        x, y = batch()
        with self.assertLogs("olla", "WARNING") as logs, torch.autocast("cpu", dtype=torch.bfloat16):
            self.run_both(x, y)
        self.assertIn("autocast", logs.output[0])

    def test_a_learning_rate_is_not_planned_again(self) -> None:
        for lr in (0.5, 0.25):
            for one in (self.planned, self.eager):
                one.optimizer.param_groups[0]["lr"] = lr
            self.run_both(*batch())
        self.assertEqual(self.plans(), 1)


class ExecutionErrorsTest(EagerTestCase):
    def make(self) -> tuple[nn.Module, olla.Step, Tensor, Tensor]:
        model, (x, y) = mlp(), batch()
        return (
            model,
            olla.optimize(model, x, loss_fn=F.cross_entropy, targets=y, optimizer=sgd(model.parameters())),
            x,
            y,
        )

    def test_an_exchanged_parameter(self) -> None:
        model, step, x, y = self.make()
        model[3].bias = nn.Parameter(torch.zeros(4))
        with self.assertRaisesRegex(olla.ExecutionError, "edited after planning .*'3.bias'"):
            step(x, targets=y)

    def test_an_exchanged_layer(self) -> None:
        model, step, x, y = self.make()
        model[1] = nn.Tanh()
        with self.assertRaisesRegex(olla.ExecutionError, "edited after planning"):
            step(x, targets=y)

    def test_an_added_parameter_group(self) -> None:
        model, (x, y) = mlp(), batch()
        optimizer = sgd(model[0].parameters())
        step = olla.optimize(model, x, loss_fn=F.cross_entropy, targets=y, optimizer=optimizer)
        optimizer.add_param_group({"params": model[3].parameters()})
        with self.assertRaisesRegex(olla.ExecutionError, "parameter group"):
            step(x, targets=y)

    def test_an_input_on_another_device(self) -> None:
        _, step, x, y = self.make()
        with self.assertRaisesRegex(olla.ExecutionError, "input 0 is on meta, the step was planned for cpu"):
            step(x.to("meta"), targets=y)

    def test_two_threads(self) -> None:
        model = nn.Linear(4, 4)
        entered, leave = threading.Event(), threading.Event()
        optimizer = sgd(model.parameters())

        def wait(*_: Any) -> None:
            entered.set()
            leave.wait(10)

        optimizer.register_step_pre_hook(wait)
        step = olla.optimize(model, torch.randn(2, 4), optimizer=optimizer)
        other = threading.Thread(target=step, args=(torch.randn(2, 4),))
        other.start()
        try:
            self.assertTrue(entered.wait(10))
            with self.assertRaisesRegex(olla.ExecutionError, "running already"):
                step(torch.randn(2, 4))
        finally:
            leave.set()
            other.join()
        step(torch.randn(2, 4))  # and then it is free again

    def test_a_worker_thread_may_run_the_step(self) -> None:
        _, step, x, y = self.make()
        results: list[Tensor] = []
        worker = threading.Thread(target=lambda: results.append(step(x, targets=y)))
        worker.start()
        worker.join()
        self.assertEqual(len(results), 1)

    def test_an_error_in_the_step_leaves_it_usable(self) -> None:
        model = nn.Embedding(4, 3).eval()
        step = olla.optimize(model, torch.tensor([0, 1]))
        with self.assertRaises(IndexError):
            step(torch.tensor([0, 7]))
        self.assert_same(step(torch.tensor([2, 3])), model(torch.tensor([2, 3])).detach(), "rows")


class CodeTest(EagerTestCase):
    def test_every_name_is_dropped_at_its_last_use(self) -> None:
        model, (x, y) = mlp(), batch()
        step = olla.optimize(model, x, loss_fn=F.cross_entropy, targets=y, optimizer=sgd(model.parameters()))
        made = {line.split("=")[0].strip() for line in step.code.splitlines() if " = torch.ops" in line}
        dropped = {part.strip() for line in step.code.splitlines() for part in line.split("=") if "None" in line}
        returned = step.code.split("return")[1]
        for name in made:
            self.assertTrue(name in returned or any(name in part for part in dropped), name)
        self.assertIn("self.update_0_weight(", step.code)

    def test_views_are_methods_of_tensors(self) -> None:
        class Views(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                x = x.view(4, 2, 8).transpose(0, 1).unsqueeze(0).permute(0, 2, 1, 3).squeeze(0)
                return x.select(0, 1).expand(3, 2, 8).sin()

        x = torch.randn(8, 8)
        with olla.optimize(Views().eval(), x) as step:
            self.assert_same(step(x), Views()(x), "views")
        for name in ("view", "transpose", "unsqueeze", "permute", "squeeze", "select", "expand"):
            self.assertIn(f".{name}(", step.code)
            self.assertNotIn(f"aten.{name}.", step.code)

    def test_planning_prints_no_warnings(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model, (x, y) = mlp(), batch()
            olla.optimize(model, x, loss_fn=F.cross_entropy, targets=y, optimizer=sgd(model.parameters()))


class CountersTest(EagerTestCase):
    def test_a_counter_of_the_model_does_not_make_the_step_plan_again(self) -> None:
        class Counting(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(3, 3)
                self.calls = 0

            def forward(self, x: Tensor) -> Tensor:
                self.calls += 1
                return self.layer(x)

        model, x = Counting().eval(), torch.randn(2, 3)
        with self.assertLogs("olla", "WARNING") as logs:
            step = olla.optimize(model, x)
        self.assertIn("will not change model.calls", logs.output[0])
        model(x)  # as in a validation loop
        with self.assertNoLogs("olla", "WARNING"):
            step(x)
        self.assertEqual(model.calls, 1)
