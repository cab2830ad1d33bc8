from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_torchrec.encoders.ssd4rec import PRESETS, SSD4Rec, SSD4RecConfig, turned_rows
from ssd_torchrec.errors import ConfigError, JaggedLayoutError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.modules.feed_forward import FeedForward
from ssd_torchrec.modules.ssd_mixer import SSDMixerConfig

CONFIG = SSD4RecConfig(width=8, head_width=4, state=3, taps=3, beta=0.5)
WAYS = {
    "item": CONFIG,
    "slot": replace(CONFIG, backward_align="slot"),
    "forward-only": replace(CONFIG, beta=0.0),
}
TWO_WAYS = ["item", "slot"]
LENGTHS = [5, 0, 1, 3]


def encoder(config: SSD4RecConfig = CONFIG, dtype: torch.dtype = torch.float64) -> SSD4Rec:
    """In eval mode, with weights so large that whatever is left out shows."""
    torch.manual_seed(0)
    net = config.build().to(dtype).eval()
    for parameter in net.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    return net


def history(lengths: list[int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, JaggedLayout]:
    events = torch.randn(sum(lengths), 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return events.to(dtype), torch.zeros(sum(lengths), dtype=torch.int64), JaggedLayout.from_lengths(lengths)


def turned(events: Tensor, lengths: list[int]) -> Tensor:
    return torch.cat([row.flip(0) for row in events.split(lengths)])


def written_out(net: SSD4Rec, events: Tensor, lengths: list[int]) -> Tensor:
    """The causal mixer called twice, its rows turned in memory, as the published code does it."""
    layout, x = JaggedLayout.from_lengths(lengths), net.norm(events)
    for layer in net.layers:
        forward = layer.mixer(x, None, layout)[0]
        backward = layer.mixer(turned(x, lengths), None, layout)[0]
        if net.config.backward_align == "item":
            backward = turned(backward, lengths)
        x = layer.feed_forward(layer.norm(forward + net.config.beta * backward + x))
    return x


@pytest.mark.parametrize("lengths", [LENGTHS, [19, 2], [1]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_running_backwards_is_turning_every_row(way, dtype, lengths):
    net, (events, stamps, layout) = encoder(WAYS[way], dtype), history(lengths, dtype)
    wanted = written_out(net, events, lengths)
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5}[dtype]
    torch.testing.assert_close(net(events, stamps, layout), wanted, atol=tolerance, rtol=0)


def test_turned_rows_are_each_read_from_their_end():
    layout = JaggedLayout.from_lengths([3, 0, 1, 2])
    assert turned_rows(layout).tolist() == [2, 1, 0, 3, 5, 4]
    assert turned_rows(JaggedLayout.from_lengths([])).tolist() == []


@pytest.mark.parametrize("way", WAYS)
def test_a_batch_gives_what_its_rows_give_alone(way):
    net, (events, stamps, layout) = encoder(WAYS[way]), history(LENGTHS)
    rows = zip(events.split(LENGTHS), stamps.split(LENGTHS), LENGTHS, strict=True)
    alone = [net(e, t, JaggedLayout.from_lengths([n])) for e, t, n in rows]
    torch.testing.assert_close(net(events, stamps, layout), torch.cat(alone), atol=1e-10, rtol=0)


@pytest.mark.parametrize("way", WAYS)
def test_rows_may_come_in_any_order(way):
    net, (events, stamps, layout), order = encoder(WAYS[way]), history(LENGTHS), [3, 1, 0, 2]
    out = net(events, stamps, layout).split(LENGTHS)
    moved = torch.cat([events.split(LENGTHS)[row] for row in order])
    got = net(moved, stamps, JaggedLayout.from_lengths([LENGTHS[row] for row in order]))
    torch.testing.assert_close(got, torch.cat([out[row] for row in order]), atol=1e-10, rtol=0)


def knows(config: SSD4RecConfig, length: int = 5) -> Tensor:
    """(T, T) whether each event's output depends on each event."""
    net, (events, stamps, layout) = encoder(replace(config, layers=1)), history([length])
    jacobian = torch.autograd.functional.jacobian(lambda e: net(e, stamps, layout), events)  # (T, D, T, D)
    return (jacobian != 0).any(3).any(1)


def test_which_events_an_output_is_made_of():
    """Where there is a way back, what follows an event shows: targets must lie outside of the row."""
    past, all_of_it = torch.ones(5, 5).tril().bool(), torch.ones(5, 5).bool()
    assert torch.equal(knows(WAYS["forward-only"]), past)
    assert torch.equal(knows(WAYS["item"]), all_of_it)
    assert torch.equal(knows(WAYS["slot"]), past | past.flip(1))  # the first t events and the last t


def test_nothing_later_reaches_back_without_a_way_back():
    net, (events, stamps, layout) = encoder(WAYS["forward-only"]), history([6, 3])
    before = net(events, stamps, layout)
    for i in range(1, 6):
        later = events.clone()
        later[i:6] = torch.randn(6 - i, 8)
        after = net(later, stamps, layout)
        assert torch.equal(before[:i], after[:i])
        assert not torch.equal(before[i], after[i])


def pieces(lengths: list[int], split: int) -> list[tuple[Tensor, JaggedLayout]]:
    """Which events each of two pieces brings: every row is cut after `split` events."""
    layout = JaggedLayout.from_lengths(lengths)
    first = layout.position < split
    cut = [min(n, split) for n in lengths]
    rest = [n - c for n, c in zip(lengths, cut, strict=True)]
    return [(first, JaggedLayout.from_lengths(cut)), (~first, JaggedLayout.from_lengths(rest))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("norm_embedding", [True, False], ids=["normed", "raw"])
def test_appending_from_every_split_gives_the_whole(norm_embedding, dtype):
    lengths, tolerance = [9, 0, 1, 4], {torch.float64: 1e-12, torch.float32: 2e-5}[dtype]
    net = encoder(replace(WAYS["forward-only"], norm_embedding=norm_embedding), dtype)
    events, stamps, layout = history(lengths, dtype)
    whole = net(events, stamps, layout)
    final = net.append(events, stamps, layout, net.initial_state(4))[1]
    for split in range(10):
        state, got = net.initial_state(4), torch.full_like(whole, torch.nan)
        for picked, part in pieces(lengths, split):
            got[picked], state = net.append(events[picked], stamps[picked], part, state)
        torch.testing.assert_close(got, whole, atol=tolerance, rtol=0)
        torch.testing.assert_close(tuple(state), tuple(final), atol=tolerance, rtol=0)


def test_appending_nothing_changes_nothing_and_leaves_the_old_state_alone():
    net, (events, stamps, layout) = encoder(WAYS["forward-only"]), history([3, 2])
    state = net.append(events, stamps, layout, net.initial_state(2))[1]
    kept = [t.clone() for t in state]
    none, same = net.append(events[:0], stamps[:0], JaggedLayout.from_lengths([0, 0]), state)
    assert none.shape == (0, 8)
    assert all(map(torch.equal, same, kept))
    net.append(events, stamps, layout, state)
    assert all(map(torch.equal, state, kept))


BATCHES = {"events": [3, 0, 2, 1], "only-empty-rows": [0, 0], "no-rows": []}


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_parameter_gets_a_gradient(dtype, way, lengths):
    net, (events, stamps, layout) = encoder(WAYS[way], dtype).train(), history(lengths, dtype)
    out = net(events, stamps, layout)
    assert out.shape == events.shape
    (out * torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)).sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert bool(parameter.grad.any()) == bool(sum(lengths)), name


def test_without_norm_embedding_the_stem_is_there_and_gets_gradients_of_zeros():
    net, (events, stamps, layout) = encoder(replace(CONFIG, norm_embedding=False)), history([3])
    net(events, stamps, layout).square().sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in net.norm.parameters())
    torch.nn.init.constant_(net.norm.weight, torch.nan)
    assert net(events, stamps, layout).isfinite().all()


def test_dropout_is_behind_every_norm():
    net, (events, stamps, layout) = encoder(replace(CONFIG, dropout=0.5)).train(), history([200])
    zeros = (net(events, stamps, layout) == 0).double().mean().item()
    assert zeros == pytest.approx(0.5, abs=0.06)


def test_gelu_and_its_dropout_are_the_feed_forwards():
    torch.manual_seed(0)
    layer, x = FeedForward(8, 32, 0.5, activation="gelu", drop_after_norm=True), torch.randn(5, 8)
    assert ((layer(x) == 0).any(1)).any()
    hidden = F.gelu(x @ layer.expand.weight.T) @ layer.contract.weight.T  # biases start at 0
    torch.testing.assert_close(layer.eval()(x), F.layer_norm(hidden + x, (8,), eps=1e-12))


def test_autocast_stays_close_and_states_stay_fp32():
    net, (events, stamps, layout) = encoder(WAYS["forward-only"], torch.float32), history([5, 3], torch.float32)
    wanted = net(events, stamps, layout)
    with torch.autocast("cpu", torch.bfloat16):
        got, state = net.append(events, stamps, layout, net.initial_state(2))
    assert state.ssm.dtype == torch.float32
    torch.testing.assert_close(got.float(), wanted, atol=0.15, rtol=0)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_published_size(name):
    net = PRESETS[name].build()
    assert sum(p.numel() for p in net.layers.parameters()) == PRESETS[name].layers * 964_576
    assert sum(p.numel() for p in net.norm.parameters()) == 2 * 256


@pytest.mark.parametrize("way", WAYS)
def test_what_a_run_has_to_know_of_it(way):
    config = replace(WAYS[way], max_length=9)
    assert config.causal == config.streams == config.build().causal == (way == "forward-only")
    assert (config.reads_time, config.length_cap) == (False, 9)


@pytest.mark.parametrize("way", TWO_WAYS)
def test_with_a_way_back_it_does_not_stream(way):
    net, (events, stamps, layout) = encoder(WAYS[way]), history([3])
    state = encoder(WAYS["forward-only"]).initial_state(1)
    with pytest.raises(ConfigError, match=r"only an encoder with beta 0 goes on from a state, got beta 0\.5"):
        net.initial_state(1)
    with pytest.raises(ConfigError, match=r"only an encoder with beta 0 goes on from a state, got beta 0\.5"):
        net.append(events, stamps, layout, state)


def test_a_row_longer_than_the_cap_is_refused():
    net = encoder(replace(CONFIG, max_length=4))
    assert net(*history([4])).shape == (4, 8)
    with pytest.raises(JaggedLayoutError, match="at most max_length = 4 events, got one of 5; cut rows"):
        net(*history([2, 5]))


def test_events_timestamps_and_states_of_another_batch_are_refused():
    net, (events, stamps, layout) = encoder(WAYS["forward-only"]), history([3, 0])
    for wrong in ((events[:2], stamps), (events, stamps[:2])):
        with pytest.raises(JaggedLayoutError, match=r"events must be \(3, ...\)"):
            net(*wrong, layout)
    with pytest.raises(JaggedLayoutError, match="state must hold the 2 rows of the layout, got 3"):
        net.append(events, stamps, layout, net.initial_state(3))


REFUSED = {
    "no-layers": ({"layers": 0}, "layers must be at least 1, got 0"),
    "percent": ({"dropout": 20.0}, r"dropout must be in \[0, 1\), got 20.0; it is a share, not percent"),
    "negative-weight": ({"beta": -0.1}, "beta must be at least 0, got -0.1"),
    "no-number": ({"beta": float("nan")}, "beta must be at least 0, got nan"),
    "negative-cap": ({"max_length": -1}, "max_length must be at least 0, got -1"),
    "no-epsilon": ({"gated_norm_eps": 0.0}, "gated_norm_eps must be above 0"),
    "heads": ({"head_width": 48}, "must split into heads of 48 channels"),
    "alignment": ({"backward_align": "end"}, "backward_align must be item or slot, got 'end'"),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED)
def test_what_makes_no_encoder_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        SSD4RecConfig(**fields)


def test_a_raw_step_needs_a_bias():
    with pytest.raises(ConfigError, match=r"raw_step must be 0 in a mixer without bias, got 1\.0; it is a bias"):
        SSDMixerConfig(width=64, raw_step=1.0, bias=False)
