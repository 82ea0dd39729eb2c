"""A Hugging Face model, trained within a budget of bytes: what each budget costs, then one of them."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import olla

torch.manual_seed(0)
config = GPT2Config(vocab_size=512, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
model = GPT2LMHeadModel(config).train()  # random weights: nothing is downloaded
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
tokens = torch.randint(0, 512, (8, 64))
batch = {"input_ids": tokens, "labels": tokens}  # with labels, the output has a .loss: no loss_fn is needed

print(olla.frontier(model, batch, optimizer=optimizer, points=4, time_limit=10))  # runs nothing

step = olla.optimize(model, batch, optimizer=optimizer, memory_budget=0.5, time_limit=10)  # half of eager's bytes
for _ in range(5):
    loss = step(**batch)
print(f"loss {loss:.3f}")

measured = step.measure(**batch)
print(f"eager {measured.baseline_peak_bytes:,} bytes, planned {measured.peak_bytes:,}: {measured.saving:.0%} less")
held = [step.plan.persistent_bytes + peak for peak in (measured.baseline_peak_bytes, measured.peak_bytes)]
print(f"with parameters, optimizer state and inputs: {held[0]:,} and {held[1]:,}")
print(f"operators that run again: {len(step.plan.recomputed)} of {len(step.plan.order)}")
