"""Real models within budgets from the planned peak down to the smallest: each is kept, and the numbers are eager's.

All models take minutes, so that they are run with ``RUN_SKIPPED=1``; one of them, with fewer budgets, always.
"""

from __future__ import annotations

import logging
import os
import unittest
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torchvision
import transformers
from eager import PLANNING_SECONDS, EagerTestCase, sgd
from torch import Tensor, nn
from torch.nn import functional as F

import olla

transformers.logging.set_verbosity_error()
CLASSES, TOKENS = 10, 101
STEPS = 8  # enough to settle
slow = unittest.skipUnless(os.environ.get("RUN_SKIPPED"), "takes minutes: set RUN_SKIPPED=1")


def images() -> Tensor:
    return torch.randn(16, 3, 64, 64)


def labels() -> Tensor:
    return torch.randint(0, CLASSES, (16,))


def text() -> dict[str, Tensor]:
    ids = torch.randint(5, TOKENS, (4, 32))
    return {"input_ids": ids, "labels": ids.clone()}


class BudgetsTest(EagerTestCase):
    """Models for images and for text, with dropout where they have some."""

    def setUp(self) -> None:
        logging.disable(logging.WARNING)  # the smallest budget of the estimates may be too small
        self.addCleanup(logging.disable, logging.NOTSET)

    def check_images(self, build: Callable[[], nn.Module], budgets: int = 8) -> None:
        self.check(build, images, budgets, loss_fn=F.cross_entropy, targets=labels)

    def check(self, build: Callable[[], nn.Module], inputs: Callable[[], Any], budgets: int = 8, **loss: Any) -> None:
        """Budgets from the smallest to what the order alone needs, as steps that have settled say."""
        most, least = self.trained(build, inputs, None, **loss), self.smallest(build, inputs, **loss)
        self.assertLess(least, most)
        for step in range(budgets):
            budget = least + (most - least) * step // (budgets - 1)
            with self.subTest(budget=budget):
                self.assertLessEqual(self.trained(build, inputs, budget, **loss), budget)

    def trained(
        self, build: Callable[[], nn.Module], inputs: Callable[[], Any], budget: int | None, **loss: Any
    ) -> int:
        """All bytes that a step needs once it has settled, as measured; equal to eager PyTorch until then and after."""
        torch.manual_seed(0)
        step = self.assert_training_same(build(), inputs, steps=STEPS, memory_budget=budget, **loss)
        batch = inputs()
        args, kwargs = ((), batch) if isinstance(batch, dict) else ((batch,), {"targets": labels()})
        measured = step.measure(*args, **kwargs)
        self.assertTrue(measured.exact)
        return step.plan.persistent_bytes + measured.peak_bytes

    def smallest(self, build: Callable[[], nn.Module], inputs: Callable[[], Any], **loss: Any) -> int:
        """The smallest budget, for the bytes that operators are expected to allocate, and for those that they do."""
        model = build().train()
        arguments = {**loss, "optimizer": sgd(model.parameters())}
        if loss:
            arguments["targets"] = labels()
        trade = olla.frontier(model, inputs(), **arguments, points=8, time_limit=PLANNING_SECONDS).schedules
        self.assertGreater(len(trade), 4)
        for one, smaller in pairwise(trade):
            self.assertLess(smaller.peak_bytes, one.peak_bytes)
            self.assertGreaterEqual(smaller.extra_seconds, one.extra_seconds)
        persistent = olla.plan(model, inputs(), **arguments, place=False).persistent_bytes
        expected = persistent + trade[-1].peak_bytes
        return max(expected, self.trained(build, inputs, expected, **loss))

    def test_gpt2_within_three(self) -> None:
        self.check(lambda: gpt2(1), text, budgets=3)

    @slow
    def test_gpt2(self) -> None:
        self.check(gpt2, text)

    @slow
    def test_bert(self) -> None:
        config = transformers.BertConfig(
            vocab_size=TOKENS, hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=128
        )
        self.check(lambda: transformers.BertForMaskedLM(config), text)

    @slow
    def test_vision_transformer(self) -> None:
        self.check_images(
            lambda: torchvision.models.VisionTransformer(64, 8, 3, 4, 64, 128, dropout=0.1, num_classes=CLASSES)
        )

    @slow
    def test_swin_transformer_with_stochastic_depth(self) -> None:
        self.check_images(
            lambda: torchvision.models.SwinTransformer(
                [4, 4], 24, [2, 2], [2, 4], [4, 4], dropout=0.1, stochastic_depth_prob=0.2, num_classes=CLASSES
            )
        )

    @slow
    def test_resnet18(self) -> None:
        self.check_images(lambda: torchvision.models.resnet18(num_classes=CLASSES))

    @slow
    def test_mobilenet_v2(self) -> None:
        self.check_images(lambda: torchvision.models.mobilenet_v2(num_classes=CLASSES))


def gpt2(layers: int = 3) -> nn.Module:
    """With the dropout that it has by default."""
    config = transformers.GPT2Config(
        n_layer=layers, n_embd=64, n_head=2, vocab_size=TOKENS, n_positions=32, use_cache=False
    )
    return transformers.GPT2LMHeadModel(config)
