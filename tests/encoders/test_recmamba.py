from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.parity.case import Case
from benchmarks.parity.mamba import recmamba
from ssd_torchrec.encoders.encoder import StreamingEncoder
from ssd_torchrec.encoders.recmamba import PRESETS, RecMamba, RecMambaConfig, StreamingRecMamba, published_names
from ssd_torchrec.errors import ConfigError, JaggedLayoutError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.ops import selective_scan as scan_door
from ssd_torchrec.ops import selective_triton, short_conv_triton
from ssd_torchrec.ops import short_conv as conv_door
from ssd_torchrec.ops.launch import INTERPRETED
from tests.golden import assert_golden, golden_cases, golden_tensors

ENDED = RecMambaConfig(width=8, state=3, taps=3, max_length=10)
FREE = replace(ENDED, positions="none")
EITHER = pytest.mark.parametrize("config", [ENDED, FREE], ids=["end", "none"])
LENGTHS = [6, 0, 1, 3]


def encoder(config: RecMambaConfig, dtype: torch.dtype = torch.float64) -> RecMamba:
    """In eval mode, with weights so large that whatever is left out shows."""
    torch.manual_seed(0)
    net = config.build().to(dtype).eval()
    for name, parameter in net.named_parameters():
        if parameter.ndim == 2 and not name.endswith("A_log"):
            torch.nn.init.normal_(parameter, std=0.25)
    return net


def streaming(dtype: torch.dtype = torch.float64) -> StreamingRecMamba:
    net = encoder(FREE, dtype)
    assert isinstance(net, StreamingRecMamba)
    return net


