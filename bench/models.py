"""The models, with inputs and losses. Weights are random: no download."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from olla.cli.zoo import classification_loss, segmentation_loss


@dataclass
class Workload:
    """A model with example inputs, and its loss for training."""

    model: nn.Module
    inputs: tuple[Any, ...] | dict[str, Any]
    loss_fn: Callable[..., Tensor] | None = None
    targets: Tensor | None = None

    def call(self, function: Callable[..., Any], *, train: bool) -> Any:
        """Call a step (or the model) on the inputs, and on the targets if there are some."""
        named = {"targets": self.targets} if train and self.targets is not None else {}
        if isinstance(self.inputs, dict):
            return function(**self.inputs, **named)
        return function(*self.inputs, **named)


def classifier(name: str, *, shape: tuple[int, ...] = (3, 224, 224), **options: Any) -> Callable[[int], Workload]:
    """A builder of torchvision, for any batch size."""

    def build(batch: int) -> Workload:
        import torchvision

        builders = {**vars(torchvision.models), **vars(torchvision.models.video)}
        model = builders[name](weights=None, **options)
        return Workload(model, (torch.randn(batch, *shape),), classification_loss, torch.randint(0, 400, (batch,)))

    return build


def _segmentation(batch: int) -> Workload:
    import torchvision

    model = torchvision.models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None, aux_loss=True)
    target = torch.randint(0, 21, (batch, 224, 224))
    return Workload(model, (torch.randn(batch, 3, 224, 224),), segmentation_loss, target)


def _optical_flow(batch: int) -> Workload:
    import torchvision

    model = torchvision.models.optical_flow.raft_small(weights=None)
    frames = (torch.rand(batch, 3, 128, 128) * 2 - 1, torch.rand(batch, 3, 128, 128) * 2 - 1)
    return Workload(model, frames, flow_loss, torch.randn(batch, 2, 128, 128))


def flow_loss(flows: list[Tensor], target: Tensor) -> Tensor:
    """Mean distance from the target, of every refinement; the later, the heavier."""
    weights = [0.8 ** (len(flows) - 1 - i) for i in range(len(flows))]
    return torch.stack([w * (flow - target).abs().mean() for w, flow in zip(weights, flows, strict=True)]).sum()


def _transformer(**options: int) -> Callable[[int], Workload]:
    def build(batch: int) -> Workload:
        return Workload(nn.Transformer(**options), (torch.rand(10, batch, 512), torch.rand(20, batch, 512)))

    return build


def language(model_class: str, config_class: str, *, length: int = 128, **config: Any) -> Callable[[int], Workload]:
    """A language model of transformers, which computes its loss itself, for any batch size."""

    def build(batch: int) -> Workload:
        import transformers

        transformers.logging.set_verbosity_error()
        settings = getattr(transformers, config_class)(use_cache=False, **config)
        model = getattr(transformers, model_class)(settings)
        ids = torch.randint(5, settings.vocab_size, (batch, length))
        return Workload(model, {"input_ids": ids, "labels": ids.clone()})

    return build


MODELS: dict[str, Callable[[int], Workload]] = {
    "alexnet": classifier("alexnet"),
    "bert": language("RobertaForMaskedLM", "RobertaConfig", vocab_size=50265, max_position_embeddings=514),
    "deeplabv3_resnet50": _segmentation,
    "efficientnet_b0": classifier("efficientnet_b0"),
    "googlenet": classifier("googlenet", init_weights=False),
    "gpt2": language("GPT2LMHeadModel", "GPT2Config"),
    "inception_v3": classifier("inception_v3", shape=(3, 299, 299), init_weights=False),
    "llama": language(
        "LlamaForCausalLM",
        "LlamaConfig",
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=14,
        num_attention_heads=12,
    ),
    "mnasnet0_5": classifier("mnasnet0_5"),
    "mobilenet_v2": classifier("mobilenet_v2"),
    "r3d_18": classifier("r3d_18", shape=(3, 16, 112, 112)),
    "raft_small": _optical_flow,
    "resnet18": classifier("resnet18"),
    "resnet50": classifier("resnet50"),
    "squeezenet1_0": classifier("squeezenet1_0"),
    "swin_t": classifier("swin_t"),
    "transformer": _transformer(nhead=1, num_encoder_layers=1, num_decoder_layers=1),
    "transformer_dflt": _transformer(),
    "vgg11": classifier("vgg11"),
    "vgg16": classifier("vgg16"),
    "vgg19": classifier("vgg19"),
    "vit_b_16": classifier("vit_b_16"),
    "xlmr": language("XLMRobertaForMaskedLM", "XLMRobertaConfig", vocab_size=250002, max_position_embeddings=514),
}
QUICK = ("resnet18", "googlenet", "vit_b_16", "gpt2", "transformer_dflt")
