"""FSDP2 (`fully_shard`): weights, gradients and optimizer state are spread over the processes.

torchrun --nproc-per-node 2 docs/examples/fsdp2_loop.py
"""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tiny import batch, language_model
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from lowrank.optimizers import build, state_bytes

if torch.cuda.is_available():
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

model = language_model().to(device)
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
optimizer = build("galore_adamw", model, lr=0.01, rank=16, update_proj_gap=20)  # after fully_shard

losses = []
for step in range(40):
    data = batch(step * dist.get_world_size() + dist.get_rank())
    loss = model(**{name: value.to(device) for name, value in data.items()}).loss
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    dist.all_reduce(mean := loss.detach())
    losses.append(mean.item() / dist.get_world_size())

# One checkpoint of all processes, which loads on any number of them.
shared = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
dist.broadcast_object_list(shared)
weights, state = get_state_dict(model, optimizer)
dcp.save({"model": weights, "optimizer": state}, checkpoint_id=shared[0])
dcp.load({"model": weights, "optimizer": state}, checkpoint_id=shared[0])
set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)

if dist.get_rank() == 0:
    print(f"{state_bytes(optimizer)} bytes of optimizer state here")
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
dist.destroy_process_group()
