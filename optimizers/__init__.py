"""Drop-in `torch.optim` optimizers that pretrain in little memory. Needs torch alone."""

from .engine.optimizer import LowRankOptimizer
from .layers.events import LayerEvent
from .layers.optimizer import FactoredAdamW
from .memory import state_bytes, state_bytes_by_category
from .methods.apollo import ApolloAdamW, ApolloMiniAdamW
from .methods.baselines import Adafactor, AdamW, AdamW8bit, Muon
from .methods.coap import CoapAdafactor, CoapAdafactor8bit, CoapAdamW, CoapAdamW8bit
from .methods.fira import FiraAdamW
from .methods.flora import FloraAdafactor
from .methods.frugal import FrugalAdamW
from .methods.galore import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from .methods.galore_muon import GaLoreMuon
from .methods.galore_plus import GaLorePlusAdamW, cross_head_groups
from .methods.loqt import LoQTAdamW
from .methods.low_rank import LowRankAdamW
from .methods.online_subspace import (
    OnlineSubspaceAdafactor,
    OnlineSubspaceAdamW,
    OnlineSubspaceAdamW8bit,
    OnlineSubspaceLion,
)
from .methods.qgalore import QGaLoreAdamW8bit
from .methods.relora import ReLoRAAdamW
from .methods.sltrain import SLTrainAdamW, SLTrainAdamW8bit
from .methods.sst import SSTAdamW
from .methods.switchlora import SwitchLoRAAdamW
from .param_groups import param_groups
from .projectors import RefreshEvent
from .registry import (
    accepts,
    available,
    build,
    convert,
    describe,
    expected_state_bytes,
    option_aliases,
)
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
