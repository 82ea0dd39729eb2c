"""``torch.compile(model, backend="olla")`` on a GPU: the bits of ``backend="aot_eager"``, in arenas, in less memory."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torchvision
import transformers
from deterministic import GpuTestCase
from eager import sgd
from torch import Tensor, nn
from torch.nn import functional as F

from bench.models import classification_loss
from olla.backend import backend
from olla.backend.backend import olla
from olla.backend.compiled import CompiledGraph

transformers.logging.set_verbosity_error()
CLASSES, BATCH, TOKENS = 10, 16, 101
STEPS = 6  # a warm-up, a recording, and some at planned addresses

Call = Callable[[nn.Module], Tensor]


class GpuCompileTest(GpuTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.addCleanup(torch._dynamo.reset)

    def train(self, model: nn.Module, call: Call, *, updates_inside: bool = False, **compiling: Any) -> Any:
        """Losses and final state of some steps, and the most bytes at once in forward and backward of the last one."""
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        model = copy.deepcopy(model).train()
        optimizer = sgd(model.parameters())
        if updates_inside:
            compiling["options"] = {**compiling["options"], "optimizer": optimizer}
        net = torch.compile(model, **compiling) if compiling else model
        losses = []
        for number in range(STEPS):
            torch.manual_seed(number)
            optimizer.zero_grad()
            torch.cuda.reset_peak_memory_stats()
            loss = call(net)
            loss.backward()
            peak = torch.cuda.max_memory_allocated() - before
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach().cpu())
            del loss
        return losses, {name: value.cpu() for name, value in model.state_dict().items()}, peak

    @contextmanager
    def graphs(self) -> Iterator[list[CompiledGraph]]:
        found: list[CompiledGraph] = []

        def made(*arguments: Any) -> CompiledGraph:
            found.append(CompiledGraph(*arguments))
            return found[-1]

        with mock.patch.object(backend, "CompiledGraph", made):
            yield found

    def check(self, model: nn.Module, call: Call) -> None:
        """Equal to "aot_eager": its batch norms are others than eager PyTorch's, on a GPU."""
        *expected, allowed = self.train(model, call, backend="aot_eager")
        for updates_inside in (False, True):
            for budget in ({}, {"memory_budget": 0.8}):
                with self.subTest(updates_inside=updates_inside, **budget), self.graphs() as graphs:
                    options = {"time_limit": 10.0, **budget}
                    *found, peak = self.train(model, call, updates_inside=updates_inside, backend=olla, options=options)
                    self.assert_same(found, expected, "losses and state")
                    for graph in graphs:
                        self.assertEqual(graph.not_executed, "")
                        self.assertEqual((graph.replay.counts.missed, graph._missed), (0, 0))
                    self.assertGreater(max(graph.replay.counts.hits for graph in graphs), 0)
                    self.assertLessEqual(peak, allowed)
                graphs.clear()

    def test_resnet18(self) -> None:
        images, labels = torch.randn(BATCH, 3, 64, 64), torch.randint(0, CLASSES, (BATCH,))
        self.check(
            torchvision.models.resnet18(num_classes=CLASSES), lambda net: classification_loss(net(images), labels)
        )

    def test_vit(self) -> None:
        model = torchvision.models.VisionTransformer(32, 8, 3, 4, 64, 128, num_classes=CLASSES)
        images, labels = torch.randn(BATCH, 3, 32, 32), torch.randint(0, CLASSES, (BATCH,))
        self.check(model, lambda net: F.cross_entropy(net(images), labels))

    def test_gpt2_with_dropouts(self) -> None:
        config = transformers.GPT2Config(vocab_size=TOKENS, n_embd=128, n_layer=3, n_head=4, use_cache=False)
        ids = torch.randint(0, TOKENS, (BATCH, 64))
        self.check(transformers.GPT2LMHeadModel(config), lambda net: net(input_ids=ids, labels=ids).loss)

    def test_inference(self) -> None:
        model, images = torchvision.models.resnet18(num_classes=CLASSES).eval(), torch.randn(BATCH, 3, 64, 64)
        with torch.no_grad(), self.graphs() as graphs:
            net = torch.compile(model, backend=olla)
            for _ in range(STEPS):
                self.assert_same(net(images), model(images), "output")
        [graph] = graphs
        self.assertEqual(graph.not_executed, "")
        self.assertGreater(graph.replay.counts.hits, 0)
