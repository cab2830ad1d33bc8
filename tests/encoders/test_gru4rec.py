from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ssd_torchrec.encoders import gru4rec as module
from ssd_torchrec.encoders.encoder import StreamingEncoder
from ssd_torchrec.encoders.gru4rec import PRESETS, GRU4Rec, GRU4RecConfig, GRU4RecState
from ssd_torchrec.errors import ConfigError, JaggedLayoutError
from ssd_torchrec.jagged import JaggedLayout

CONFIG = GRU4RecConfig(width=8, layers=2, hidden=5)
VARIANTS = pytest.mark.parametrize("variant", [{"layers": 1}, {"layers": 2}], ids=str)


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


def test_a_batch_gives_what_each_row_gives_alone():
    net, lengths = encoder(), [4, 0, 1, 7, 4]
    events, stamps, layout = history(lengths)
    together = net(events, stamps, layout)
    for row, start in enumerate(layout.offsets[:-1].tolist()):
        own = slice(start, start + lengths[row])
        alone = net(events[own], stamps[own], JaggedLayout.from_lengths([lengths[row]]))
        torch.testing.assert_close(together[own], alone, atol=1e-10, rtol=0)


def test_the_order_of_rows_makes_no_difference():
    net, (events, stamps, layout) = encoder(), history([3, 1, 3])
    order = torch.tensor([4, 5, 6, 3, 0, 1, 2])
    got = net(events[order], stamps[order], layout)
    torch.testing.assert_close(got, net(events, stamps, layout)[order], atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_rows_do_not_see_each_other(dtype):
    net, (events, stamps, layout) = encoder(dtype=dtype), history([4, 0, 4], dtype)
    changed = events.clone()
    changed[:4] = torch.nan
    assert torch.equal(net(events, stamps, layout)[4:], net(changed, stamps, layout)[4:])


def test_nothing_later_reaches_back():
    net, (events, stamps, layout) = encoder(), history([6, 3])
    before = net(events, stamps, layout)
    for i in range(1, 6):
        later = events.clone()
        later[i:6] = torch.randn(6 - i, 8).double()
        after = net(later, stamps, layout)
        assert torch.equal(before[:i], after[:i])
        assert not torch.equal(before[i], after[i])


def test_a_row_that_grows_keeps_its_vectors():
    net, (events, stamps, layout) = encoder(), history([5])
    shorter = net(events[:3], stamps[:3], JaggedLayout.from_lengths([3]))
    torch.testing.assert_close(net(events, stamps, layout)[:3], shorter, atol=1e-12, rtol=0)


def pieces(lengths: list[int], cuts: list[int]) -> list[tuple[Tensor, JaggedLayout]]:
    """Which events each piece brings: row r is cut after events cuts[r]."""
    rows = list(
        zip(JaggedLayout.from_lengths(lengths).offsets.tolist(), cuts, lengths, strict=False)
    )  # one offset more
    spans = [[(start, start + cut) for start, cut, _ in rows], [(start + cut, start + n) for start, cut, n in rows]]
    picked = [torch.cat([torch.arange(a, b) for a, b in piece]) for piece in spans]
    return [(p, JaggedLayout.from_lengths([b - a for a, b in piece])) for p, piece in zip(picked, spans, strict=True)]


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@VARIANTS
def test_appending_from_every_split_gives_the_whole(variant, dtype):
    lengths = [7, 0, 1, 4]
    net = encoder(replace(CONFIG, **variant), dtype)
    events, stamps, layout = history(lengths, dtype)
    whole = net(events, stamps, layout)
    final = net.append(events, stamps, layout, net.initial_state(4))[1]
    for split in range(8):
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


def test_appending_nothing_changes_nothing_and_leaves_the_old_state_alone():
    net = encoder()
    events, stamps, layout = history([3, 2])
    state = net.append(events, stamps, layout, net.initial_state(2))[1]
    kept = [t.clone() for t in state]
    none, same = net.append(events[:0], stamps[:0], JaggedLayout.from_lengths([0, 0]), state)
    assert none.shape == (0, 8)
    assert all(map(torch.equal, same, kept))
    net.append(events + 1, stamps, layout, state)
    assert all(map(torch.equal, state, kept))


def test_a_state_is_a_row_of_one_size():
    net = encoder(dtype=torch.float32)
    events, stamps, layout = history([7, 0], torch.float32)
    fresh, used = net.initial_state(2), net.append(events, stamps, layout, net.initial_state(2))[1]
    assert [(t.shape, t.dtype) for t in fresh] == [(t.shape, t.dtype) for t in used]
    assert fresh[0].shape == (2, 2, 5)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_state_of_other_rows_is_refused(rows):
    net, (events, stamps, layout) = encoder(), history([3, 0])
    with pytest.raises(JaggedLayoutError, match=f"state must hold the 2 rows of the layout, got {rows}"):
        net.append(events, stamps, layout, net.initial_state(rows))


BATCHES = {"events": [3, 0, 2, 7], "only-empty-rows": [0, 0], "no-rows": []}


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_parameter_gets_a_gradient(dtype, dropout, lengths):
    net = encoder(replace(CONFIG, dropout=dropout), dtype).train()
    out = net(*history(lengths, dtype))
    assert (out.shape, out.dtype) == ((sum(lengths), 8), dtype)
    (out * torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)).sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert bool(parameter.grad.any()) == bool(sum(lengths)), name


def test_the_gradient_is_that_of_the_output():
    net, (events, stamps, layout) = encoder(), history([3, 0, 2])
    assert torch.autograd.gradcheck(lambda x: net(x, stamps, layout), events.requires_grad_())


def test_the_same_input_gives_the_same_bits():
    net, args = encoder(dtype=torch.float32), history([6, 0, 4], torch.float32)
    gradients = [torch.autograd.grad(net(*args).square().sum(), [*net.parameters()]) for _ in range(2)]
    assert torch.equal(net(*args), net(*args))
    assert all(map(torch.equal, *gradients))


def test_dropout_acts_in_training_only():
    net, args = encoder(replace(CONFIG, dropout=0.5)), history([6])
    assert torch.equal(net(*args), encoder()(*args))
    net.train()
    assert not torch.equal(net(*args), net(*args))


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


def test_events_and_timestamps_of_another_batch_are_refused():
    net, (events, stamps, layout) = encoder(), history([3])
    for wrong in ((events[:2], stamps), (events, stamps[:2])):
        with pytest.raises(JaggedLayoutError, match=r"events must be \(3, ...\)"):
            net(*wrong, layout)
