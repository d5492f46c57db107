"""The pretraining loop, its data, checkpoints, evaluation and reports."""
