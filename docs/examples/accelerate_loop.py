"""Accelerate: prepare, accumulate, clip, save and load.

python docs/examples/accelerate_loop.py
"""

import tempfile

import torch
from accelerate import Accelerator
from tiny import dataset, language_model

from lowrank.optimizers import build

accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=2)
model = language_model()
optimizer = build("coap_adamw", model, lr=0.01, rank=16)  # before prepare, which wraps the model
loader = torch.utils.data.DataLoader(dataset(960), batch_size=8)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

losses = []
for data in loader:
    with accelerator.accumulate(model):
        loss = model(**data).loss
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    losses.append(loss.item())

with tempfile.TemporaryDirectory() as folder:
    accelerator.save_state(folder)
    accelerator.load_state(folder)  # the optimizer's state as well
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
