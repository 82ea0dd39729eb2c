"""Models of torchvision and transformers, with random weights, random inputs, and their usual losses."""

from __future__ import annotations

import warnings
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from olla.cli.target import Request, Target, optimizer_for, unknown
from olla.errors import OllaError

__all__ = ["classification_loss", "segmentation_loss", "torchvision_model", "transformers_model"]

_FRAMES = 16  # of a video
_LENGTH = 128  # of a text
_CLASSES = 21  # the fewest that a model here tells apart

# The model types that these names stand for, and how they differ from the usual configuration of their type.
_NAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-base": ("bert", {}),
    "bert-large": (
        "bert",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    ),
    "gpt2-medium": ("gpt2", {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "gpt2-large": ("gpt2", {"n_embd": 1280, "n_layer": 36, "n_head": 20}),
    "gpt2-xl": ("gpt2", {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "roberta-base": ("roberta", {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}),
    "xlm-roberta-base": ("xlm-roberta", {"vocab_size": 250002, "max_position_embeddings": 514, "type_vocab_size": 1}),
}
_TASKS = ("MaskedLM", "CausalLM", "Seq2SeqLM", "ImageClassification")
_MAPPINGS = ("MASKED_LM", "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_CLASSIFICATION")


def torchvision_model(name: str, request: Request) -> Target:
    """A classifier of images or videos, or a segmentation, at the size that its published weights are for.

    Raises
    ------
    OllaError
        If torchvision is missing, has no such model, or it is one for something else.
    """
    models = _package("torchvision", name).models
    if name not in models.list_models():
        raise OllaError(unknown("torchvision has no model", name, models.list_models()))
    task = models.get_model_builder(name).__module__.split(".")[2]
    if task in ("detection", "optical_flow", "quantization"):
        raise OllaError(
            f"torchvision:{name} is a model for {task.replace('_', ' ')}, which has no usual step here: write a script "
            "that defines model and inputs"
        )
    without = {"weights_backbone": None} if task == "segmentation" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of initial values, which will be others some day
        model = models.get_model(name, weights=None, **without)
    shape = request.shape or _shape_for(model, models.get_model_weights(name).DEFAULT.transforms())
    batch = request.batch_size or 1
    images = torch.randn(batch, *shape)
    if request.train is False:
        return Target(model.eval(), images)
    of_pixels = task == "segmentation"
    targets = torch.randint(_CLASSES, (batch, *shape[1:]) if of_pixels else (batch,))
    optimizer = optimizer_for(model, request.optimizer or "SGD")
    return Target(model.train(), images, segmentation_loss if of_pixels else classification_loss, targets, optimizer)


def transformers_model(name: str, request: Request) -> Target:
    """A language model, or a classifier of images, that computes its loss itself, from labels.

    Raises
    ------
    OllaError
        If transformers is missing, has no such model type, or it is one for something else.
    """
    transformers = _package("transformers", name)
    transformers.logging.set_verbosity_error()
    known = [*transformers.CONFIG_MAPPING, *_NAMED]
    if name not in known:
        raise OllaError(unknown("transformers has no model type", name, known))
    try:
        return _made(transformers, name, request)
    except OllaError:
        raise
    except Exception as error:  # of a type whose usual configuration is not enough, or that needs another package
        raise OllaError(f"transformers:{name} cannot be made: {type(error).__name__}: {error}") from error


def _made(transformers: ModuleType, name: str, request: Request) -> Target:
    model_type, settings = _NAMED.get(name, (name, {}))
    config = transformers.AutoConfig.for_model(model_type, use_cache=False, **settings)
    tasks = zip(_TASKS, _MAPPINGS, strict=True)
    task = next((t for t, m in tasks if type(config) in getattr(transformers, f"MODEL_FOR_{m}_MAPPING")), None)
    if task is None:
        raise OllaError(
            f"transformers:{name} is neither a language model nor a classifier of images: write a script that defines "
            "model and inputs"
        )
    model = getattr(transformers, f"AutoModelFor{task}").from_config(config)
    batch = request.batch_size or 1
    inputs: dict[str, Tensor] = {}
    if task == "ImageClassification":
        inputs["pixel_values"] = torch.randn(batch, *(request.shape or _image_shape(config)))
        labels = torch.randint(config.num_labels, (batch,))
    else:
        labels = torch.randint(config.get_text_config().vocab_size, (batch, *(request.shape or (_LENGTH,))))
        inputs["input_ids"] = labels.clone()
        if task == "Seq2SeqLM":
            inputs["decoder_input_ids"] = labels.clone()
    if request.train is False:
        return Target(model.eval(), inputs)
    return Target(
        model.train(), {**inputs, "labels": labels}, optimizer=optimizer_for(model, request.optimizer or "SGD")
    )


def classification_loss(output: Any, target: Tensor) -> Tensor:
    """Cross entropy; googlenet and inception_v3 add their auxiliary heads, weighted as in their papers."""
    if isinstance(output, Tensor):
        return F.cross_entropy(output, target)
    main, *others = (head for head in output if head is not None)
    weight = 0.3 if len(others) == 2 else 0.4
    return F.cross_entropy(main, target) + weight * sum(F.cross_entropy(head, target) for head in others)


def segmentation_loss(output: dict[str, Tensor], target: Tensor) -> Tensor:
    """Cross entropy of every pixel, with an auxiliary head at half the weight."""
    loss = F.cross_entropy(output["out"], target)
    return loss + 0.5 * F.cross_entropy(output["aux"], target) if "aux" in output else loss


def _shape_for(model: nn.Module, transforms: Any) -> tuple[int, ...]:
    """The shape of what these transforms of torchvision make, without the batch, or of what the model insists on."""
    size = getattr(transforms, "crop_size", transforms.resize_size)
    height, width = size if len(size) == 2 else size * 2
    if type(transforms).__name__ == "VideoClassification":
        return (3, _FRAMES, height, width)
    height = width = getattr(model, "image_size", height)
    return (3, height, width)


def _image_shape(config: Any) -> tuple[int, ...]:
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", 224)
    return (getattr(config, "num_channels", 3), *((size, size) if isinstance(size, int) else size))


def _package(package: str, name: str) -> ModuleType:
    try:
        return import_module(package)
    except ImportError as error:
        raise OllaError(f"{package}:{name} needs {package}: pip install {package}") from error
