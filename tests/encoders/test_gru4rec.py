from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ssd_torchrec.encoders import gru4rec as module
from ssd_torchrec.encoders.encoder import StreamingEncoder
from ssd_torchrec.encoders.gru4rec import PRESETS, GRU4Rec, GRU4RecConfig, GRU4RecState
from ssd_torchrec.errors import ConfigError
from ssd_torchrec.jagged import JaggedLayout

CONFIG = GRU4RecConfig(width=8, layers=2, hidden=5)


def encoder(config: GRU4RecConfig = CONFIG, dtype: torch.dtype = torch.float64) -> GRU4Rec:
    """In eval mode, with weights that matter, so that whatever is left out shows."""
    torch.manual_seed(0)
    net = config.build().to(dtype).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return net


def history(lengths: list[int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, JaggedLayout]:
    rng = torch.Generator().manual_seed(1)
    events = torch.randn(sum(lengths), 8, generator=rng, dtype=torch.float64).to(dtype)
    return events, torch.arange(sum(lengths)) * 100, JaggedLayout.from_lengths(lengths)


def step(unit: torch.nn.GRU, x: Tensor, hidden: Tensor) -> Tensor:
    """One step of one row, as PyTorch documents its unit."""
    given = (unit.weight_ih_l0 @ x + unit.bias_ih_l0).chunk(3)
    past = (unit.weight_hh_l0 @ hidden + unit.bias_hh_l0).chunk(3)
    reset, update = ((a + b).sigmoid() for a, b in zip(given[:2], past[:2], strict=True))
    new = (given[2] + reset * past[2]).tanh()
    return (1 - update) * new + update * hidden


@pytest.mark.parametrize("layers", [1, 2])
def test_it_is_a_unit_on_top_of_another(layers):
    net = encoder(replace(CONFIG, layers=layers))
    events, stamps, layout = history([5])
    x = events
    for unit in net.units:
        hidden, outputs = torch.zeros(5).double(), []
        for event in x:
            hidden = step(unit, event, hidden)
            outputs.append(hidden)
        x = torch.stack(outputs)
    torch.testing.assert_close(net(events, stamps, layout), net.out_proj(x), atol=1e-12, rtol=0)


def test_training_and_inference_run_the_same_unit():
    net, args = encoder(), history([3, 0, 6, 1, 3])
    events, stamps, layout = args
    state = GRU4RecState(torch.randn(5, 2, 5).double())
    out, after = net.append(events, stamps, layout, state)
    with torch.no_grad():
        packed, packed_after = net.append(events, stamps, layout, state)
    torch.testing.assert_close(out, packed, atol=1e-12, rtol=0)
    torch.testing.assert_close(after.hidden, packed_after.hidden, atol=1e-12, rtol=0)


def test_steps_take_the_longest_rows_first():
    steps = module._steps_of(JaggedLayout.from_lengths([1, 0, 3]))
    assert steps.order.tolist() == [1, 0, 2, 3]
    assert steps.rows.tolist() == [2, 0]
    assert steps.rows_at.tolist() == [2, 1, 1]


def test_autocast_stays_close():
    net, args = encoder(dtype=torch.float32), history([5, 3], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = net(*args)
    torch.testing.assert_close(got.float(), net(*args), atol=0.15, rtol=0)


def test_it_streams_and_takes_rows_of_any_length():
    assert isinstance(encoder(), StreamingEncoder)
    assert (CONFIG.causal, CONFIG.streams, CONFIG.reads_time, CONFIG.length_cap) == (True, True, False, 0)


PUBLISHED = {"ml-1m-64d": 0.2, "beauty-64d": 0.4}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_is_the_published_size(name):
    config = PRESETS[name]
    assert config.dropout == PUBLISHED[name]
    unit = 3 * 128 * (64 + 128 + 2)
    assert sum(p.numel() for p in config.build().parameters()) == unit + 128 * 64 + 64


REFUSED = {
    "no-layers": ({"layers": 0}, "layers must be at least 1, got 0"),
    "no-state": ({"hidden": 0}, "hidden must be at least 1, got 0"),
    "percent": ({"dropout": 20.0}, r"dropout must be in \[0, 1\), got 20.0; it is a share, not percent"),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED)
def test_what_makes_no_encoder_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        GRU4RecConfig(**fields)
