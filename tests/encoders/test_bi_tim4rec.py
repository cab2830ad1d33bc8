from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ssd_torchrec.encoders.bi_tim4rec import PRESETS, BiTiM4Rec, BiTiM4RecConfig
from ssd_torchrec.errors import ConfigError, JaggedLayoutError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.modules.time_gate import TimeGate, TimeGateConfig, TimeGateState

CONFIG = BiTiM4RecConfig(width=8, head_width=4, state=3, taps=3, time_hidden=5)
MODES = ["both", "none"]
LENGTHS = [5, 0, 1, 3]


def encoder(config: BiTiM4RecConfig = CONFIG, dtype: torch.dtype = torch.float64) -> BiTiM4Rec:
    """In eval mode, with gates and ends of rows that matter."""
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


def turned(events: Tensor, lengths: list[int]) -> Tensor:
    return torch.cat([row.flip(0) for row in events.split(lengths)])


def test_the_way_back_is_the_branch_of_turned_rows_whose_clock_runs_backwards():
    net, (_, stamps, layout) = encoder(), history(LENGTHS)
    mirrored = encoder()
    mirrored.time.ahead.load_state_dict(net.time.back.state_dict())
    mirrored.time.signal.first.data.copy_(net.time.next_signal.last)
    got = [gate[:, 1] for gate in net.time(stamps, layout)]
    ahead = [gate[:, 0] for gate in mirrored.time(-turned(stamps, LENGTHS), layout)]
    for one, other in zip(got, ahead, strict=True):
        torch.testing.assert_close(one, turned(other, LENGTHS), atol=1e-12, rtol=0)


def test_a_gate_ahead_follows_the_gaps_behind_an_event_and_a_gate_back_those_before_it():
    net, (_, stamps, layout) = encoder(), history([5])
    moved = stamps + torch.tensor([0, 0, 86_400, 86_400, 86_400])  # the gap between events 1 and 2
    for before, after in zip(net.time(stamps, layout), net.time(moved, layout), strict=True):
        changed = (before != after).any(2)  # (T, 2)
        assert not changed[:2, 0].any()
        assert changed[2, 0]
        assert changed[1, 1]
        assert not changed[2:, 1].any()


def test_a_reversed_gate_cannot_stream():
    gate, layout = TimeGate(TimeGateConfig(heads=2, reverse=True)), JaggedLayout.from_lengths([2])
    with pytest.raises(ConfigError, match="reverse must come without a tail"):
        gate(torch.ones(2, 2), layout, TimeGateState(torch.zeros(1, 3, 2), torch.zeros(1, 3, 2)))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_a_batch_gives_what_its_rows_give_alone(mode, layers):
    net, (events, stamps, layout) = encoder(replace(CONFIG, time_mode=mode, layers=layers)), history(LENGTHS)
    rows = zip(events.split(LENGTHS), stamps.split(LENGTHS), LENGTHS, strict=True)
    alone = [net(e, t, JaggedLayout.from_lengths([n])) for e, t, n in rows]
    torch.testing.assert_close(net(events, stamps, layout), torch.cat(alone), atol=1e-10, rtol=0)


def test_rows_may_come_in_any_order():
    net, (events, stamps, layout), order = encoder(), history(LENGTHS), [3, 1, 0, 2]
    out = net(events, stamps, layout).split(LENGTHS)
    events, stamps = (torch.cat([t.split(LENGTHS)[row] for row in order]) for t in (events, stamps))
    got = net(events, stamps, JaggedLayout.from_lengths([LENGTHS[row] for row in order]))
    torch.testing.assert_close(got, torch.cat([out[row] for row in order]), atol=1e-10, rtol=0)


def test_an_event_knows_all_of_its_row_and_nothing_else():
    """What follows an event shows: targets must lie outside of the row."""
    net, (events, stamps, layout) = encoder(replace(CONFIG, layers=1)), history(LENGTHS)
    jacobian = torch.autograd.functional.jacobian(lambda e: net(e, stamps, layout), events)  # (T, D, T, D)
    knows = (jacobian != 0).any(3).any(1)
    assert torch.equal(knows, layout.row_of_event[:, None] == layout.row_of_event)


