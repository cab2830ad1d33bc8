"""Weights to and from the published programs' names; `tests/test_parity.py` says whether they then mean the same."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ssd_torchrec.encoders import mamba4rec, recmamba, ssd4rec, tim4rec
from ssd_torchrec.encoders.encoder import Encoder, EncoderConfig
from ssd_torchrec.encoders.published import ITEM_TABLES, PUBLISHED_NAMES, load_published, published_state
from ssd_torchrec.errors import CheckpointError, ConfigError

TIM4REC = tim4rec.TiM4RecConfig(width=8, head_width=4, state=3, time_mode="none")
CONFIGS: dict[str, EncoderConfig] = {
    "tim4rec-window": replace(TIM4REC, time_mode="window", window_length=5),
    "tim4rec-mix-by-slot": replace(TIM4REC, time_mode="window", window_length=5, mix_by_slot=True, layers=1),
    "tim4rec-no-time": TIM4REC,
    "tim4rec-no-feed-forward": replace(TIM4REC, feed_forward=False),
    "ssd4rec": ssd4rec.SSD4RecConfig(width=8, head_width=4, state=3),
    "ssd4rec-raw": ssd4rec.SSD4RecConfig(width=8, head_width=4, state=3, layers=1, norm_embedding=False),
    "mamba4rec": mamba4rec.Mamba4RecConfig(width=8, state=3, layers=2),
    "recmamba": recmamba.RecMambaConfig(width=8, state=3, max_length=5),
    "recmamba-without-positions": recmamba.RecMambaConfig(width=8, state=3, positions="none"),
}
SMALL = CONFIGS["ssd4rec"]


def names_of(config: EncoderConfig) -> dict[str, str]:
    return PUBLISHED_NAMES[config.title](config)


def built(config: EncoderConfig, seed: int) -> Encoder:
    torch.manual_seed(seed)
    net = config.build()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter)
    return net


def saved(config: EncoderConfig) -> dict[str, Tensor]:
    """A published state: its tensors random, its item table of 7 rows."""
    net, table = built(config, 0), torch.randn(7, config.width)
    return published_state(net, names_of(config), table, ITEM_TABLES[config.title])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_there_and_back_nothing_changes(config):
    state, net = saved(config), built(config, 1)
    table = load_published(net, names_of(config), state)
    again = published_state(net, names_of(config), table, ITEM_TABLES[config.title])
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)
    original = built(config, 0).state_dict()
    assert all(torch.equal(original[name], tensor) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_convolutions_have_the_middle_dimension_of_pytorch(config):
    convolutions = {name: t for name, t in saved(config).items() if "conv1d" in name and name.endswith("weight")}
    assert convolutions
    assert all(tensor.shape[1:] == (1, 4) for tensor in convolutions.values())


def test_the_item_table_comes_back_as_it_came():
    state = saved(SMALL)
    table = load_published(built(SMALL, 1), names_of(SMALL), state)
    assert torch.equal(table, state["item_embedding.weight"])


def test_weights_take_the_dtype_of_the_encoder():
    net = built(SMALL, 1).double()
    load_published(net, names_of(SMALL), saved(SMALL))
    assert {p.dtype for p in net.parameters()} == {torch.float64}


def with_state(**changes: Any) -> dict[str, Tensor]:
    state = saved(SMALL)
    for name, tensor in changes.items():
        if tensor is None:
            del state[name]
        else:
            state[name] = tensor
    return state


REFUSED = {
    "missing": ({"LayerNorm.bias": None}, "LayerNorm.bias missing and none unknown"),
    "unknown": ({"head.weight": torch.ones(1)}, "none missing and head.weight unknown"),
    "no-table": ({"item_embedding.weight": None}, "got item_embedding.weight missing"),
    "shape": ({"LayerNorm.bias": torch.ones(9)}, r"LayerNorm.bias must be \(8,\), got \(9,\)"),
    "flat-conv": (
        {"BiSSD_layers.0.forward_ssd.conv1d.weight": torch.ones(22, 4)},
        r"conv1d.weight must be \(22, 1, 4\), got \(22, 4\)",
    ),
    "narrow-table": (
        {"item_embedding.weight": torch.ones(7, 9)},
        r"item_embedding.weight must be \(V, 8\), got \(7, 9\)",
    ),
    "table-of-numbers": ({"item_embedding.weight": torch.ones(7)}, r"must be \(V, 8\), got \(7,\)"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_the_encoders_is_refused_and_nothing_is_filled(changes, message):
    net = built(SMALL, 1)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_published(net, names_of(SMALL), with_state(**changes))
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_a_table_of_another_width_does_not_go_back_either():
    with pytest.raises(CheckpointError, match=r"item_embedding.weight must be \(V, 8\), got \(7, 9\)"):
        published_state(built(SMALL, 0), names_of(SMALL), torch.ones(7, 9))


def test_names_of_another_config_are_refused():
    one_layer = replace(SMALL, layers=1)
    with pytest.raises(ConfigError, match=r"names must be those of the encoder's parameters, got \['layers\.1\.feed_"):
        load_published(built(SMALL, 1), names_of(one_layer), saved(SMALL))


def test_causal_gates_were_never_published():
    with pytest.raises(ConfigError, match="got time_mode causal; take time_mode window or none"):
        tim4rec.published_names(tim4rec.TiM4RecConfig())
