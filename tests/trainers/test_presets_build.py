"""Each method's preset at each size is one that the method accepts."""

from __future__ import annotations

import pytest
import torch
from representative import with_representative

from lowrank.optimizers import available, expected_state_bytes
from lowrank.trainers.config_io import from_mapping
from lowrank.trainers.models import network_config
from lowrank.trainers.preset import preset_layer, preset_names
from lowrank.trainers.pretrain import resolve

#: Between these, sizes differ in numbers alone.
SIZES = with_representative(preset_names(), ("llama_1m", "llama_60m", "llama_7b"), marks=())


@pytest.mark.parametrize("size", SIZES)
def test_presets_are_accepted(size: str) -> None:
    transformers = pytest.importorskip("transformers")
    for name in available():
        config = from_mapping(preset_layer(size, name))
        with torch.device("meta"):
            shape = network_config(config.model, config.data.sequence_length)
            shape.num_hidden_layers = 1  # all layers are alike
            network = transformers.LlamaForCausalLM(shape)
        options = dict(config.optimizer.options)
        assert expected_state_bytes(name, network, lr=config.optimizer.lr, **options) > 0


@pytest.mark.parametrize("size", SIZES)
def test_every_method_has_a_preset(size: str) -> None:
    default = preset_layer(size, "no such method")
    for name in available():
        if size == "llama_1m" or (size == "llama_9m" and name in ("adafactor", "muon")):
            continue  # the size's own settings suit them
        assert preset_layer(size, name)["optimizer"].keys() > default["optimizer"].keys(), name


def test_settings_override_a_preset_under_either_name() -> None:
    for key in ("update_interval", "update_proj_gap"):
        settings = {"optimizer": {"name": "coap_adamw", key: 7}}
        options = resolve(settings).optimizer.options
        assert options["update_proj_gap"] == 7
        assert "update_interval" not in options
    both = {"name": "fira_adamw", "alpha": 0.5, "scale": 0.5}
    with pytest.raises(ValueError, match=r"optimizer\.alpha with optimizer\.scale"):
        resolve({"optimizer": both})
