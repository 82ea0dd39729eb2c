"""Models compiled with ``torch.compile(model, backend="olla")`` at planned addresses, whatever the loop does."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torchvision
import transformers
from compile_test import CLASSES, CompiledTestCase, slow, small_network
from eager import sgd
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from olla.backend import backend
from olla.backend.backend import olla
from olla.backend.compiled import CompiledGraph
from olla.compiling import NativeUnavailableError
from olla.torch_private import cpu_allocations

transformers.logging.set_verbosity_error()
STEPS = 12  # more than it takes to give up

Loop = Callable[[nn.Module, Optimizer, int], Any]
TROUBLE = {"backward": False, "extra": 0}


@torch.library.custom_op("olla_tests::troubled_backward", mutates_args=())
def troubled_backward(x: Tensor) -> Tensor:
    if TROUBLE["backward"]:
        raise RuntimeError("backward fails")
    if TROUBLE["extra"]:
        TROUBLE["extra"] += 64
        torch.empty(TROUBLE["extra"], dtype=torch.uint8)
    return x + x


@troubled_backward.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Troubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return troubled_backward(gradient)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))


class TroubledModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = perceptron()

    def forward(self, x: Tensor) -> Tensor:
        return Troubled.apply(self.net(x))


def train(net: nn.Module, optimizer: Optimizer, loss: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


class CompiledGraphTest(CompiledTestCase):
    """Every loop is run by a compiled model and by an eager twin, and must give equal bits."""

    def setUp(self) -> None:
        super().setUp()
        self.x = torch.randn(8, 16)
        self.graphs: list[CompiledGraph] = []

        def made(*arguments: Any) -> CompiledGraph:
            self.graphs.append(CompiledGraph(*arguments))
            return self.graphs[-1]

        patch = mock.patch.object(backend, "CompiledGraph", made)
        patch.start()
        self.addCleanup(patch.stop)
        self.addCleanup(TROUBLE.update, backward=False, extra=0)

    def compare(
        self, model: nn.Module, loop: Loop, *, steps: int = STEPS, updates_inside: bool = False, **options: Any
    ) -> None:
        sides = []
        for _ in range(2):
            side = copy.deepcopy(model).train()
            sides.append((side, sgd(side.parameters())))
        (eager, _), (planned, its_optimizer) = sides
        if updates_inside:
            options["optimizer"] = its_optimizer
        nets = (eager, torch.compile(planned, backend=olla, options=options))
        for number in range(steps):
            seen = []
            for net, (side, optimizer) in zip(nets, sides, strict=True):
                torch.manual_seed(number)
                result = loop(net, optimizer, number)
                gradients = {name: p.grad for name, p in side.named_parameters()}
                seen.append((result, gradients, side.state_dict(), torch.get_rng_state()))
            self.assert_same(seen[1], seen[0], f"step {number}")

    def assert_hit(self, graphs: int = 1) -> None:
        """All graphs run in their arenas, and missed nothing in their last steps."""
        self.assertEqual(len(self.graphs), graphs)
        for graph in self.graphs:
            self.assertEqual(graph.not_executed, "")
            self.assertEqual((graph.replay.counts.missed, graph._missed), (0, 0))
            self.assertGreater(graph.replay.counts.hits, 0)

    def check_training(self, model: nn.Module, call: Callable[[nn.Module], Tensor], *, graphs: int = 1) -> None:
        """It hits, keeps nothing, and takes no more than the same order without addresses; nor do the arenas."""

        def loop(net: nn.Module, optimizer: Optimizer, _: int) -> Tensor:
            return train(net, optimizer, call(net))

        options = {"time_limit": 2.0}
        self.compare(model, loop, steps=6, **options)
        self.assert_hit(graphs)
        for graph in self.graphs:
            self.assertLess(graph.arena.arena_bytes, 1.01 * graph._plan.peak_bytes + 64 * len(graph._plan.order))
            self.assertLess(sum(graph._outside), graph.arena.arena_bytes)
        _, step = self.step_of(model, call, backend=olla, options=options)  # torch.compile takes the same graphs again
        for _ in range(4):
            step()
        self.assertEqual([sum(cpu_allocations(lambda: step() and None)) for _ in range(3)], [0, 0, 0])
        placed = self.peak_of(step)
        self.assert_hit(graphs)
        for graph in self.graphs:
            graph.not_executed = "to compare with"
        self.assertLessEqual(placed, self.peak_of(step))

    @slow
    def test_resnet18(self) -> None:
        images, classes = torch.randn(2, 3, 64, 64), torch.randint(0, CLASSES, (2,))
        model = torchvision.models.resnet18(num_classes=CLASSES)
        self.check_training(model, lambda net: F.cross_entropy(net(images), classes))

    @slow
    def test_vision_transformer(self) -> None:
        model = torchvision.models.VisionTransformer(32, 8, 3, 2, 64, 128, dropout=0.1, num_classes=CLASSES)
        images, classes = torch.randn(2, 3, 32, 32), torch.randint(0, CLASSES, (2,))
        self.check_training(model, lambda net: F.cross_entropy(net(images), classes))

    def test_gpt2_and_its_loss_which_is_a_graph_of_its_own(self) -> None:
        config = transformers.GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=2, use_cache=False)
        ids = torch.randint(5, 100, (2, 16))
        self.check_training(
            transformers.GPT2LMHeadModel(config), lambda net: net(input_ids=ids, labels=ids).loss, graphs=2
        )

    def test_updates_inside_backward_run_in_the_arena(self) -> None:
        def loop(net: nn.Module, optimizer: Optimizer, _: int) -> Tensor:
            return train(net, optimizer, net(self.x).square().mean())

        self.compare(perceptron(), loop, updates_inside=True)
        self.assert_hit()

    def test_what_forward_saves_is_in_the_arena_and_results_are_not(self) -> None:
        compiled = torch.compile(perceptron(), backend=olla)
        for _ in range(3):
            compiled(self.x).sum().backward()
            compiled.zero_grad()
        graph, y = self.graphs[0], compiled(self.x)
        start, end = graph.arena.base, graph.arena.base + graph.arena.arena_bytes
        self.assertEqual((graph.replay.counts.outside, graph._outside), (1, [y.nbytes]))
        self.assertFalse(start <= y.data_ptr() < end)
        saved = [t for t in y.grad_fn.saved_tensors if start <= t.data_ptr() < end]
        self.assertGreater(len(saved), 1)
        self.assertEqual(len({t.untyped_storage().data_ptr() for t in saved}), graph.replay.counts.escapes)

    def test_two_forwards_before_their_backwards(self) -> None:
        def loop(net: nn.Module, optimizer: Optimizer, _: int) -> Tensor:
            return train(net, optimizer, (net(self.x) * net(self.x.sin())).mean())

        with self.assertLogs("olla", "WARNING") as logs:
            self.compare(perceptron(), loop, steps=24)
        self.assertIn("not at planned addresses", logs.output[-1])
        self.assertEqual(self.graphs[0].arena.arena_bytes, 0)

    def test_the_backward_of_the_first_of_two_forwards_comes_first(self) -> None:
        def loop(net: nn.Module, optimizer: Optimizer, _: int) -> Tensor:
            one, other = net(self.x).square().mean(), net(self.x.sin()).square().mean()
            one.backward()
            return train(net, optimizer, other)

        with self.assertLogs("olla", "WARNING") as logs:
            self.compare(perceptron(), loop, steps=24)
        self.assertIn("not at planned addresses", logs.output[-1])

    def test_now_and_then_a_forward_comes_without_its_backward(self) -> None:
        kept: list[Tensor] = []

        def loop(net: nn.Module, optimizer: Optimizer, number: int) -> Any:
            if number % 3 == 1:
                kept.append(net(self.x))  # with what it has saved
                net(self.x.cos())
            return train(net, optimizer, net(self.x).square().mean())

        with self.assertLogs("olla", "WARNING") as logs:
            self.compare(perceptron(), loop)
        self.assertIn("recording it again", logs.output[-1])  # what was kept was in the way
        eager, planned = kept[0::2], kept[1::2]
        self.assertEqual(len(planned), 4)
        self.assert_same([y.detach() for y in planned], [y.detach() for y in eager], "results that were kept")

    def test_forwards_alone_do_not_miss(self) -> None:
        def loop(net: nn.Module, optimizer: Optimizer, _: int) -> Any:
            before = net(self.x).detach()
            return before, train(net, optimizer, net(self.x).square().mean())

        self.compare(perceptron(), loop)
        self.assert_hit()

    def test_a_graph_that_is_now_and_then_kept_for_another_backward(self) -> None:
        def loop(net: nn.Module, optimizer: Optimizer, number: int) -> Tensor:
            loss = net(self.x).square().mean()
            if number in (1, 5):
                loss.backward(retain_graph=True)
            return train(net, optimizer, loss)

        with torch._functorch.config.patch(donated_buffer=False):
            self.compare(perceptron(), loop)
        self.assert_hit()

    def test_a_graph_that_is_always_kept_for_another_backward(self) -> None:
        def loop(net: nn.Module, optimizer: Optimizer, _: int) -> Tensor:
            loss = net(self.x).square().mean()
            loss.backward(retain_graph=True)
            return train(net, optimizer, loss)

        with self.assertLogs("olla", "WARNING") as logs:
            self.compare(perceptron(), loop)
        self.assertIn("not at planned addresses", logs.output[-1])

    def test_an_exception_in_the_loss(self) -> None:
        def loop(net: nn.Module, optimizer: Optimizer, number: int) -> Tensor | None:
            y = net(self.x)
            try:
                if number % 4 == 1:
                    raise ValueError("the loss fails")
            except ValueError:
                return None
            return train(net, optimizer, y.square().mean())

        self.compare(perceptron(), loop, steps=16)
        self.assert_hit()

    def test_an_exception_in_backward(self) -> None:
        def loop(net: nn.Module, optimizer: Optimizer, number: int) -> Tensor | None:
            TROUBLE["backward"] = number in (0, 2, 5)
            try:
                return train(net, optimizer, net(self.x).square().mean())
            except RuntimeError:
                return None

        self.compare(TroubledModel(), loop)
        self.assert_hit()

    def test_operators_that_never_allocate_the_same_are_given_up(self) -> None:
        def loop(net: nn.Module, optimizer: Optimizer, _: int) -> Tensor:
            TROUBLE["extra"] += 64
            return train(net, optimizer, net(self.x).square().mean())

        with self.assertLogs("olla", "WARNING") as logs:
            self.compare(TroubledModel(), loop, steps=24)
        self.assertIn("its allocations are not the same in every step", logs.output[-1])
        self.assertIsNone(self.graphs[0].replay)
        self.assertEqual(self.graphs[0].arena.arena_bytes, 0)

    def test_a_model_that_is_evaluated_in_between(self) -> None:
        def loop(net: nn.Module, optimizer: Optimizer, number: int) -> Any:
            y = net(self.x)
            with torch.no_grad():
                between = net(self.x)  # while the graph in training is between its parts
            return between, train(net, optimizer, y.square().mean())

        self.compare(perceptron(), loop)
        self.assert_hit(graphs=2)

    def test_results_of_an_inference_are_outside(self) -> None:
        model = small_network().eval()
        compiled, images = torch.compile(model, backend=olla), torch.randn(4, 3, 16, 16)
        with torch.no_grad():
            expected = model(images)
            kept = [compiled(images) for _ in range(6)]
        for result in kept:
            self.assert_same(result, expected, "result")
        self.assert_hit()
        self.assertEqual(self.graphs[0].replay.counts.escapes, 0)

    def test_gradients_that_accumulate_end_up_outside(self) -> None:
        def loop(net: nn.Module, optimizer: Optimizer, number: int) -> Tensor:
            loss = net(self.x).square().mean()
            loss.backward()
            if number % 2:
                optimizer.step()
                optimizer.zero_grad()
            return loss.detach()

        with self.assertLogs("olla", "WARNING") as logs:
            self.compare(perceptron(), loop, steps=20)
        self.assertIn("recording it again", logs.output[-1])
        self.assert_hit()
        parameters = sum(p.nbytes for p in perceptron().parameters())
        self.assertGreaterEqual(sum(self.graphs[0]._outside), parameters)

    def test_gradients_that_the_user_keeps_stay_as_they_are(self) -> None:
        kept: list[tuple[Tensor, Tensor]] = []

        def loop(net: nn.Module, optimizer: Optimizer, number: int) -> Tensor:
            loss = net(self.x).square().mean()
            loss.backward()
            if number > 3:
                kept.extend((p.grad, p.grad.clone()) for p in net.parameters())
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        with self.assertLogs("olla", "WARNING") as logs:
            self.compare(perceptron(), loop, steps=16)
        self.assertIn("recording it again", logs.output[-1])
        for gradient, copied in kept:
            self.assert_same(gradient, copied, "gradient")
        self.assert_hit()

    def test_each_shape_has_its_arena(self) -> None:
        def loop(net: nn.Module, optimizer: Optimizer, number: int) -> Tensor:
            return train(net, optimizer, net(self.x[: 3 + number % 3]).square().mean())

        self.compare(perceptron(), loop)
        self.assert_hit(graphs=3)
        self.assertEqual(len({graph.arena.base for graph in self.graphs}), 3)

    def test_within_a_budget(self) -> None:
        self.x = torch.randn(256, 16)

        def loop(net: nn.Module, optimizer: Optimizer, _: int) -> Tensor:
            return train(net, optimizer, net(self.x).square().mean())

        self.compare(perceptron(), loop, memory_budget=0.6)
        self.assert_hit()
        self.assertNotEqual(self.graphs[0]._plan.recomputed, ())

    def test_what_is_saved_somewhere_else_is_given_up(self) -> None:
        def loop(net: nn.Module, optimizer: Optimizer, _: int) -> Tensor:
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
                loss = net(self.x).square().mean()
            return train(net, optimizer, loss)

        with self.assertLogs("olla", "WARNING") as logs:
            self.compare(perceptron(), loop)
        self.assertIn("backward is not given what", logs.output[-1])

    def test_threads_that_use_one_model(self) -> None:
        model = perceptron()
        compiled = torch.compile(model, backend=olla)
        xs = [torch.randn(8, 16) for _ in range(4)]

        def gradients(net: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(net(x).square().mean(), [*net.parameters()])

        for _ in range(3):
            gradients(compiled, xs[0])
        expected = [gradients(model, x) for x in xs]
        wrong: list[int] = []

        def work(number: int) -> None:
            for _ in range(20):
                found = gradients(compiled, xs[number])
                if not all(map(torch.equal, found, expected[number])):
                    wrong.append(number)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(wrong, [])

    def test_a_part_that_runs_while_another_one_does_is_outside(self) -> None:
        model = perceptron()
        compiled = torch.compile(model, backend=olla)
        with torch.no_grad():
            expected = model(self.x)
            for _ in range(4):
                compiled(self.x)
            graph = self.graphs[0]
            before = graph.replay.counts
            with graph._one_at_a_time:
                self.assert_same(compiled(self.x), expected, "result")
            self.assertIs(graph.replay.counts, before)

    def test_the_arena_goes_with_the_compiled_graph_and_what_is_alive_there_stays(self) -> None:
        model = perceptron()
        compiled = torch.compile(model, backend=olla)
        for _ in range(4):
            y = compiled(self.x)
            model.zero_grad()
            y.sum().backward()
        gradients = [p.grad for p in model.parameters()]
        copies = [g.clone() for g in gradients]
        arena = weakref.ref(self.graphs[0].arena)
        self.assertGreater(arena().arena_bytes, 0)
        self.graphs.clear()
        del compiled, y
        torch._dynamo.reset()
        gc.collect()
        self.assertIsNone(arena())
        filler = [torch.zeros_like(g) for g in gradients]
        self.assert_same(gradients, copies, "gradients")
        self.assertEqual(len(filler), len(gradients))

    def test_a_graph_that_is_forgotten_while_it_is_recorded(self) -> None:
        model = perceptron()
        compiled = torch.compile(model, backend=olla)
        compiled(self.x).sum().backward()
        y = compiled(self.x)
        graph = weakref.ref(self.graphs.pop())
        self.assertIsNotNone(graph()._attempt.recorder._handle)
        expected = y.detach().clone()
        torch._dynamo.reset()
        del compiled
        gc.collect()
        y.sum().backward()  # the graph lives as long as its backward may come
        self.assert_same(y.detach(), expected, "result")
        del y
        gc.collect()
        self.assertIsNone(graph())

    def test_without_a_compiler_it_runs_in_its_order_and_says_so(self) -> None:
        def loop(net: nn.Module, optimizer: Optimizer, _: int) -> Tensor:
            return train(net, optimizer, net(self.x).square().mean())

        failing = mock.patch("olla.run.native.load", side_effect=NativeUnavailableError("no C++ compiler was found"))
        with failing, self.assertLogs("olla", "WARNING") as logs:
            self.compare(perceptron(), loop, steps=4)
        self.assertEqual(len(logs.output), 1)
        self.assertIn("not at planned addresses: no C++ compiler was found", logs.output[0])

    def test_without_placing(self) -> None:
        def loop(net: nn.Module, optimizer: Optimizer, _: int) -> Tensor:
            return train(net, optimizer, net(self.x).square().mean())

        self.compare(perceptron(), loop, steps=4, place=False)
        self.assertEqual(
            [(g.not_executed, g.replay, g.arena.arena_bytes) for g in self.graphs], [("place=False", None, 0)]
        )
