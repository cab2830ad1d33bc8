"""Against the numbers of the published program: the encoder without time, and its layers under the published gates."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ssd_torchrec.encoders.tim4rec import TiM4Rec, TiM4RecConfig
from ssd_torchrec.jagged import JaggedLayout
from tests.golden import assert_golden, golden_cases, golden_tensors

NAMES = {  # published name within a layer: ours
    "ssd.in_proj": "mixer.in_proj",
    "ssd.conv1d": "mixer.conv",
    "ssd.dt_bias": "mixer.dt_bias",
    "ssd.A_log": "mixer.A_log",
    "ssd.D": "mixer.D",
    "ssd.norm.weight": "mixer.norm_weight",
    "ssd.out_proj": "mixer.out_proj",
    "layer_norm": "norm",
    "ffn.fc1": "feed_forward.expand",
    "ffn.fc2": "feed_forward.contract",
    "ffn.layer_norm": "feed_forward.norm",
}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


def published(case: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype) -> TiM4Rec:
    """The encoder without time, holding the weights of the case."""
    shape = case["config"]
    config = TiM4RecConfig(
        width=shape["hidden_size"],
        layers=shape["num_layers"],
        expand=shape["expand"],
        head_width=shape["head_dim"],
        state=shape["d_state"],
        taps=shape["d_conv"],
        activation=shape["conv_activation"],
        norm_eps=shape["norm_eps"],
        time_mode="none",
    )
    net = TiM4Rec(config)
    net.load_state_dict(
        {"norm." + end: tensors[f"param.in_layer_norm.{end}"] for end in ("weight", "bias")}, strict=False
    )
    for depth, layer in enumerate(net.layers):
        layer.load_state_dict(_layer_weights(tensors, f"param.ssd_layers.{depth}."))
    return net.to(dtype).eval()


def _layer_weights(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    weights = {}
    for theirs, ours in NAMES.items():
        for name, tensor in tensors.items():
            if name == prefix + theirs or name.startswith(f"{prefix}{theirs}."):
                weights[ours + name.removeprefix(prefix + theirs)] = tensor.squeeze(1) if tensor.ndim == 3 else tensor
    return weights


def jagged(padded: Tensor, lengths: Tensor) -> Tensor:
    """(B, longest, ...) to (T, ...)."""
    return padded[torch.arange(padded.shape[1]) < lengths[:, None]]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", golden_cases("B0"))
def test_without_time_it_is_the_published_encoder(case, dtype):
    if case["config"]["is_time"]:
        pytest.skip("this case has time")
    tensors = golden_tensors(case)
    net, lengths = published(case, tensors, dtype), tensors["input.item_seq_len"]
    events = tensors["param.item_embedding.weight"][jagged(tensors["input.item_seq"], lengths)].to(dtype)
    layout = JaggedLayout.from_lengths(lengths)
    got = net(events, torch.zeros(len(events), dtype=torch.int64), layout)[layout.last_event]
    assert_golden("readout", got, tensors["expected.readout"], TOLERANCE[dtype])


GATED = [case for prefix in ("A", "B04") for case in golden_cases(prefix)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", GATED)
def test_under_the_published_gates_layers_are_the_published_layers(case, dtype):
    if not case["config"]["is_ffn"] or case["mode"] != "eval":
        pytest.skip("not this encoder: no feed-forward, or one draw of dropout")
    tensors = golden_tensors(case)
    net, lengths = published(case, tensors, dtype), tensors["input.item_seq_len"]
    layout = JaggedLayout.from_lengths(lengths)
    x = net.norm(tensors["param.item_embedding.weight"][jagged(tensors["input.item_seq"], lengths)].to(dtype))
    for depth, layer in enumerate(net.layers):
        gate = jagged(tensors[f"expected.time_gate.{depth}"], lengths).to(dtype)
        x, _ = layer(x, gate, layout, None)
        assert_golden(f"layer {depth}", x, jagged(tensors[f"expected.layer_out.{depth}"], lengths), TOLERANCE[dtype])
