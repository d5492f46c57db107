"""Drop-in `torch.optim` optimizers for pretraining in little memory. Requires torch only.

The classes come from the modules in `methods`, under their names and the official packages'
spellings (`APOLLOAdamW`).
"""

from typing import TYPE_CHECKING

from .blocks import block_groups as block_groups
from .compress import WeightCompression as WeightCompression
from .compress import compress_weights as compress_weights
from .compress import load_compressed as load_compressed
from .coverage import projection_summary as projection_summary
from .engine.in_backward.handle import InBackward as InBackward
from .engine.in_backward.update import update_in_backward as update_in_backward
from .engine.low_rank_hook import GradientTraffic as GradientTraffic
from .engine.low_rank_hook import LowRankHook as LowRankHook
from .engine.low_rank_hook import register_low_rank_hook as register_low_rank_hook
from .engine.method import exported as _exported
from .engine.optimizer import LowRankOptimizer as LowRankOptimizer
from .layers.compressed import Compression as Compression
from .layers.compressed import compress_activations as compress_activations
from .layers.events import LayerEvent as LayerEvent
from .layers.optimizer import FactoredAdamW as FactoredAdamW
from .memory import state_bytes as state_bytes
from .memory import state_bytes_by_category as state_bytes_by_category
from .methods.galore_plus import cross_head_groups as cross_head_groups
from .methods.scale import scale_groups as scale_groups
from .official_state import load_official_state as load_official_state
from .official_state import read_official as read_official
from .outer import SparseLoCo as SparseLoCo
from .param_groups import param_groups as param_groups
from .projectors import RefreshEvent as RefreshEvent
from .registry import accepts as accepts
from .registry import available as available
from .registry import build as build
from .registry import convert as convert
from .registry import describe as describe
from .registry import expected_state_bytes as expected_state_bytes
from .registry import expected_step_traffic as expected_step_traffic
from .registry import expected_weight_bytes as expected_weight_bytes
from .registry import method_table as method_table
from .registry import option_aliases as option_aliases
from .training_arguments import optimizer_from_arguments as optimizer_from_arguments
from .weights import Int4Weight as Int4Weight
from .weights import Int8Weight as Int8Weight
from .weights import QuantizedWeight as QuantizedWeight
from .weights import dense_state_dict as dense_state_dict
from .weights.convert import merge as merge
from .zero_checkpoint import load_zero_checkpoint as load_zero_checkpoint

if TYPE_CHECKING:  # at run time every class comes from `methods`
    from .methods.alice import AliceAdamW as AliceAdamW
    from .methods.apollo import ApolloAdamW as ApolloAdamW
    from .methods.apollo import ApolloMiniAdamW as ApolloMiniAdamW
    from .methods.baselines import Adafactor as Adafactor
    from .methods.baselines import AdamW as AdamW
    from .methods.baselines import AdamW8bit as AdamW8bit
    from .methods.baselines import Muon as Muon
    from .methods.cautious import CautiousAdafactor as CautiousAdafactor
    from .methods.coap import CoapAdafactor as CoapAdafactor
    from .methods.coap import CoapAdafactor8bit as CoapAdafactor8bit
    from .methods.coap import CoapAdamW as CoapAdamW
    from .methods.coap import CoapAdamW8bit as CoapAdamW8bit
    from .methods.dlrt import DLRTAdamW as DLRTAdamW
    from .methods.fira import FiraAdamW as FiraAdamW
    from .methods.flora import FloraAdafactor as FloraAdafactor
    from .methods.foam import FoamAdamW as FoamAdamW
    from .methods.frugal import FrugalAdamW as FrugalAdamW
    from .methods.galore import GaLoreAdafactor as GaLoreAdafactor
    from .methods.galore import GaLoreAdamW as GaLoreAdamW
    from .methods.galore import GaLoreAdamW8bit as GaLoreAdamW8bit
    from .methods.galore_muon import GaLoreMuon as GaLoreMuon
    from .methods.galore_plus import GaLorePlusAdamW as GaLorePlusAdamW
    from .methods.gradnorm_lorp import GradNormLoRPAdamW as GradNormLoRPAdamW
    from .methods.ldadam import LDAdamW as LDAdamW
    from .methods.lisa import LisaAdamW as LisaAdamW
    from .methods.loqt import LoQTAdamW as LoQTAdamW
    from .methods.lora_pre import LoRAPreAdamW as LoRAPreAdamW
    from .methods.low_rank import LowRankAdamW as LowRankAdamW
    from .methods.online_subspace import OnlineSubspaceAdafactor as OnlineSubspaceAdafactor
    from .methods.online_subspace import OnlineSubspaceAdamW as OnlineSubspaceAdamW
    from .methods.online_subspace import OnlineSubspaceAdamW8bit as OnlineSubspaceAdamW8bit
    from .methods.online_subspace import OnlineSubspaceLion as OnlineSubspaceLion
    from .methods.qgalore import QGaLoreAdamW8bit as QGaLoreAdamW8bit
    from .methods.racs import RacsAdamW as RacsAdamW
    from .methods.relora import ReLoRAAdamW as ReLoRAAdamW
    from .methods.scale import ScaleSGD as ScaleSGD
    from .methods.sltrain import SLTrainAdamW as SLTrainAdamW
    from .methods.sltrain import SLTrainAdamW8bit as SLTrainAdamW8bit
    from .methods.sst import SSTAdamW as SSTAdamW
    from .methods.switchlora import SwitchLoRAAdamW as SwitchLoRAAdamW
else:
    globals().update(_exported())
    __all__ = sorted(
        name
        for name, value in globals().items()
        if getattr(value, "__module__", "").startswith(__name__) and not name.startswith("_")
    )
