"""The engine of every method: options, composition, and the optimizer's step."""
