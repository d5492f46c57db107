"""What every method runs on: options, composition, and the optimizer's step."""
