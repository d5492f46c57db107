"""What cards move and compute in a second: data sheets' figures, and the shares assumed of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .cards import card_name
from .work import Work

#: TB/s of memory; dense TFLOP/s in bf16 (sums in fp32), TF32, fp32 and fp64; GB/s that one card
#: sends to others (NVLink, or PCIe x16, in one direction). From NVIDIA's data sheets of the cards
#: (SXM forms of A100, H100, H200 and B200; without sparsity, which doubles some sheets' figures),
#: for GeForce from the white papers of GA102, AD102 and Blackwell. fp64 is that of tensor cores
#: where there are such. Cards without products in bf16 (V100, T4) have no line.
DATA_SHEETS: dict[str, tuple[float, float, float, float, float, float]] = {
    "3080": (0.760, 59.5, 29.8, 29.8, 0.465, 32),
    "3090": (0.936, 71.0, 35.6, 35.6, 0.556, 32),
    "4080": (0.717, 97.5, 48.7, 48.7, 0.761, 32),
    "4090": (1.008, 165.2, 82.6, 82.6, 1.29, 32),
    "5090": (1.792, 209.5, 104.8, 104.8, 1.64, 64),
    "A10": (0.600, 125.0, 62.5, 31.2, 0.488, 32),
    "A40": (0.696, 149.7, 74.8, 37.4, 0.584, 32),
    "A100-40GB": (1.555, 312.0, 156.0, 19.5, 19.5, 300),
    "A100-80GB": (2.039, 312.0, 156.0, 19.5, 19.5, 300),
    "A6000": (0.768, 154.8, 77.4, 38.7, 0.605, 32),
    "B200": (8.0, 2250.0, 1125.0, 75.0, 37.0, 900),
    "H100": (3.35, 989.0, 494.0, 67.0, 67.0, 450),
    "H200": (4.8, 989.0, 494.0, 67.0, 67.0, 450),
    "L4": (0.300, 121.0, 60.0, 30.3, 0.473, 32),
    "L40S": (0.864, 362.0, 183.0, 91.6, 1.43, 32),
    "RTX-6000-Ada": (0.960, 364.2, 182.1, 91.1, 1.42, 32),
}

#: Assumptions, none of them measured: shares of the data sheets' figures that large copies, large
#: products, the passes of a whole model and the links between cards reach.
COPIES, PRODUCTS, PASSES, LINKS = 0.85, 0.7, 0.5, 0.8
#: Seconds, assumed too: that a kernel takes the card at least; that one costs the host which Python
#: and torch start it from; that replaying a graph costs it; that it waits for a number.
KERNEL, LAUNCH, REPLAY, READ = 2e-6, 6e-6, 10e-6, 20e-6


@dataclass(frozen=True)
class Speed:
    """What a card does in a second, as far as a modelled step needs it.

    Attributes:
        name: of the card.
        bandwidth: bytes that are read or written.
        flops: floating-point operations of products, by the names of `work.UNITS`.
        passes: share of `flops` that forward and backward passes reach.
        link: bytes that it sends to others.
        kernel: seconds that a launch takes the device at least.
        launch: seconds that a launch takes the host.
        replay: seconds that it takes the host to replay a graph.
        read: seconds that the host waits for a number, beside what the device has to do.
    """

    name: str
    bandwidth: float
    flops: Mapping[str, float]
    passes: float = PASSES / PRODUCTS
    link: float | None = None
    kernel: float = KERNEL
    launch: float = LAUNCH
    replay: float = REPLAY
    read: float = READ
    #: Shares of data sheets that are in the figures; empty where they were measured.
    assumed: Mapping[str, float] = field(default_factory=dict)

    def seconds(self, work: Work) -> float:
        """What one operation takes a card that others keep busy."""
        computing = work.flops / (self.flops[work.unit] * work.share)
        return max(work.launches * self.kernel, work.moved / self.bandwidth, computing)


def card_speed(name: str) -> Speed:
    """That of a card by its data sheet, with the assumed shares.

    Raises:
        ValueError: as `card_name`, or nothing is known of its speed.
    """
    known = card_name(name)
    if known not in DATA_SHEETS:
        raise ValueError(
            f"card={name!r}: its speed is not known; accepted for times are "
            f"{', '.join(DATA_SHEETS)}"
        )
    bandwidth, bf16, tf32, fp32, fp64, link = DATA_SHEETS[known]
    rates = {"bf16": bf16, "tf32": tf32, "fp32": fp32, "fp64": fp64}
    return Speed(
        known,
        COPIES * bandwidth * 1e12,
        {unit: PRODUCTS * rate * 1e12 for unit, rate in rates.items()},
        link=LINKS * link * 1e9,
        assumed={"copies": COPIES, "products": PRODUCTS, "passes": PASSES, "links": LINKS},
    )


def measured_speed(
    name: str,
    bandwidth: float,
    flops: Mapping[str, float],
    launch: float | None = None,
) -> Speed:
    """That of a card by what was measured on it.

    Args:
        name: of the card.
        bandwidth: bytes a second of a large copy, read and written.
        flops: of products, by `work.UNITS`; "tf32" and "fp64" may lack: "fp32" stands for them.
        launch: seconds of a small operation, host included.

    Raises:
        ValueError: a rate lacks or isn't positive.
    """
    rates = {"tf32": flops.get("fp32"), "fp64": flops.get("fp32"), **flops}
    for unit in ("bf16", "tf32", "fp32", "fp64"):
        if not (rates.get(unit) or 0) > 0:
            raise ValueError(f"flops[{unit!r}]={rates.get(unit)}: accepted are rates above 0")
    if not bandwidth > 0:
        raise ValueError(f"bandwidth={bandwidth}: accepted are rates above 0")
    found = {unit: float(rate) for unit, rate in rates.items() if rate is not None}
    return Speed(name, bandwidth, found, launch=launch or LAUNCH)
