"""Real models on a GPU: equal to eager PyTorch bit by bit, at planned addresses, within what was planned."""

from __future__ import annotations

from typing import Any

import torch
import torchvision
import transformers
from deterministic import GpuTestCase
from torch import Tensor

import olla
from bench.models import classification_loss

transformers.logging.set_verbosity_error()
CLASSES, BATCH, TOKENS = 10, 4, 101


class GpuModelsTest(GpuTestCase):
    def check_images(self, name: str, side: int = 64, **options: Any) -> None:
        model = getattr(torchvision.models, name)(weights=None, num_classes=CLASSES, **options)

        def images() -> Tensor:
            return torch.randn(BATCH, 3, side, side)

        def labels() -> Tensor:
            return torch.randint(0, CLASSES, (BATCH,))

        with self.subTest("train"):
            step = self.assert_training_same(model, images, loss_fn=classification_loss, targets=labels, steps=8)
            self.assert_measured(step, images(), targets=labels())
        with self.subTest("eval"):
            step = self.assert_inference_same(model, images, steps=6)
            self.assert_measured(step, images())

    def check_text(self, model: str, config: str, **sizes: int) -> None:
        settings = getattr(transformers, config)(vocab_size=TOKENS, use_cache=False, **sizes)
        net = getattr(transformers, model)(settings)

        def text() -> dict[str, Tensor]:
            ids = torch.randint(5, TOKENS, (BATCH, 64))
            return {"input_ids": ids, "labels": ids.clone()}

        step = self.assert_training_same(net, text, steps=8)
        self.assert_measured(step, **text())

    def assert_measured(self, step: olla.Step, *args: Any, **kwargs: Any) -> None:
        measured = step.measure(*args, **kwargs)
        self.assertIsNotNone(measured.arena, step._current.not_executed)
        self.assertEqual((measured.arena.missed, measured.arena.escapes), (0, 0))
        self.assertTrue(measured.exact, (measured.peak_bytes, measured.planned_bytes))
        self.assertLessEqual(measured.peak_bytes, measured.baseline_peak_bytes)

    def test_resnet18(self) -> None:
        self.check_images("resnet18")

    def test_resnet50(self) -> None:
        self.check_images("resnet50")

    def test_googlenet(self) -> None:
        self.check_images("googlenet", 96, init_weights=False)

    def test_mobilenet_v2(self) -> None:
        self.check_images("mobilenet_v2")

    def test_swin_t(self) -> None:
        self.check_images("swin_t")

    def test_vit_b_16(self) -> None:
        self.check_images("vit_b_16", 224)

    def test_bert(self) -> None:
        self.check_text("BertForMaskedLM", "BertConfig", hidden_size=128, num_hidden_layers=3, num_attention_heads=4)

    def test_gpt2(self) -> None:
        self.check_text("GPT2LMHeadModel", "GPT2Config", n_embd=128, n_layer=3, n_head=4)
