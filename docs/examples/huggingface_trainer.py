"""The Hugging Face Trainer, with an optimizer that is built beside it.

python docs/examples/huggingface_trainer.py
"""

import tempfile

from tiny import dataset, language_model
from transformers import Trainer, TrainingArguments

from lowrank.optimizers import build

model = language_model()
optimizer = build("fira_adamw", model, lr=0.01, rank=16, update_proj_gap=20)

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=60,
        per_device_train_batch_size=16,
        lr_scheduler_type="cosine",
        logging_steps=10,
        save_steps=30,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    # None: the Trainer makes the schedule. The learning rate is that of the optimizer.
    trainer = Trainer(
        model=model, args=arguments, train_dataset=dataset(), optimizers=(optimizer, None)
    )
    trainer.train()  # resume_from_checkpoint=True goes on from the last checkpoint, to the bit

losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