@pytest.mark.parametrize("mode", MODES)
def test_every_gap_reaches_every_event_of_its_row_where_the_mode_says(mode):
    net, (events, stamps, layout) = encoder(replace(CONFIG, time_mode=mode)), history([4, 2])
    before = net(events, stamps, layout)
    for longer in range(1, 4):
        moved = stamps + 86_400 * ((torch.arange(6) >= longer) & (torch.arange(6) < 4))
        after = net(events, moved, layout)
        assert ((before[:4] != after[:4]).any(1) == (mode == "both")).all()
        assert torch.equal(before[4:], after[4:])


def test_only_gaps_matter_not_the_date():
    net, (events, stamps, layout) = encoder(), history([4, 2])
    assert torch.equal(net(events, stamps, layout), net(events, stamps + 10**9, layout))


BATCHES = {"events": [3, 0, 2], "one-event": [1], "only-empty-rows": [0, 0], "no-rows": []}


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_parameter_gets_a_gradient(dtype, layers, mode, lengths):
    net = encoder(replace(CONFIG, layers=layers, time_mode=mode), dtype).train()
    events, stamps, layout = history(lengths, dtype)
    out = net(events, stamps, layout)
    assert out.shape == events.shape
    (out * torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)).sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if sum(lengths) != 1:  # nothing decays on its way to a row's only event
            assert bool(parameter.grad.any()) == bool(sum(lengths)), name


def test_autocast_stays_close_and_leaves_the_gates_alone():
    net, (events, stamps, layout) = encoder(dtype=torch.float32), history([5, 3], torch.float32)
    wanted, gates = net(events, stamps, layout), net.time(stamps, layout)
    with torch.autocast("cpu", torch.bfloat16):
        got, within = net(events, stamps, layout), net.time(stamps, layout)
    assert all(map(torch.equal, gates, within))
    torch.testing.assert_close(got.float(), wanted, atol=0.15, rtol=0)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_a_gate_each_way_on_layers_of_the_published_size(name):
    config = PRESETS[name]
    heads, taps = config.mixer().heads, config.taps
    gate = 2 * heads * (taps + 1) + config.time_hidden * (2 * heads + 1) + heads
    of_time = 2 * (config.layers * gate + (config.layers - 1) * 4 * heads + heads)
    step = heads * (config.width + 1) + 2 * heads  # of the way back: raw steps, dt_bias and A_log
    net = config.build()
    assert sum(p.numel() for p in net.time.parameters()) == of_time
    assert sum(p.numel() for p in net.layers.parameters()) == config.layers * (63_760 + step)


def test_what_a_run_has_to_know_of_it():
    assert (CONFIG.causal, CONFIG.streams, CONFIG.reads_time, CONFIG.length_cap) == (False, False, True, 0)
    assert not CONFIG.build().causal
    known = CONFIG.with_gaps(1.0, 2.0)
    assert (known.log_gap_mean, known.log_gap_std) == (1.0, 2.0)
    signals = known.build().time
    assert (signals.signal.log_gap_mean, signals.next_signal.log_gap_std) == (1.0, 2.0)
    blind = replace(CONFIG, time_mode="none")
    assert not blind.reads_time
    assert blind.with_gaps(1.0, 2.0) == blind


REFUSED = {
    "no-layers": ({"layers": 0}, "layers must be at least 1, got 0"),
    "percent": ({"dropout": 20.0}, r"dropout must be in \[0, 1\), got 20.0; it is a share, not percent"),
    "gaps-all-alike": ({"log_gap_std": 0.0}, "log_gap_std above 0.*take time_mode none"),
    "no-epsilon": ({"norm_eps": 0.0}, "norm_eps must be above 0"),
    "heads": ({"head_width": 48}, "must split into heads of 48 channels"),
    "mode": ({"time_mode": "causal"}, "time_mode must be both or none, got 'causal'"),
    "activation": ({"activation": "gelu"}, "activation must be hardswish or silu, got 'gelu'"),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED)
def test_what_makes_no_encoder_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        BiTiM4RecConfig(**fields)


def test_events_and_timestamps_of_another_batch_are_refused():
    net, (events, stamps, layout) = encoder(), history([3])
    for wrong in ((events[:2], stamps), (events, stamps[:2])):
        with pytest.raises(JaggedLayoutError, match=r"events must be \(3, ...\)"):
            net(*wrong, layout)
