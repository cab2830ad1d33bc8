from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ssd_torchrec.encoders.tim4rec import PRESETS, TiM4Rec, TiM4RecConfig
from ssd_torchrec.errors import ConfigError, JaggedLayoutError
from ssd_torchrec.jagged import JaggedLayout

CONFIG = TiM4RecConfig(width=8, head_width=4, state=3, taps=3, time_hidden=5)
MODES = ["causal", "none"]


def encoder(config: TiM4RecConfig = CONFIG, dtype: torch.dtype = torch.float64) -> TiM4Rec:
    """In eval mode, with gates and first events that matter, so that whatever is left out shows."""
    torch.manual_seed(0)
    net = TiM4Rec(config).to(dtype).eval()
    for name, parameter in net.named_parameters():
        if name.startswith("time.") or parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    return net


def history(lengths: list[int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, JaggedLayout]:
    rng = torch.Generator().manual_seed(1)
    events = torch.randn(sum(lengths), 8, generator=rng, dtype=torch.float64).to(dtype)
    gaps_s = torch.randn(sum(lengths), generator=rng, dtype=torch.float64).mul(4).add(8).exp().long()
    return events, 1_600_000_000 + gaps_s.cumsum(0), JaggedLayout.from_lengths(lengths)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_later_reaches_back(mode):
    net = encoder(replace(CONFIG, time_mode=mode))
    events, stamps, layout = history([6, 3])
    before = net(events, stamps, layout)
    for i in range(1, 6):
        later, moved = events.clone(), stamps.clone()
        later[i:6], moved[i:6] = torch.randn(6 - i, 8).double(), stamps[i:6] + 10_000 * torch.arange(1, 7 - i)
        after = net(later, moved, layout)
        assert torch.equal(before[:i], after[:i])
        assert not torch.equal(before[i], after[i])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_rows_do_not_see_each_other(dtype):
    net = encoder(dtype=dtype)
    events, stamps, layout = history([4, 0, 3], dtype)
    changed, moved = events.clone(), stamps.clone()
    changed[:4], moved[:4] = torch.nan, 0
    assert torch.equal(net(events, stamps, layout)[4:], net(changed, moved, layout)[4:])


@pytest.mark.parametrize("mode", MODES)
def test_gaps_matter_exactly_where_the_mode_says(mode):
    net = encoder(replace(CONFIG, time_mode=mode))
    events, stamps, layout = history([5])
    moved = stamps + torch.tensor([0, 0, 86_400, 86_400, 86_400])  # one gap is a day longer
    before, after = net(events, stamps, layout), net(events, moved, layout)
    assert torch.equal(before[:2], after[:2])
    assert torch.equal(before[2:], after[2:]) == (mode == "none")


def test_only_gaps_matter_not_the_date():
    net = encoder()
    events, stamps, layout = history([4, 2])
    assert torch.equal(net(events, stamps, layout), net(events, stamps + 10**9, layout))


def pieces(lengths: list[int], cuts: list[int]) -> list[tuple[Tensor, JaggedLayout]]:
    """Which events each piece brings: row r is cut after events cuts[r]."""
    rows = list(
        zip(JaggedLayout.from_lengths(lengths).offsets.tolist(), cuts, lengths, strict=False)
    )  # one offset more
    spans = [[(start, start + cut) for start, cut, _ in rows], [(start + cut, start + n) for start, cut, n in rows]]
    picked = [torch.cat([torch.arange(a, b) for a, b in piece]) for piece in spans]
    return [(p, JaggedLayout.from_lengths([b - a for a, b in piece])) for p, piece in zip(picked, spans, strict=True)]


TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layers", [1, 2])
def test_appending_from_every_split_gives_the_whole(layers, mode, dtype):
    lengths = [19, 0, 1, 4]  # beyond the smallest chunk of the scan
    net = encoder(replace(CONFIG, time_mode=mode, layers=layers), dtype)
    events, stamps, layout = history(lengths, dtype)
    whole = net(events, stamps, layout)
    final = net.append(events, stamps, layout, net.initial_state(4))[1]
    for split in range(20):
        state, got = net.initial_state(4), torch.full_like(whole, torch.nan)
        for picked, part in pieces(lengths, [min(n, split) for n in lengths]):
            got[picked], state = net.append(events[picked], stamps[picked], part, state)
        torch.testing.assert_close(got, whole, atol=TOLERANCE[dtype], rtol=0)
        torch.testing.assert_close(tuple(state), tuple(final), atol=TOLERANCE[dtype], rtol=0)


def test_rows_may_bring_different_numbers_of_events_one_by_one():
    net, lengths = encoder(), [5, 2, 0]
    events, stamps, layout = history(lengths)
    state, got = net.initial_state(3), torch.full_like(events, torch.nan)
    for t in range(5):
        bring = [int(t < n) for n in lengths]
        picked = layout.offsets[:-1][torch.tensor(bring) > 0] + t
        got[picked], state = net.append(events[picked], stamps[picked], JaggedLayout.from_lengths(bring), state)
    torch.testing.assert_close(got, net(events, stamps, layout), atol=1e-12, rtol=0)
    assert state.num_events.tolist() == lengths
    assert state.last_timestamp.tolist() == [stamps[4], stamps[6], 0]


def test_appending_nothing_changes_nothing_and_leaves_the_old_state_alone():
    net = encoder()
    events, stamps, layout = history([3, 2])
    state = net.append(events, stamps, layout, net.initial_state(2))[1]
    kept = [t.clone() for t in state]
    none, same = net.append(events[:0], stamps[:0], JaggedLayout.from_lengths([0, 0]), state)
    assert none.shape == (0, 8)
    assert all(map(torch.equal, same, kept))
    net.append(events, stamps + 10**9, layout, state)
    assert all(map(torch.equal, state, kept))


@pytest.mark.parametrize("mode", MODES)
def test_a_state_is_a_row_of_one_size(mode):
    net = encoder(replace(CONFIG, time_mode=mode), torch.float32)
    events, stamps, layout = history([7, 0], torch.float32)
    fresh, used = net.initial_state(2), net.append(events, stamps, layout, net.initial_state(2))[1]
    assert [(t.shape, t.dtype) for t in fresh] == [(t.shape, t.dtype) for t in used]
    assert all(len(t) == 2 for t in fresh)
    assert (fresh.ssm.dtype, fresh.last_timestamp.dtype, fresh.num_events.dtype) == (
        torch.float32,
        torch.int64,
        torch.int64,
    )


def test_a_user_of_the_published_size_takes_37_kib():
    state = TiM4Rec(PRESETS["ml-1m-64d"]).initial_state(1)
    assert sum(t.numel() for t in state if t.is_floating_point()) == 9_392


BATCHES = {"events": [3, 0, 2], "only-empty-rows": [0, 0], "no-rows": []}


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_parameter_gets_a_gradient(dtype, layers, mode, lengths):
    net = encoder(replace(CONFIG, layers=layers, time_mode=mode), dtype).train()
    events, stamps, layout = history(lengths, dtype)
    out = net(events, stamps, layout)
    (out * torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)).sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()) == bool(sum(lengths)), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_same_input_gives_the_same_bits(dtype):
    net = encoder(dtype=dtype)
    args = history([9, 0, 4], dtype)
    assert torch.equal(net(*args), net(*args))
    gradients = [torch.autograd.grad(net(*args).square().sum(), [*net.parameters()]) for _ in range(2)]
    assert all(map(torch.equal, *gradients))


