"""Drop-in `torch.optim` optimizers that pretrain in little memory. Needs torch alone."""

from .apollo import ApolloAdamW, ApolloMiniAdamW
from .base import LowRankOptimizer
from .baselines import Adafactor, AdamW, AdamW8bit, Muon
from .coap import CoapAdafactor, CoapAdafactor8bit, CoapAdamW, CoapAdamW8bit
from .factored import FactoredAdamW
from .fira import FiraAdamW
from .flora import FloraAdafactor
from .frugal import FrugalAdamW
from .galore import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from .galore_plus import GaLorePlusAdamW, cross_head_groups
from .layer_events import LayerEvent
from .loqt import LoQTAdamW
from .low_rank import LowRankAdamW
from .memory import state_bytes, state_bytes_by_category
from .online_subspace import (
    OnlineSubspaceAdafactor,
    OnlineSubspaceAdamW,
    OnlineSubspaceAdamW8bit,
    OnlineSubspaceLion,
)
from .param_groups import param_groups
from .projectors import RefreshEvent
from .qgalore import QGaLoreAdamW8bit
from .registry import (
    accepts,
    available,
    build,
    convert,
    describe,
    expected_state_bytes,
    option_aliases,
)
from .relora import ReLoRAAdamW
from .sltrain import SLTrainAdamW, SLTrainAdamW8bit
from .sst import SSTAdamW
from .subspace_muon import GaLoreMuon
from .switchlora import SwitchLoRAAdamW
from .weights import Int8Weight, dense_state_dict
from .weights.convert import merge

__all__ = [
    "Adafactor",
    "AdamW",
    "AdamW8bit",
    "ApolloAdamW",
    "ApolloMiniAdamW",
    "CoapAdafactor",
    "CoapAdafactor8bit",
    "CoapAdamW",
    "CoapAdamW8bit",
    "FactoredAdamW",
    "FiraAdamW",
    "FloraAdafactor",
    "FrugalAdamW",
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "GaLoreMuon",
    "GaLorePlusAdamW",
    "Int8Weight",
    "LayerEvent",
    "LoQTAdamW",
    "LowRankAdamW",
    "LowRankOptimizer",
    "Muon",
    "OnlineSubspaceAdafactor",
    "OnlineSubspaceAdamW",
    "OnlineSubspaceAdamW8bit",
    "OnlineSubspaceLion",
    "QGaLoreAdamW8bit",
    "ReLoRAAdamW",
    "RefreshEvent",
    "SLTrainAdamW",
    "SLTrainAdamW8bit",
    "SSTAdamW",
    "SwitchLoRAAdamW",
    "accepts",
    "available",
    "build",
    "convert",
    "cross_head_groups",
    "dense_state_dict",
    "describe",
    "expected_state_bytes",
    "merge",
    "option_aliases",
    "param_groups",
    "state_bytes",
    "state_bytes_by_category",
]
