"""Valid arguments of each operation."""

from __future__ import annotations

from typing import Any

import torch

SIZE = 600


def samples() -> dict[str, tuple[Any, ...]]:
    """Valid arguments of each operation."""
    x = torch.randn(SIZE)
    matrix = x.view(20, 30)
    codes, packed = torch.zeros(SIZE, dtype=torch.uint8), torch.zeros(SIZE // 2, dtype=torch.uint8)
    groups = torch.ones(3)
    byte_matrix = codes.view(20, 30)
    factors = torch.ones(1, 30)
    return {
        "quantize_blockwise": (x, codes, groups, True, 256),
        "dequantize_blockwise": (codes, groups, x, False, 256),
        "quantize_groups": (x, codes, groups, groups.clone(), 255, 256, 5, 0),
        "dequantize_groups": (codes, groups, groups.clone(), x, 256),
        "dequantize_groups_list": (
            *([codes, codes], [groups, groups], [groups, groups]),
            *([x.clone(), x.clone()], 256),
        ),
        "quantize_int4": (x, packed, groups, None, "nf4", 256),
        "dequantize_int4": (packed, groups, groups.clone(), x, "asymmetric", 256),
        "dequantize_int4_list": (
            *([packed, packed], [groups, groups], [groups, groups]),
            *([x.clone(), x.clone()], "asymmetric", 256),
        ),
        "rademacher": (x, 5),
        "gaussian": (x, 5, torch.tensor(7), 3),
        "gaussian_list": ([x.clone(), x.clone()], [5, 6], [], 0.5),
        "stochastic_bfloat16": (
            *(x, torch.empty(SIZE, dtype=torch.bfloat16), 5, 0),
            torch.tensor(7),
        ),
        "step_seeds": (
            *([torch.tensor(3.0), torch.tensor(4.0)], [5, -6], 7),
            torch.zeros(2, dtype=torch.int64),
        ),
        "adam": (
            *([x], [x.clone()], [x.abs()], [x.clone()], [], [], -1),
            *(0.9, 0.999, 1e-8, 1.0, None),
        ),
        "adam_weights": (
            *([x], [x.clone()], [x.clone()], [x.abs()], 0.9, 0.999, 1e-8, 1.0, 0.9, 0.1),
            torch.ones(1, 4),
        ),
        "adam_8bit": (
            *([x], [codes], [groups], [codes.clone()], [groups.clone()], [x.clone()]),
            *(0.9, 0.999, 1e-8, 1.0, torch.ones(1, 2)),
        ),
        "cautious_rows": (
            *(matrix, packed.view(20, 15), torch.ones(20, 1), torch.rand(20), torch.rand(30)),
            *(matrix.clone(), 4, True, 0.1, 1e-8, 0.5, 7, 3, 30),
        ),
        "limit_growth": (
            *([torch.tensor(2.0), torch.tensor(0.0)], torch.rand(2)),
            *(torch.tensor([True, False]), torch.zeros(2), 1.01),
        ),
        "write_back": (
            *(matrix, matrix.clone(), matrix.clone(), factors, 0.9, 0.1, None, 0),
            *(torch.ones(2), torch.tensor(7)),
        ),
        "write_back_list": ([matrix.clone()], [matrix], [factors], 0.9),
        "write_back_int8": (
            *(byte_matrix, groups, groups.clone(), matrix, None, None, 256),
            *(0.9, 0.1, 5, 0, torch.ones(2), torch.tensor(7)),
        ),
        "write_back_int4": (
            *(packed, groups, matrix, None, None, *matrix.shape, 256),
            *(0.9, 0.1, 5, 0, 3, torch.ones(2), torch.tensor(7)),
        ),
    }


def cloned(value: Any) -> Any:
    """Tensors of their own, which opcheck may change."""
    if isinstance(value, list):
        return [cloned(item) for item in value]
    return value.clone() if isinstance(value, torch.Tensor) else value