def test_autocast_stays_close_and_leaves_the_time_branch_alone():
    net = encoder(dtype=torch.float32)
    events, stamps, layout = history([5, 3], torch.float32)
    wanted, gates = net(events, stamps, layout), net.time(stamps, layout, None)[0]
    with torch.autocast("cpu", torch.bfloat16):
        got, state = net.append(events, stamps, layout, net.initial_state(2))
        gates_within = net.time(stamps, layout, None)[0]
    assert all(map(torch.equal, gates, gates_within))
    assert state.ssm.dtype == torch.float32
    torch.testing.assert_close(got.float(), wanted, atol=0.15, rtol=0)


@pytest.mark.parametrize("name", [name for name, config in PRESETS.items() if config.time_mode == "causal"])
def test_a_preset_is_the_published_block_and_a_small_time_branch(name):
    config = PRESETS[name]
    blind, timed = TiM4Rec(replace(config, time_mode="none")), TiM4Rec(config)
    width, heads, taps = config.width, timed.config.mixer().heads, 4
    published = {64: 63_760, 256: 958_736}[width]  # of a layer, less its time branch
    assert sum(p.numel() for p in blind.parameters()) == config.layers * published + 2 * width
    gate = 2 * heads * (taps + 1) + config.time_hidden * (2 * heads + 1) + heads
    of_time = sum(p.numel() for p in timed.parameters()) - sum(p.numel() for p in blind.parameters())
    assert of_time == config.layers * gate + (config.layers - 1) * 4 * heads + heads


REFUSED = {
    "no-layers": ({"layers": 0}, "layers must be at least 1, got 0"),
    "percent": ({"dropout": 20.0}, r"dropout must be in \[0, 1\), got 20.0; it is a share, not percent"),
    "certain-dropout": ({"time_dropout": 1.0}, r"time_dropout must be in \[0, 1\)"),
    "gaps-all-alike": ({"log_gap_std": 0.0}, "log_gap_std above 0.*take time_mode none"),
    "no-gaps-at-all": ({"log_gap_mean": float("nan")}, "log_gap_mean must be finite"),
    "no-epsilon": ({"norm_eps": 0.0}, "norm_eps must be above 0"),
    "heads": ({"head_width": 48}, "must split into heads of 48 channels"),
    "mode": ({"time_mode": "padded"}, "time_mode must be causal or window or none, got 'padded'"),
    "activation": ({"activation": "gelu"}, "activation must be hardswish or silu, got 'gelu'"),
    "start": ({"conv_init": "xavier"}, "conv_init must be uniform or kaiming, got 'xavier'"),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED)
def test_what_makes_no_encoder_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        TiM4RecConfig(**fields)


def test_events_and_timestamps_of_another_batch_are_refused():
    net, (events, stamps, layout) = encoder(), history([3])
    for wrong in ((events[:2], stamps), (events, stamps[:2])):
        with pytest.raises(JaggedLayoutError, match=r"events must be \(3, ...\)"):
            net(*wrong, layout)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_state_of_other_rows_is_refused(rows):
    net, (events, stamps, layout) = encoder(), history([3, 0])
    with pytest.raises(JaggedLayoutError, match=f"state must hold the 2 rows of the layout, got {rows}"):
        net.append(events, stamps, layout, net.initial_state(rows))
