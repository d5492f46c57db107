"""DeepSpeed's ZeRO: `deepspeed.initialize` gets the optimizer, and nothing else changes.

torchrun --nproc-per-node 2 docs/examples/deepspeed_zero.py
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
from tiny import batch, language_model

from lowrank.optimizers import build

if not torch.cuda.is_available():  # its reductions in shared memory keep every core busy
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

CONFIG = {
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,  # DeepSpeed knows no optimizer but its own
    "zero_force_ds_cpu_optimizer": False,
}

model = language_model()
optimizer = build("galore_adamw", model, lr=0.01, rank=16, update_proj_gap=20)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)

rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
losses = []
for micro_batch in range(80):
    data = batch(micro_batch * world + rank, 8)
    loss = engine(**{name: value.to(engine.device) for name, value in data.items()}).loss
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
if rank == 0:
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
torch.distributed.destroy_process_group()
