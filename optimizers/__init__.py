"""Drop-in `torch.optim` optimizers that pretrain in little memory. Needs torch alone."""

from .apollo import ApolloAdamW, ApolloMiniAdamW
from .base import LowRankOptimizer
from .baselines import Adafactor, AdamW, AdamW8bit, Muon
from .fira import FiraAdamW
from .flora import FloraAdafactor
from .frugal import FrugalAdamW
from .galore import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from .galore_plus import GaLorePlusAdamW, cross_head_groups
from .memory import state_bytes, state_bytes_by_category
from .online_subspace import (
    OnlineSubspaceAdafactor,
    OnlineSubspaceAdamW,
    OnlineSubspaceAdamW8bit,
    OnlineSubspaceLion,
)
from .param_groups import param_groups
from .projectors import RefreshEvent
from .registry import available, build, describe, expected_state_bytes
from .subspace_muon import GaLoreMuon

__all__ = [
    "Adafactor",
    "AdamW",
    "AdamW8bit",
    "ApolloAdamW",
    "ApolloMiniAdamW",
    "FiraAdamW",
    "FloraAdafactor",
    "FrugalAdamW",
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "GaLoreMuon",
    "GaLorePlusAdamW",
    "LowRankOptimizer",
    "Muon",
    "OnlineSubspaceAdafactor",
    "OnlineSubspaceAdamW",
    "OnlineSubspaceAdamW8bit",
    "OnlineSubspaceLion",
    "RefreshEvent",
    "available",
    "build",
    "cross_head_groups",
    "describe",
    "expected_state_bytes",
    "param_groups",
    "state_bytes",
    "state_bytes_by_category",
]
