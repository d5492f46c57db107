"""Measured phases count what is done in them, whatever was done before."""

from __future__ import annotations

import gc

import torch

from lowrank.trainers.phases import PhaseMeter

CPU = torch.device("cpu")
SIZE = 1 << 20


class Cycle:
    """What only the garbage collector frees."""

    def __init__(self) -> None:
        self.itself = self
        self.bytes = torch.ones(8 * SIZE, dtype=torch.uint8)


def test_what_an_earlier_measurement_left_in_cycles_is_not_subtracted() -> None:
    gc.disable()
    try:
        with PhaseMeter(CPU) as first, first.phase("made"):
            Cycle()
        with PhaseMeter(CPU) as meter, meter.phase("later"):
            gc.collect()
            kept = torch.ones(SIZE, dtype=torch.uint8)
    finally:
        gc.enable()
    assert first.peaks["made"] == 8 * SIZE
    assert meter.peaks["later"] == meter.ends["later"] == kept.nbytes