def history(lengths: list[int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, JaggedLayout]:
    rng = torch.Generator().manual_seed(1)
    events = torch.randn(sum(lengths), 8, generator=rng, dtype=torch.float64).to(dtype)
    return events, torch.arange(sum(lengths)), JaggedLayout.from_lengths(lengths)


def test_it_is_the_block_diagram():
    net, (events, stamps, layout) = encoder(ENDED), history([3, 0, 2])
    assert net.positions is not None
    places = torch.tensor([7, 8, 9, 8, 9])  # of the newest event, the last there is
    x = 8**0.5 * events + net.positions[places]
    torch.testing.assert_close(net(events, stamps, layout), net.mixer(x, layout)[0])


def test_without_positions_it_is_the_mixer_of_scaled_events():
    net, (events, stamps, layout) = encoder(FREE), history([3, 0, 2])
    assert net.positions is None
    torch.testing.assert_close(net(events, stamps, layout), net.mixer(8**0.5 * events, layout)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@EITHER
def test_which_events_come_later_does_not_reach_back(config, dtype):
    net, (events, stamps, layout) = encoder(config, dtype), history([6, 3], dtype)
    before = net(events, stamps, layout)
    for i in range(1, 6):
        later = events.clone()
        later[i:6] = torch.randn(6 - i, 8)
        after = net(later, stamps, layout)
        assert torch.equal(before[:i], after[:i])
        assert not torch.equal(before[i], after[i])


def test_how_many_events_come_later_reaches_back_where_positions_count_from_the_end():
    """Which makes it no causal encoder: each vector says how far the row's end is, and changes when the row grows."""
    events, stamps, _ = history([6])
    for net in (encoder(ENDED), encoder(FREE)):
        whole = net(events, stamps, JaggedLayout.from_lengths([6]))
        start = net(events[:4], stamps[:4], JaggedLayout.from_lengths([4]))
        assert torch.equal(whole[:4], start) == net.causal
        assert net.causal == (net.config.positions == "none")


@EITHER
def test_time_makes_no_difference(config):
    net, (events, stamps, layout) = encoder(config), history(LENGTHS)
    assert torch.equal(net(events, stamps, layout), net(events, 10**9 - stamps, layout))
    assert not config.reads_time


def test_a_user_of_the_published_size_takes_4480_numbers():
    state = StreamingRecMamba(RecMambaConfig(positions="none")).initial_state(1)
    assert sum(t.numel() for t in state) == 4_480
    assert {t.dtype for t in state} == {torch.float32}


def test_the_kernels_give_what_the_cpu_gives(device, monkeypatch):
    net, (events, stamps, layout) = encoder(ENDED, torch.float32), history(LENGTHS, torch.float32)

    def results(net: RecMamba, events: Tensor, stamps: Tensor, layout: JaggedLayout) -> list[Tensor]:
        out = net(events, stamps, layout)
        return [out, *torch.autograd.grad(out.sum(), [*net.parameters()])]

    wanted = results(net, events, stamps, layout)
    if INTERPRETED:  # the doors of a CPU tensor lead to the kernels, which cut rows of few events
        monkeypatch.setattr(scan_door, "selective_scan_stepped", selective_triton.selective_scan_triton)
        monkeypatch.setattr(conv_door, "short_conv_stream", short_conv_triton.short_conv_triton)
        monkeypatch.setattr(selective_triton, "CHUNK", 2)
        monkeypatch.setattr(short_conv_triton, "RUN", 2)
    got = results(net.to(device), events.to(device), stamps.to(device), layout.to(device))
    for ours, cpu in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours.cpu(), cpu, atol=2e-5 * (1 + cpu.abs().max().item()), rtol=0)


def test_dropout_is_of_events_with_their_positions():
    net, (events, stamps, layout) = encoder(replace(ENDED, dropout=0.5)).train(), history([3, 2])
    assert net.positions is not None
    torch.manual_seed(0)
    x = net.dropout(8**0.5 * events + net.positions[torch.tensor([7, 8, 9, 8, 9])])
    torch.manual_seed(0)
    torch.testing.assert_close(net(events, stamps, layout), net.mixer(x, layout)[0])
    assert (x == 0).any()


def test_the_published_start_forgets_at_one_rate_and_mambas_at_many():
    torch.manual_seed(0)
    published, mamba = (RecMambaConfig(init=init, max_length=50).build() for init in ("published", "mamba"))
    rates = {net.config.init: net.mixer.A_log.exp() for net in (published, mamba)}
    torch.testing.assert_close(rates["mamba"], torch.arange(1.0, 33).repeat(128, 1))
    assert 0.9 < rates["published"].mean() < 1.1
    assert 0.5 < rates["published"].min() < rates["published"].max() < 2
    mixer = published.mixer
    stds = {mixer.A_log: 160, mixer.conv.weight: 516, mixer.in_proj.weight: 320, published.positions: 114}
    for parameter, fans in stds.items():  # in and out
        assert parameter.std().item() == pytest.approx((2 / fans) ** 0.5, rel=0.1)
    for net in (published, mamba):
        step = F.softplus(net.mixer.dt_bias)
        assert 1e-3 <= step.min() < step.max() <= 0.1
        assert (net.mixer.D == 1).all()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_published_block_and_its_positions(name):
    config = PRESETS[name]
    net = config.build()
    assert not isinstance(net, StreamingEncoder)
    assert (net.width, net.causal, config.causal, config.streams) == (64, False, False, False)
    assert sum(p.numel() for p in net.parameters()) == 38_784 + 64 * config.length_cap


def test_without_positions_it_streams_rows_of_any_length():
    config = RecMambaConfig(positions="none")
    assert isinstance(config.build(), StreamingEncoder)
    assert (config.causal, config.streams, config.length_cap) == (True, True, 0)


REFUSED = {
    "no-state": ({"state": 0}, "state must be at least 1, got 0"),
    "no-length": ({"max_length": 0}, "max_length must be at least 1, got 0; raise it, or take positions none"),
    "percent": ({"dropout": 20.0}, r"dropout must be in \[0, 1\), got 20.0; it is a share, not percent"),
    "positions": ({"positions": "start"}, "positions must be end or none, got 'start'"),
    "start": ({"init": "xavier"}, "init must be published or mamba, got 'xavier'"),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED)
def test_what_makes_no_encoder_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        RecMambaConfig(**fields)


def test_a_row_without_room_is_refused():
    net = encoder(ENDED)
    assert net(*history([10])).isfinite().all()
    with pytest.raises(JaggedLayoutError, match="rows must have at most 10 events, got one of 11; keep the newest 10"):
        net(*history([2, 11]))


@EITHER
def test_every_parameter_has_a_published_name(config):
    names = published_names(config)
    assert names.keys() == dict(config.build().named_parameters()).keys()
    assert len(set(names.values())) == len(names)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", golden_cases("E"))
def test_it_is_the_published_encoder(case, dtype):
    computed = recmamba(Case(case, golden_tensors(case)), dtype)
    is_fp64 = dtype == torch.float64
    for name, ours, theirs in computed.outputs:
        assert ours.dtype == dtype
        assert_golden(name, ours, theirs, 1e-9 if is_fp64 else 1e-5)
    for name, ours, theirs in computed.gradients:
        assert_golden(f"gradient of {name}", ours, theirs, 1e-8 if is_fp64 else 1e-4)
    assert bool(computed.gradients) == case["case"].endswith("_grad")
