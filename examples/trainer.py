"""Hugging Face's ``Trainer``, whose forward and backward of each batch are a planned step; all else stays as it is."""

import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import olla


class PlannedTrainer(Trainer):
    """Adds gradients to ``.grad`` as ``Trainer`` does, which clips them, and steps optimizer and scheduler."""

    step: olla.Step | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Plan anew: ``model_init`` may make another model."""
        self.step = None
        return super().train(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of one batch; its loss."""

        def eager_step(inputs: dict[str, Any], num_items_in_batch: Tensor | int | None, parts: int) -> Tensor:
            return super(PlannedTrainer, self).training_step(model, inputs, num_items_in_batch)

        if self.accelerator.scaler is not None:
            raise olla.CaptureError("fp16=True scales the loss by a number that changes: train with bf16=True")
        model.train()  # after an evaluation: the mode counts that is found when the step is called
        # The Trainer reads the number of parts itself, as a number that becomes part of the plan, so it must be told.
        batch = (dict(self._prepare_inputs(inputs)), num_items_in_batch, self.current_gradient_accumulation_steps)
        if self.step is None:
            self.step = olla.optimize_step(eager_step, batch, model=model)
        return self.step(*batch)


def bert() -> PreTrainedModel:
    """With random weights: nothing is downloaded."""
    config = BertConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    return BertForMaskedLM(config)


def gpt2() -> PreTrainedModel:
    """With random weights, too."""
    config = GPT2Config(vocab_size=128, n_positions=16, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


def make_trainer(model: PreTrainedModel, folder: str, kind: type[Trainer] = PlannedTrainer) -> Trainer:
    """A Trainer with bfloat16, clipping, accumulation, a scheduler, evaluation and checkpoints."""
    tokens = torch.randint(0, 128, (70, 16), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = TrainingArguments(
        folder,
        max_steps=20,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=4,
        bf16=True,
        use_cpu=True,
        eval_strategy="steps",
        eval_steps=5,
        save_steps=10,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
    )
    return kind(model, arguments, train_dataset=data, eval_dataset=data[:8])


trainers = {}
for make_model in bert, gpt2:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(make_model(), folder)
        result = trainer.train()
        resumed = make_trainer(make_model(), folder)  # as a new process would
        resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-10")
    trainers[make_model.__name__] = trainer
    plan = trainer.step.plan
    print(f"{make_model.__name__}: loss {result.training_loss:.4f}", end=", ")
    print(f"eager {plan.baseline_peak_bytes:,} bytes, planned {plan.peak_bytes:,}")
    same = zip(trainer.model.parameters(), resumed.model.parameters(), strict=True)
    print(f"resumed, and equal bit for bit: {all(torch.equal(one, other) for one, other in same)}")
