"""torch.compile: of the model, and of the optimizer's update.

python docs/examples/compiled_model.py
"""

import torch
from tiny import batch, language_model

from lowrank.optimizers import build

model = language_model()
# `compile=True` compiles the update; another learning rate does not compile it anew.
optimizer = build("galore_adamw", model, lr=0.01, rank=16, update_proj_gap=20, compile=True)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
compiled = torch.compile(model)  # after `build`, which names parameters by the model's own names

losses = []
for step in range(40):
    loss = compiled(**batch(step)).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
