"""A training loop of your own: schedule, clipping, and a checkpoint that goes on to the bit.

python docs/examples/plain_loop.py
"""

import io

import torch
from tiny import batch, language_model
from torch.optim.lr_scheduler import CosineAnnealingLR

from lowrank.optimizers import build

STEPS, SAVED = 60, 40


def train(model, optimizer, scheduler, steps):
    """Trains; returns the loss of every step."""
    losses = []
    for step in steps:
        loss = model(**batch(step)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


def make():
    """A model with its optimizer and schedule."""
    model = language_model()
    # Or: GaLoreAdamW(param_groups(model, rank=16, update_proj_gap=20), lr=0.01)
    optimizer = build("galore_adamw", model, lr=0.01, rank=16, update_proj_gap=20)
    return model, optimizer, CosineAnnealingLR(optimizer, STEPS)


parts = make()
losses = train(*parts, range(SAVED))
file = io.BytesIO()
torch.save([part.state_dict() for part in parts], file)
losses += train(*parts, range(SAVED, STEPS))

file.seek(0)
again = make()
for part, state in zip(again, torch.load(file, weights_only=True), strict=True):
    part.load_state_dict(state)
assert train(*again, range(SAVED, STEPS)) == losses[SAVED:]  # equal to the last bit
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
