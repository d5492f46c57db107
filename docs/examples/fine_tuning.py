"""Fine-tuning in equal memory: Fira and Q-GaLore, which train the weights themselves, beside LoRA.

    pip install peft && python docs/examples/fine_tuning.py

Counted are weights, optimizer state and gradients. With `update_in_backward` there is one gradient
at a time, so that the memory of LoRA's factors buys a projection of a larger rank.
"""

import copy

import torch
from peft import LoraConfig, get_peft_model
from tiny import batch, language_model

from lowrank.optimizers import (
    build,
    expected_state_bytes,
    expected_weight_bytes,
    update_in_backward,
)

LORA_RANK = 8


def train(model, optimizer, strides, steps=80):
    """Trains in place; returns the mean of the last ten losses."""
    losses = []
    for step in range(steps):
        loss = model(**batch(step, strides=strides)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10


pretrained = language_model()
train(pretrained, torch.optim.AdamW(pretrained.parameters(), lr=0.003), (1, 2, 3))
pretrained.get_input_embeddings().requires_grad_(False)
pretrained.lm_head.requires_grad_(False)
new = (5, 7)  # the task to learn
before = pretrained(**batch(999, strides=new)).loss.item()

model = get_peft_model(
    copy.deepcopy(pretrained), LoraConfig(r=LORA_RANK, lora_alpha=16, target_modules="all-linear")
)
factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
budget = sum(p.nbytes for p in model.parameters()) + 3 * sum(p.nbytes for p in factors)
after = train(model, torch.optim.AdamW(factors, lr=0.003), new)
print(f"LoRA of rank {LORA_RANK}: {budget} bytes, loss {before:.3f} -> {after:.3f}")

largest = max(parameter.nbytes for parameter in pretrained.parameters())
for name in ("fira_adamw", "qgalore_adamw_8bit"):

    def needed(rank, name=name):
        """Bytes of weights, state and the largest gradient."""
        weights = expected_weight_bytes(name, pretrained, rank=rank)
        return weights + expected_state_bytes(name, pretrained, rank=rank) + largest

    rank = max(rank for rank in range(1, 65) if needed(rank) <= budget)
    model = copy.deepcopy(pretrained)
    optimizer = build(name, model, lr=0.01, rank=rank, update_proj_gap=20)
    update_in_backward(optimizer)
    after = train(model, optimizer, new)
    print(f"{name} of rank {rank}: {needed(rank)} bytes, loss {before:.3f} -> {after:.3f}")
