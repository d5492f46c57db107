"""The Hugging Face Trainer's own settings (`optim`, `optim_args`, `optim_target_modules`), by ours.

    python docs/examples/huggingface_optim_args.py

A configuration that was written for galore_torch or apollo_torch stays as it is; methods that
transformers has no name for are named in the second call.
"""

import tempfile

from tiny import dataset, language_model
from transformers import Trainer, TrainingArguments

from lowrank.optimizers import optimizer_from_arguments


def train(name=None, **settings):
    """Trains a new model; returns the first and the last loss that were logged."""
    model = language_model()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            learning_rate=0.01,
            max_steps=40,
            per_device_train_batch_size=16,
            logging_steps=5,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            **settings,
        )
        optimizer = optimizer_from_arguments(arguments, model, name)
        trainer = Trainer(
            model=model, args=arguments, train_dataset=dataset(), optimizers=(optimizer, None)
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses[0], losses[-1]


first, last = train(
    optim="galore_adamw",
    optim_target_modules=["attn", "mlp"],
    optim_args="rank=16, update_proj_gap=20, scale=0.25",
)
print(f"galore_adamw: loss {first:.3f} -> {last:.3f}")
first, last = train("coap_adamw", optim_args="rank=16, update_interval=10, restore_state=True")
print(f"coap_adamw: loss {first:.3f} -> {last:.3f}")
