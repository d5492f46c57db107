"""TRL's SFTTrainer; its other trainers take `optimizers=` in the same way.

pip install trl && python docs/examples/trl_sft.py
"""

import tempfile

from datasets import Dataset
from tiny import VOCABULARY, language_model, rows
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from lowrank.optimizers import build

# Words are numbers; in your code the tokenizer comes with the model.
words = {str(number): number for number in range(VOCABULARY)} | {"<end>": VOCABULARY}
core = Tokenizer(models.WordLevel(words, unk_token="<end>"))
core.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<end>")
texts = [" ".join(map(str, row.tolist())) for row in rows(0, 320)]

model = language_model()
model.resize_token_embeddings(VOCABULARY + 1)
optimizer = build("apollo_adamw", model, lr=0.01, rank=16)  # after the model has its final shape

with tempfile.TemporaryDirectory() as folder:
    arguments = SFTConfig(
        output_dir=folder,
        max_steps=40,
        per_device_train_batch_size=16,
        max_length=32,
        logging_steps=5,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer,
        optimizers=(optimizer, None),
    )
    trainer.train()

losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
