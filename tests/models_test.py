"""Five planned steps equal five eager steps, on real models in training and inference."""

from __future__ import annotations

import os
import unittest
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torchvision
import transformers
from eager import EagerTestCase
from torch import Tensor, nn
from torch.nn import functional as F

import olla
from bench.models import classification_loss, flow_loss, segmentation_loss

transformers.logging.set_verbosity_error()
CLASSES = 10
slow = unittest.skipUnless(os.environ.get("RUN_SKIPPED"), "takes some ten seconds: set RUN_SKIPPED=1")


@contextmanager
def without_attention_fast_path() -> Iterator[None]:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def narrow(model: nn.Module) -> nn.Module:
    """AlexNet or VGG with hidden layers of 64 instead of 4,096, which hold nearly all of its parameters."""
    assert isinstance(model.classifier, nn.Sequential)
    at = [index for index, layer in enumerate(model.classifier) if isinstance(layer, nn.Linear)]
    sizes = [model.classifier[at[0]].in_features, *(64 for _ in at[1:]), CLASSES]
    for index, (inputs, outputs) in zip(at, pairwise(sizes), strict=True):
        model.classifier[index] = nn.Linear(inputs, outputs)
    return model


class VisionModels(EagerTestCase):
    """torchvision's own models at sizes that keep the tests fast."""

    def setUp(self) -> None:
        torch.manual_seed(0)

    def check(self, name: str, shape: tuple[int, ...] = (3, 64, 64), batch: int = 2, **options: Any) -> None:
        builders = {**vars(torchvision.models), **vars(torchvision.models.video)}
        self.check_model(builders[name](weights=None, num_classes=CLASSES, **options), shape, batch)

    def check_model(self, model: nn.Module, shape: tuple[int, ...] = (3, 64, 64), batch: int = 2) -> None:
        def images() -> Tensor:
            return torch.randn(batch, *shape)

        with self.subTest("train"):
            self.assert_training_same(
                model,
                images,
                loss_fn=classification_loss,
                targets=lambda: torch.randint(0, CLASSES, (batch,)),
            )
        with self.subTest("eval"):
            self.assert_inference_same(model, images)

    def test_alexnet(self) -> None:
        self.check_model(narrow(torchvision.models.alexnet(num_classes=CLASSES)))

    def test_resnet18(self) -> None:
        self.check("resnet18")

    def test_resnet50(self) -> None:
        self.check("resnet50")

    def test_vgg11(self) -> None:
        self.check_model(narrow(torchvision.models.vgg11(num_classes=CLASSES, init_weights=False)), (3, 32, 32))

    def test_googlenet(self) -> None:
        self.check("googlenet", (3, 96, 96), init_weights=False)

    def test_mobilenet_v2(self) -> None:
        self.check("mobilenet_v2")

    def test_mnasnet0_5(self) -> None:
        self.check("mnasnet0_5")

    def test_efficientnet_b0_with_stochastic_depth(self) -> None:
        self.check("efficientnet_b0")

    def test_squeezenet1_0(self) -> None:
        self.check("squeezenet1_0")

    def test_r3d_18(self) -> None:
        self.check("r3d_18", (3, 4, 32, 32))

    def test_swin_t(self) -> None:
        self.check("swin_t")

    @slow
    def test_densenet121(self) -> None:
        self.check("densenet121")

    def test_vision_transformer(self) -> None:
        model = torchvision.models.VisionTransformer(32, 8, 3, 4, 64, 128, dropout=0.1, num_classes=CLASSES)

        def images() -> Tensor:
            return torch.randn(2, 3, 32, 32)

        self.assert_training_same(
            model, images, loss_fn=F.cross_entropy, targets=lambda: torch.randint(0, CLASSES, (2,))
        )
        with without_attention_fast_path():
            self.assert_inference_same(model, images)

    def test_attention_in_inference_is_close_to_the_fast_path_of_eager_pytorch(self) -> None:
        # In inference, nn.MultiheadAttention calls one fused operator unless it is being traced.
        # It rounds otherwise: a few units in the last place of float32.
        model = nn.MultiheadAttention(32, 4, batch_first=True).eval()
        x = torch.randn(2, 5, 32)
        step = olla.optimize(model, (x, x, x))
        with torch.no_grad():
            torch.testing.assert_close(step(x, x, x), model(x, x, x), rtol=0, atol=1e-6)

    def test_deeplabv3_returns_a_dict(self) -> None:
        model = torchvision.models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None, aux_loss=True)

        def images() -> Tensor:
            return torch.randn(2, 3, 32, 32)

        self.assert_training_same(
            model,
            images,
            loss_fn=segmentation_loss,
            targets=lambda: torch.randint(0, 21, (2, 32, 32)),
            steps=2,
        )
        self.assert_inference_same(model, images)

    def test_raft_small_takes_two_inputs_and_returns_a_list(self) -> None:
        model = torchvision.models.optical_flow.raft_small(weights=None)

        def frames() -> tuple[Tensor, Tensor]:
            return torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128)

        self.assert_inference_same(model, frames)
        self.assert_training_same(
            model, frames, loss_fn=flow_loss, targets=lambda: torch.randn(1, 2, 128, 128), steps=2
        )


class LanguageModels(EagerTestCase):
    """Architectures of transformers with small configurations, and torch's own Transformer."""

    def check(self, model: nn.Module, vocabulary: int) -> None:
        def tokens() -> dict[str, Tensor]:
            ids = torch.randint(5, vocabulary, (2, 16))
            return {"input_ids": ids, "labels": ids.clone()}

        with self.subTest("train"):
            self.assert_training_same(model, tokens)
        with self.subTest("eval"):
            self.assert_inference_same(model, lambda: {"input_ids": tokens()["input_ids"]})

    def test_bert(self) -> None:
        config = transformers.BertConfig(
            vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
        )
        self.check(transformers.BertForMaskedLM(config), 100)

    def test_xlmr(self) -> None:
        config = transformers.XLMRobertaConfig(
            vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
        )
        self.check(transformers.XLMRobertaForMaskedLM(config), 100)

    def test_gpt2_with_tied_weights(self) -> None:
        config = transformers.GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=2, use_cache=False)
        model = transformers.GPT2LMHeadModel(config)
        self.assertIs(model.lm_head.weight, model.transformer.wte.weight)
        self.check(model, 100)

    def test_llama(self) -> None:
        config = transformers.LlamaConfig(
            vocab_size=100,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            use_cache=False,
        )
        self.check(transformers.LlamaForCausalLM(config), 100)

    def test_t5_encoder_and_decoder(self) -> None:
        config = transformers.T5Config(
            vocab_size=100,
            d_model=32,
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_heads=2,
            use_cache=False,
            decoder_start_token_id=0,
        )
        self.assert_training_same(
            transformers.T5ForConditionalGeneration(config),
            lambda: {"input_ids": torch.randint(5, 100, (2, 9)), "labels": torch.randint(5, 100, (2, 7))},
        )

    def test_transformer(self) -> None:
        torch.manual_seed(0)
        model = nn.Transformer(32, 2, 2, 2, 64, batch_first=True)

        def sequences() -> tuple[Tensor, Tensor]:
            return torch.randn(2, 5, 32), torch.randn(2, 7, 32)

        self.assert_training_same(model, sequences)
        with without_attention_fast_path():
            self.assert_inference_same(model, sequences)
