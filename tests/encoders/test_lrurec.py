from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_torchrec.encoders.encoder import StreamingEncoder
from ssd_torchrec.encoders.lrurec import PRESETS, LinearRecurrentUnit, LRURec, LRURecConfig
from ssd_torchrec.errors import ConfigError, JaggedLayoutError
from ssd_torchrec.jagged import JaggedLayout

CONFIG = LRURecConfig(width=8)
LENGTHS = [6, 0, 1, 3]
LAYERS = pytest.mark.parametrize("layers", [1, 2])
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


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


@LAYERS
def test_a_batch_gives_what_its_rows_give_alone(layers):
    net, (events, stamps, layout) = encoder(replace(CONFIG, layers=layers)), history(LENGTHS)
    rows = zip(events.split(LENGTHS), stamps.split(LENGTHS), LENGTHS, strict=True)
    alone = [net(row, at, JaggedLayout.from_lengths([length])) for row, at, length in rows]
    torch.testing.assert_close(net(events, stamps, layout), torch.cat(alone), atol=1e-10, rtol=0)


def test_rows_may_come_in_any_order():
    net, (events, stamps, layout), order = encoder(), history(LENGTHS), [2, 3, 0, 1]
    moved, expected = (
        torch.cat([t.split(LENGTHS)[row] for row in order]) for t in (events, net(events, stamps, layout))
    )
    got = net(moved, stamps, JaggedLayout.from_lengths([LENGTHS[row] for row in order]))
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)


@DTYPES
def test_nothing_later_reaches_back(dtype):
    net, (events, stamps, layout) = encoder(dtype=dtype), history([6, 3], dtype)
    before = net(events, stamps, layout)
    for i in range(1, 6):
        later = events.clone()
        later[i:6] = torch.randn(6 - i, 8)
        after = net(later, stamps, layout)
        assert torch.equal(before[:i], after[:i])
        assert not torch.equal(before[i], after[i])


@DTYPES
def test_rows_do_not_see_each_other(dtype):
    net, (events, stamps, layout) = encoder(dtype=dtype), history([4, 0, 3], dtype)
    changed = events.clone()
    changed[:4] = torch.nan
    assert torch.equal(net(events, stamps, layout)[4:], net(changed, stamps, layout)[4:])


def test_time_makes_no_difference():
    net, (events, stamps, layout) = encoder(), history(LENGTHS)
    assert torch.equal(net(events, stamps, layout), net(events, 10**9 - stamps, layout))
    assert not CONFIG.reads_time


TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


def cut(layout: JaggedLayout, split: int) -> list[tuple[Tensor, JaggedLayout]]:
    """Which events come first, `split` of each row that has as many, and which after them."""
    is_first = layout.position < split
    parts = [(torch.nonzero(part)[:, 0], layout.row_of_event[part]) for part in (is_first, ~is_first)]
    return [(p, JaggedLayout.from_lengths(rows.bincount(minlength=layout.num_rows))) for p, rows in parts]


@DTYPES
@LAYERS
def test_appending_from_every_split_gives_the_whole(layers, dtype):
    net, (events, stamps, layout) = encoder(replace(CONFIG, layers=layers), dtype), history([19, 0, 1, 4], dtype)
    whole = net(events, stamps, layout)
    final = net.append(events, stamps, layout, net.initial_state(4))[1]
    for split in range(20):
        state, got = net.initial_state(4), torch.full_like(whole, torch.nan)
        for picked, part in cut(layout, split):
            got[picked], state = net.append(events[picked], stamps[picked], part, state)
        torch.testing.assert_close(got, whole, atol=TOLERANCE[dtype], rtol=0)
        torch.testing.assert_close(tuple(state), tuple(final), atol=TOLERANCE[dtype], rtol=0)


def test_appending_nothing_changes_nothing_and_leaves_the_old_state_alone():
    net, (events, stamps, layout) = encoder(), history([3, 2])
    state = net.append(events, stamps, layout, net.initial_state(2))[1]
    kept = state.hidden.clone()
    none, same = net.append(events[:0], stamps[:0], JaggedLayout.from_lengths([0, 0]), state)
    assert none.shape == (0, 8)
    assert torch.equal(same.hidden, kept)
    net.append(events + 1, stamps, layout, state)
    assert torch.equal(state.hidden, kept)


def test_a_user_of_the_published_size_takes_512_numbers():
    state = PRESETS["64d"].build().initial_state(1)
    assert (state.hidden.shape, state.hidden.dtype) == ((1, 2, 128, 2), torch.float32)


BATCHES = {"events": [3, 0, 2], "only-empty-rows": [0, 0], "no-rows": []}


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
@LAYERS
@DTYPES
def test_every_parameter_gets_a_gradient(dtype, layers, lengths):
    net, (events, stamps, layout) = encoder(replace(CONFIG, layers=layers), dtype).train(), history(lengths, dtype)
    out = net(events, stamps, layout)
    assert out.shape == events.shape
    (out * torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)).sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert bool(parameter.grad.any()) == bool(sum(lengths)), name


def test_fp32_gives_the_gradients_of_fp64():
    gradients = []
    for dtype in (torch.float32, torch.float64):
        net, (events, stamps, layout) = encoder().to(dtype), history([19, 0, 1, 4], dtype)
        signs = torch.arange(events.numel(), dtype=dtype).view_as(events) % 3 - 1
        gradients.append(torch.autograd.grad((net(events, stamps, layout) * signs).sum(), [*net.parameters()]))
    for narrow, wide in zip(*gradients, strict=True):
        torch.testing.assert_close(narrow.double(), wide, atol=2e-5 * (1 + wide.abs().max().item()), rtol=0)


def test_the_same_input_gives_the_same_bits():
    net, args = encoder(dtype=torch.float32), history([9, 0, 4], torch.float32)
    assert torch.equal(net(*args), net(*args))
    gradients = [torch.autograd.grad(net(*args).square().sum(), [*net.parameters()]) for _ in range(2)]
    assert all(map(torch.equal, *gradients))


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


def test_what_is_of_another_batch_is_refused():
    net, (events, stamps, layout) = encoder(), history([3])
    for wrong in ((events[:2], stamps), (events, stamps[:2])):
        with pytest.raises(JaggedLayoutError, match=r"events must be \(3, ...\)"):
            net(*wrong, layout)
    with pytest.raises(JaggedLayoutError, match="state must hold the 1 rows of the layout, got 2"):
        net.append(events, stamps, layout, net.initial_state(2))
