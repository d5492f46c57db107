"""Lightning: the optimizer is built in `configure_optimizers`, and checkpoints go on exactly.

    pip install lightning && python docs/examples/lightning_module.py

A method that changes the layers or the weights (Q-GaLore, ReLoRA, ...) is converted in `__init__`
(`convert(name, model, ...)`), because Lightning reads a checkpoint's weights before it calls
`configure_optimizers`.
"""

import logging
import tempfile

import lightning
import torch
from tiny import dataset, language_model

from lowrank.optimizers import build, convert

OPTIONS = {"rank": 16, "update_proj_gap": 20}


class Module(lightning.LightningModule):
    """A language model with INT8 weights, trained by Q-GaLore."""

    def __init__(self):
        super().__init__()
        self.model = convert("qgalore_adamw_8bit", language_model(), **OPTIONS)
        self.losses = []

    def training_step(self, batch, index):
        """The loss of a batch."""
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        """The optimizer and its schedule."""
        optimizer = build("qgalore_adamw_8bit", self.model, lr=0.01, **OPTIONS)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)]


def trainer(epochs, folder):
    """A quiet trainer on the CPU."""
    return lightning.Trainer(
        max_epochs=epochs,
        default_root_dir=folder,
        accelerator="cpu",
        gradient_clip_val=1.0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
loader = torch.utils.data.DataLoader(dataset(), batch_size=16)  # 40 batches
with tempfile.TemporaryDirectory() as folder:
    first = Module()
    half = trainer(1, folder)
    half.fit(first, loader)
    half.save_checkpoint(f"{folder}/half.ckpt")
    second = Module()
    trainer(2, folder).fit(second, loader, ckpt_path=f"{folder}/half.ckpt")
print(f"loss {first.losses[0]:.3f} -> {second.losses[-1]:.3f}")
