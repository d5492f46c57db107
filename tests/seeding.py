"""Seeds of tests."""

import torch


def seed_generators(number: int) -> None:
    """Seeds the generators; `torch.manual_seed` takes milliseconds for devices that are missing."""
    if torch.cuda.is_available():
        torch.manual_seed(number)
    else:
        torch.default_generator.manual_seed(number)
