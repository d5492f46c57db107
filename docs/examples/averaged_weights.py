"""An exponential moving average of the weights (EMA), also of weights in 8 bits.

python docs/examples/averaged_weights.py
"""

import copy

import torch
from tiny import batch, language_model
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lowrank.optimizers import build, merge

model = language_model()
optimizer = build("qgalore_adamw_8bit", model, lr=0.01, rank=16, update_proj_gap=20)
# The average in full precision: `merge` makes the copy's weights dense. AveragedModel(model) works
# as well and takes a quarter of the memory, but what it adds in a step is then less than a code,
# and is rounded stochastically.
average = AveragedModel(merge(copy.deepcopy(model)), multi_avg_fn=get_ema_multi_avg_fn(0.9))

losses = []
for step in range(60):
    loss = model(**batch(step)).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    average.update_parameters(model)
    losses.append(loss.item())

with torch.no_grad():
    print(f"loss of the last weights {model(**batch(1000)).loss:.3f}")
    print(f"loss {losses[0]:.3f} -> {average(**batch(1000)).loss:.3f}")
