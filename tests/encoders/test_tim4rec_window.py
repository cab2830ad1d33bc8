"""TiM4Rec with the published time branch, and without a feed-forward or without time as the paper's ablations."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_torchrec.encoders.tim4rec import PRESETS, TiM4Rec, TiM4RecConfig
from ssd_torchrec.errors import ConfigError, JaggedLayoutError
from ssd_torchrec.jagged import JaggedLayout

CONFIG = TiM4RecConfig(width=8, head_width=4, state=3, taps=3, time_mode="window", window_length=6)
LENGTHS = [6, 0, 1, 4]


def encoder(config: TiM4RecConfig = CONFIG, dtype: torch.dtype = torch.float64) -> TiM4Rec:
    """In eval mode, with gates that matter."""
    torch.manual_seed(0)
    net = config.build().to(dtype).eval()
    for name, parameter in net.named_parameters():
        if name.startswith("time.") or parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    return net


def history(lengths: list[int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, JaggedLayout]:
    rng = torch.Generator().manual_seed(1)
    events = torch.randn(sum(lengths), 8, generator=rng, dtype=torch.float64).to(dtype)
    gaps_s = torch.randn(sum(lengths), generator=rng, dtype=torch.float64).mul(4).add(8).exp().long()
    return events, 1_600_000_000 + gaps_s.cumsum(0), JaggedLayout.from_lengths(lengths)


def test_it_has_the_published_number_of_parameters():
    net = PRESETS["window-kuairand-64d"].build()
    assert sum(p.numel() for p in net.parameters()) + 7112 * 64 == 593_498


def test_times_of_later_events_reach_back_but_later_events_do_not():
    """The leak of the published branch: why one row must have one target, outside of it."""
    net, (events, stamps, layout) = encoder(), history([6])
    before, moved, other = net(events, stamps, layout), stamps.clone(), events.clone()
    moved[5] += 100_000
    other[5] = torch.randn(8)
    assert (before[:5] != net(events, moved, layout)[:5]).any(1).all()
    after = net(other, stamps, layout)
    assert torch.equal(before[:5], after[:5])
    assert not torch.equal(before[5], after[5])


def test_a_batch_gives_what_its_rows_give_alone():
    net, (events, stamps, layout) = encoder(), history(LENGTHS)
    rows = zip(events.split(LENGTHS), stamps.split(LENGTHS), LENGTHS, strict=True)
    alone = [net(e, t, JaggedLayout.from_lengths([n])) for e, t, n in rows]
    torch.testing.assert_close(net(events, stamps, layout), torch.cat(alone), atol=1e-10, rtol=0)


def test_rows_may_come_in_any_order():
    net, (events, stamps, layout), order = encoder(), history(LENGTHS), [3, 1, 0, 2]
    out = net(events, stamps, layout).split(LENGTHS)
    events, stamps = (torch.cat([t.split(LENGTHS)[row] for row in order]) for t in (events, stamps))
    got = net(events, stamps, JaggedLayout.from_lengths([LENGTHS[row] for row in order]))
    torch.testing.assert_close(got, torch.cat([out[row] for row in order]), atol=1e-10, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("lengths", [LENGTHS, [0, 0], []], ids=str)
def test_every_parameter_gets_a_gradient(lengths, dtype):
    net, (events, stamps, layout) = encoder(dtype=dtype).train(), history(lengths, dtype)
    out = net(events, stamps, layout)
    assert out.shape == events.shape
    (out * torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)).sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if not name.startswith("time.mixes.1."):  # nothing reads the last one, as published
            assert bool(parameter.grad.any()) == bool(sum(lengths)), name


def test_steps_start_as_published():
    torch.manual_seed(0)
    mixer = replace(CONFIG, width=64, head_width=1).build().layers[0].mixer
    steps = F.softplus(mixer.dt_bias)
    assert 1e-3 <= steps.min() < steps.max() <= 0.1
    assert not mixer.in_proj.bias.any()


def test_autocast_leaves_the_time_branch_alone():
    net, (events, stamps, layout) = encoder(dtype=torch.float32), history(LENGTHS, torch.float32)
    wanted, gates = net(events, stamps, layout), net.time(stamps, layout)
    with torch.autocast("cpu", torch.bfloat16):
        got, within = net(events, stamps, layout), net.time(stamps, layout)
    assert all(map(torch.equal, gates, within))
    torch.testing.assert_close(got.float(), wanted, atol=0.15, rtol=0)


def test_float32_timestamps_round_seconds_away():
    events, _, layout = history([6])
    stamps = 1_600_000_000 + torch.tensor([0, 128, 1280, 1290, 1300, 2560])
    exact, rounded = (encoder(replace(CONFIG, float32_timestamps=on))(events, stamps, layout) for on in (False, True))
    assert not torch.equal(exact, rounded)


def test_what_a_run_has_to_know_of_it():
    assert (CONFIG.causal, CONFIG.streams, CONFIG.reads_time, CONFIG.length_cap) == (False, False, True, 6)
    assert not CONFIG.build().causal
    assert CONFIG.with_gaps(1.0, 2.0) == CONFIG


def test_it_does_not_stream():
    net, (events, stamps, layout) = encoder(), history([3])
    state = encoder(replace(CONFIG, time_mode="none", window_length=0)).initial_state(1)
    with pytest.raises(ConfigError, match="goes on from a state, got time_mode window"):
        net.initial_state(1)
    with pytest.raises(ConfigError, match="goes on from a state, got time_mode window"):
        net.append(events, stamps, layout, state)


def test_a_row_longer_than_the_window_is_refused():
    with pytest.raises(JaggedLayoutError, match="at most the 6 events of the window, got one of 7"):
        encoder()(*history([3, 7]))


REFUSED = {
    "window-without-slots": ({"time_mode": "window"}, "window_length must be at least 1 under time_mode window"),
    "slots-without-window": ({"window_length": 50}, "0 under others, got 50 under causal"),
    "mix-without-window": ({"mix_by_slot": True}, "mix_by_slot and float32_timestamps must be off without a window"),
    "rounding-without-window": ({"float32_timestamps": True}, "must be off without a window.*take time_mode window"),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED)
def test_a_window_is_all_or_nothing(fields, message):
    with pytest.raises(ConfigError, match=message):
        TiM4RecConfig(**fields)


def test_without_feed_forward_a_layer_is_mixer_and_norm():
    net, (events, stamps, layout) = encoder(replace(CONFIG, feed_forward=False, layers=1)), history(LENGTHS)
    assert not any("feed_forward" in name for name, _ in net.named_parameters())
    (layer,), gates = net.layers, net.time(stamps, layout)
    mixed, _ = layer.mixer(net.norm(events), gates[0], layout)
    torch.testing.assert_close(net(events, stamps, layout), layer.norm(mixed))


def test_ssd4rec_star_is_tim4rec_without_time_and_starts_plain_on_ml_1m():
    for data, start in {"ml-1m": "uniform", "beauty": "uniform", "kuairand": "uniform"}.items():
        star, timed = PRESETS[f"ssd4rec-star-{data}-64d"], PRESETS[f"{data}-64d"]
        assert star == replace(timed, time_mode="none", conv_init=start)
        assert star.build().time is None
    assert PRESETS["ml-1m-64d"].conv_init == "kaiming"


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("window-")])
def test_a_window_preset_is_the_published_layer(name):
    config = PRESETS[name]
    slots, heads, taps = config.window_length, 4, 4
    mix = slots * (slots + 1) if config.mix_by_slot else slots + 1
    of_time = 2 * slots * (slots + 1) + 2 * heads * (taps + 1) + mix + 2 * slots
    assert sum(p.numel() for p in config.build().layers.parameters()) == config.layers * 63_760
    assert sum(p.numel() for p in config.build().time.parameters()) == config.layers * of_time + 2 * slots
