from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.parity.case import Case
from benchmarks.parity.mamba import mamba4rec
from ssd_torchrec.encoders.encoder import StreamingEncoder
from ssd_torchrec.encoders.mamba4rec import PRESETS, Mamba4Rec, Mamba4RecConfig, published_names
from ssd_torchrec.errors import ConfigError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.modules.mamba_mixer import MambaMixer
from ssd_torchrec.ops import selective_scan as scan_door
from ssd_torchrec.ops import selective_triton, short_conv_triton
from ssd_torchrec.ops import short_conv as conv_door
from ssd_torchrec.ops.launch import INTERPRETED
from tests.golden import assert_golden, golden_cases, golden_tensors

CONFIG = Mamba4RecConfig(width=8, state=3, taps=3)
LENGTHS = [6, 0, 1, 3]
LAYERS = pytest.mark.parametrize("layers", [1, 2])


def encoder(config: Mamba4RecConfig = CONFIG, dtype: torch.dtype = torch.float64) -> Mamba4Rec:
    """In eval mode, with weights so large that whatever is left out shows."""
    torch.manual_seed(0)
    net = config.build().to(dtype).eval()
    for name, parameter in net.named_parameters():
        if parameter.ndim == 2 and not name.endswith("A_log"):
            torch.nn.init.normal_(parameter, std=0.5)
    return net


def history(lengths: list[int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, JaggedLayout]:
    rng = torch.Generator().manual_seed(1)
    events = torch.randn(sum(lengths), 8, generator=rng, dtype=torch.float64).to(dtype)
    return events, torch.arange(sum(lengths)), JaggedLayout.from_lengths(lengths)


@LAYERS
def test_it_is_the_block_diagram(layers):
    net, (events, stamps, layout) = encoder(replace(CONFIG, layers=layers)), history(LENGTHS)
    x = F.layer_norm(events, (8,), eps=1e-12)
    layers_of_net: Any = net.layers
    for layer in layers_of_net:
        mixed = layer.mixer(x, layout)[0] + (x if layers > 1 else 0)
        r = F.layer_norm(mixed, (8,), eps=1e-12)
        hidden = F.gelu(r @ layer.feed_forward.expand.weight.T) @ layer.feed_forward.contract.weight.T
        x = F.layer_norm(hidden + r, (8,), eps=1e-12)
    torch.testing.assert_close(net(events, stamps, layout), x)


def test_time_makes_no_difference():
    net, (events, stamps, layout) = encoder(), history(LENGTHS)
    assert torch.equal(net(events, stamps, layout), net(events, 10**9 - stamps, layout))
    assert not CONFIG.reads_time


def test_a_user_of_the_published_size_takes_4480_numbers():
    state = PRESETS["ml-1m-64d"].build().initial_state(1)
    assert sum(t.numel() for t in state) == 4_480
    assert {t.dtype for t in state} == {torch.float32}


def test_the_kernels_give_what_the_cpu_gives(device, monkeypatch):
    net, (events, stamps, layout) = encoder(replace(CONFIG, layers=2), torch.float32), history(LENGTHS, torch.float32)

    def results(net: Mamba4Rec, events: Tensor, stamps: Tensor, layout: JaggedLayout) -> list[Tensor]:
        out = net(events, stamps, layout)
        signs = torch.ones_like(out).cumsum(0).remainder(3) - 1
        return [out, *torch.autograd.grad((out * signs).sum(), [*net.parameters()])]

    wanted = results(net, events, stamps, layout)
    if INTERPRETED:  # the doors of a CPU tensor lead to the kernels, which cut rows of few events
        monkeypatch.setattr(scan_door, "selective_scan_stepped", selective_triton.selective_scan_triton)
        monkeypatch.setattr(conv_door, "short_conv_stream", short_conv_triton.short_conv_triton)
        monkeypatch.setattr(selective_triton, "CHUNK", 2)
        monkeypatch.setattr(short_conv_triton, "RUN", 2)
    got = results(net.to(device), events.to(device), stamps.to(device), layout.to(device))
    for ours, cpu in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours.cpu(), cpu, atol=2e-5 * (1 + cpu.abs().max().item()), rtol=0)


def test_a_published_layer_has_72128_parameters():
    one, two = (Mamba4Rec(Mamba4RecConfig(layers=layers)) for layers in (1, 2))
    sizes = [sum(p.numel() for p in net.parameters()) for net in (one, two)]
    assert sizes == [72_128 + 128, 2 * 72_128 + 128]


def test_the_published_start_forgets_within_events_and_mambas_does_not():
    torch.manual_seed(0)
    published, mamba = (mixer_of(replace(CONFIG, width=64, init=init)) for init in ("published", "mamba"))
    torch.testing.assert_close(F.softplus(published.dt_bias), torch.full((128,), 0.6931472))
    step = F.softplus(mamba.dt_bias)
    assert 1e-3 <= step.min() < step.max() <= 0.1
    for linear in (published.in_proj, published.x_proj, published.dt_proj, published.out_proj):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1)
    torch.testing.assert_close(published.A_log.exp(), torch.arange(1.0, 4).repeat(128, 1))
    assert published.conv.weight.std().item() == pytest.approx(1 / 3, rel=0.1)  # uniform within 1/sqrt(3)


def mixer_of(config: Mamba4RecConfig) -> MambaMixer:
    mixer = config.build().get_submodule("layers.0.mixer")
    assert isinstance(mixer, MambaMixer)
    return mixer


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_what_they_say(name):
    config = PRESETS[name]
    net = config.build()
    assert isinstance(net, StreamingEncoder)
    assert (config.causal, config.streams, config.length_cap) == (True, True, 0)
    assert (net.width, net.causal, len(net.layers)) == (64, True, config.layers)


REFUSED = {
    "no-layers": ({"layers": 0}, "layers must be at least 1, got 0"),
    "no-state": ({"state": 0}, "state must be at least 1, got 0"),
    "percent": ({"dropout": 20.0}, r"dropout must be in \[0, 1\), got 20.0; it is a share, not percent"),
    "no-epsilon": ({"norm_eps": 0.0}, "norm_eps must be above 0"),
    "start": ({"init": "xavier"}, "init must be published or mamba, got 'xavier'"),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED)
def test_what_makes_no_encoder_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        Mamba4RecConfig(**fields)


@LAYERS
def test_every_parameter_has_a_published_name(layers):
    config = replace(CONFIG, layers=layers)
    names = published_names(config)
    assert names.keys() == dict(config.build().named_parameters()).keys()
    assert len(set(names.values())) == len(names)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", golden_cases("D"))
def test_it_is_the_published_encoder(case, dtype):
    computed = mamba4rec(Case(case, golden_tensors(case)), dtype)
    is_fp64 = dtype == torch.float64
    for name, ours, theirs in computed.outputs:
        assert ours.dtype == dtype
        assert_golden(name, ours, theirs, 1e-9 if is_fp64 else 1e-5)
    for name, ours, theirs in computed.gradients:
        assert_golden(f"gradient of {name}", ours, theirs, 1e-8 if is_fp64 else 1e-4)
    assert bool(computed.gradients) == case["case"].endswith("_grad")
