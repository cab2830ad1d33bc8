from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_torchrec.encoders.encoder import StreamingEncoder
from ssd_torchrec.encoders.lrurec import PRESETS, LinearRecurrentUnit, LRURec, LRURecConfig
from ssd_torchrec.errors import ConfigError
from ssd_torchrec.jagged import JaggedLayout

CONFIG = LRURecConfig(width=8)
LENGTHS = [6, 0, 1, 3]
LAYERS = pytest.mark.parametrize("layers", [1, 2])


def encoder(config: LRURecConfig = CONFIG, dtype: torch.dtype = torch.float64) -> LRURec:
    """In eval mode, with weights so large that whatever is left out shows."""
    torch.manual_seed(0)
    net = config.build().to(dtype).eval()
    for parameter in net.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    return net


def history(lengths: list[int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, JaggedLayout]:
    rng = torch.Generator().manual_seed(1)
    events = torch.randn(sum(lengths), 8, generator=rng, dtype=torch.float64).to(dtype)
    return events, torch.arange(sum(lengths)), JaggedLayout.from_lengths(lengths)


def test_the_unit_is_the_complex_recurrence_written_out():
    torch.manual_seed(0)
    unit, x = LinearRecurrentUnit(CONFIG).double(), history([5])[0]
    torch.nn.init.normal_(unit.in_proj.bias)
    torch.nn.init.normal_(unit.out_proj.bias)
    decay = torch.exp(torch.complex(-unit.nu_log.exp(), unit.theta_log.exp()))
    into = torch.complex(unit.in_proj.weight[::2], unit.in_proj.weight[1::2])  # (N, D)
    bias = torch.complex(unit.in_proj.bias[::2], unit.in_proj.bias[1::2])
    out_of = torch.complex(unit.out_proj.weight[:, ::2], -unit.out_proj.weight[:, 1::2])  # (D, N)
    h, y = torch.zeros(16, dtype=torch.complex128), []
    for event in x:
        h = decay * h + unit.gamma_log.exp() * (into @ event.to(torch.complex128) + bias)
        y.append((out_of @ h).real + unit.out_proj.bias)
    torch.testing.assert_close(unit(x, JaggedLayout.from_lengths([5]), None)[0], torch.stack(y))


@LAYERS
def test_it_is_the_block_diagram(layers):
    net, (events, stamps, layout) = encoder(replace(CONFIG, layers=layers)), history(LENGTHS)
    x = F.layer_norm(events, (8,))
    layers_of_net: Any = net.layers
    for layer in layers_of_net:
        r = F.layer_norm(layer.recurrence(x, layout, None)[0] + x, (8,))
        hidden = F.gelu(r @ layer.feed_forward.expand.weight.T) @ layer.feed_forward.contract.weight.T
        x = F.layer_norm(hidden + r, (8,))
    torch.testing.assert_close(net(events, stamps, layout), x)


def test_time_makes_no_difference():
    net, (events, stamps, layout) = encoder(), history(LENGTHS)
    assert torch.equal(net(events, stamps, layout), net(events, 10**9 - stamps, layout))
    assert not CONFIG.reads_time


def test_a_user_of_the_published_size_takes_512_numbers():
    state = PRESETS["64d"].build().initial_state(1)
    assert (state.hidden.shape, state.hidden.dtype) == ((1, 2, 128, 2), torch.float32)


def test_fp32_gives_the_gradients_of_fp64():
    gradients = []
    for dtype in (torch.float32, torch.float64):
        net, (events, stamps, layout) = encoder().to(dtype), history([19, 0, 1, 4], dtype)
        signs = torch.arange(events.numel(), dtype=dtype).view_as(events) % 3 - 1
        gradients.append(torch.autograd.grad((net(events, stamps, layout) * signs).sum(), [*net.parameters()]))
    for narrow, wide in zip(*gradients, strict=True):
        torch.testing.assert_close(narrow.double(), wide, atol=2e-5 * (1 + wide.abs().max().item()), rtol=0)


def test_the_recurrence_stays_fp32_under_autocast():
    net, (events, stamps, layout) = encoder(dtype=torch.float32), history([5, 3], torch.float32)
    wanted = net(events, stamps, layout)
    with torch.autocast("cpu", torch.bfloat16):
        got, state = net.append(events, stamps, layout, net.initial_state(2))
        got.float().sum().backward()
    assert state.hidden.dtype == torch.float32
    torch.testing.assert_close(got.float(), wanted, atol=0.15, rtol=0)


def test_decays_start_on_the_ring_and_states_with_the_variance_of_what_enters():
    torch.manual_seed(0)
    unit = LinearRecurrentUnit(LRURecConfig(width=500))
    decay = unit.decay().detach()
    assert 0.8 <= decay.abs().min() < 0.81
    assert 0.98 < decay.abs().max() <= 0.99
    assert decay.mean().abs() < 0.1  # all around
    torch.testing.assert_close(unit.gamma_log.exp().square(), 1 - decay.abs().square())
    for linear in (unit.in_proj, unit.out_proj):
        assert linear.weight.abs().max() <= 0.04
        assert linear.weight.std().item() == pytest.approx(0.0176, rel=0.02)  # 0.02, cut off at two deviations
        assert not linear.bias.any()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_what_they_say(name):
    config = PRESETS[name]
    net = config.build()
    assert isinstance(net, StreamingEncoder)
    assert (config.causal, config.streams, config.length_cap) == (True, True, 0)
    assert (net.width, net.causal, len(net.layers)) == (64, True, 2)
    of_recurrence = 64 * 256 + 256 + 256 * 64 + 64 + 3 * 128
    assert sum(p.numel() for p in net.parameters()) == 2 * (of_recurrence + 128 + 33_216) + 128


REFUSED = {
    "no-layers": ({"layers": 0}, "layers must be at least 1, got 0"),
    "percent": ({"dropout": 20.0}, r"dropout must be in \[0, 1\), got 20.0; it is a share, not percent"),
    "certain-dropout": ({"recurrence_dropout": 1.0}, r"recurrence_dropout must be in \[0, 1\)"),
    "no-ring": ({"fastest": 0.99}, "0 < fastest < slowest < 1 must hold, got 0.99 and 0.99"),
    "never-forgets": ({"slowest": 1.0}, "0 < fastest < slowest < 1 must hold, got 0.8 and 1.0"),
    "no-epsilon": ({"norm_eps": 0.0}, "norm_eps must be above 0"),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED)
def test_what_makes_no_encoder_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        LRURecConfig(**fields)
