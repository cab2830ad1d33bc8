"""What every encoder promises, in small shapes of all of them."""

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from ssd_torchrec.encoders.bert4rec import BERT4RecConfig
from ssd_torchrec.encoders.caser import CaserConfig
from ssd_torchrec.encoders.encoder import Encoder, EncoderConfig, StreamingEncoder
from ssd_torchrec.encoders.gru4rec import GRU4RecConfig
from ssd_torchrec.encoders.lrurec import LRURecConfig
from ssd_torchrec.encoders.mamba4rec import Mamba4RecConfig
from ssd_torchrec.encoders.recmamba import RecMambaConfig
from ssd_torchrec.encoders.sasrec import SASRecConfig
from ssd_torchrec.encoders.tisasrec import TiSASRecConfig
from ssd_torchrec.errors import JaggedLayoutError
from ssd_torchrec.jagged import JaggedLayout

CONFIGS: dict[str, EncoderConfig] = {
    "sasrec": SASRecConfig(width=8, heads=2, max_length=7),
    "tisasrec": TiSASRecConfig(width=8, heads=2, max_length=7, max_interval=5),
    "tisasrec-row-minimum": TiSASRecConfig(width=8, heads=2, max_length=7, max_interval=5, interval_unit="row-minimum"),
    "bert4rec": BERT4RecConfig(width=8, heads=2, max_length=7),
    "gru4rec-1": GRU4RecConfig(width=8, layers=1, hidden=5),
    "gru4rec-2": GRU4RecConfig(width=8, layers=2, hidden=5),
    "caser-1": CaserConfig(width=8, window=1, horizontal=2, vertical=2),
    "caser-3": CaserConfig(width=8, window=3, horizontal=2, vertical=2),
    "caser-9": CaserConfig(width=8, window=9, horizontal=2, vertical=2),
    "lrurec-1": LRURecConfig(width=8, layers=1),
    "lrurec-2": LRURecConfig(width=8),
    "mamba4rec-1": Mamba4RecConfig(width=8, state=4, layers=1),
    "mamba4rec-2": Mamba4RecConfig(width=8, state=4, layers=2),
    "recmamba-end": RecMambaConfig(width=8, state=4, max_length=9),
    "recmamba-none": RecMambaConfig(width=8, state=4, positions="none"),
}
CAUSAL = {name: config for name, config in CONFIGS.items() if config.causal}
STREAMING = {name: config for name, config in CONFIGS.items() if config.streams}
DECAYS = {"A_log", "dt_bias", "nu_log", "theta_log", "gamma_log"}  # start as they are: at random, states might grow
BATCHES = {"events": [3, 0, 2, 7], "only-empty-rows": [0, 0], "no-rows": []}
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def of(configs: dict[str, EncoderConfig]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("config", configs.values(), ids=configs)


def encoder(config: EncoderConfig, dtype: torch.dtype = torch.float64) -> Encoder:
    """In eval mode, with weights that matter, so that whatever is left out shows."""
    torch.manual_seed(0)
    net = config.build().to(dtype).eval()
    for name, parameter in net.named_parameters():
        if name.rpartition(".")[2] not in DECAYS:
            torch.nn.init.normal_(parameter, std=0.3)
    return net


def streaming(config: EncoderConfig, dtype: torch.dtype = torch.float64) -> StreamingEncoder:
    net = encoder(config, dtype)
    assert isinstance(net, StreamingEncoder)
    return net


def history(lengths: list[int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, JaggedLayout]:
    rng = torch.Generator().manual_seed(1)
    events = torch.randn(sum(lengths), 8, generator=rng, dtype=torch.float64).to(dtype)
    gaps_s = torch.randint(0, 400, (sum(lengths),), generator=rng)
    return events, 1_600_000_000 + gaps_s.cumsum(0), JaggedLayout.from_lengths(lengths)


@of(CONFIGS)
def test_a_batch_gives_what_each_row_gives_alone(config):
    net, lengths = encoder(config), [4, 0, 1, 7, 4]
    events, stamps, layout = history(lengths)
    together = net(events, stamps, layout)
    for row, start in enumerate(layout.offsets[:-1].tolist()):
        own = slice(start, start + lengths[row])
        alone = net(events[own], stamps[own], JaggedLayout.from_lengths([lengths[row]]))
        torch.testing.assert_close(together[own], alone, atol=1e-10, rtol=0)


@of(CONFIGS)
def test_the_order_of_rows_makes_no_difference(config):
    net, (events, stamps, layout) = encoder(config), history([3, 1, 3])
    order = torch.tensor([4, 5, 6, 3, 0, 1, 2])
    got = net(events[order], stamps[order], layout)
    torch.testing.assert_close(got, net(events, stamps, layout)[order], atol=1e-12, rtol=0)


@of(CONFIGS)
@DTYPES
def test_rows_do_not_see_each_other(dtype, config):
    net, (events, stamps, layout) = encoder(config, dtype), history([4, 0, 4], dtype)
    changed = events.clone()
    changed[:4] = torch.nan
    assert torch.equal(net(events, stamps, layout)[4:], net(changed, stamps, layout)[4:])


@of(CAUSAL)
def test_nothing_later_reaches_back(config):
    net, (events, stamps, layout) = encoder(config), history([6, 3])
    before = net(events, stamps, layout)
    for i in range(1, 6):
        later, moved = events.clone(), stamps.clone()
        later[i:6] = torch.randn(6 - i, 8).double()
        moved[i:6] += 1000 * torch.arange(1, 7 - i)
        after = net(later, moved, layout)
        assert torch.equal(before[:i], after[:i])
        assert not torch.equal(before[i], after[i])


@of(CAUSAL)
def test_a_row_that_grows_keeps_its_vectors(config):
    net, (events, stamps, layout) = encoder(config), history([5])
    shorter = net(events[:3], stamps[:3], JaggedLayout.from_lengths([3]))
    torch.testing.assert_close(net(events, stamps, layout)[:3], shorter, atol=1e-12, rtol=0)


def pieces(lengths: list[int], cuts: list[int]) -> list[tuple[Tensor, JaggedLayout]]:
    """Which events each piece brings: row r is cut after events cuts[r]."""
    starts = JaggedLayout.from_lengths(lengths).offsets[:-1].tolist()
    rows = list(zip(starts, cuts, lengths, strict=True))
    spans = [[(start, start + cut) for start, cut, _ in rows], [(start + cut, start + n) for start, cut, n in rows]]
    picked = [torch.cat([torch.arange(a, b) for a, b in piece]) for piece in spans]
    return [(p, JaggedLayout.from_lengths([b - a for a, b in piece])) for p, piece in zip(picked, spans, strict=True)]


@of(STREAMING)
@DTYPES
def test_appending_from_every_split_gives_the_whole(dtype, config):
    lengths = [7, 0, 1, 4]
    net, (events, stamps, layout) = streaming(config, dtype), history(lengths, dtype)
    whole = net(events, stamps, layout)
    final = net.append(events, stamps, layout, net.initial_state(4))[1]
    for split in range(8):
        state, got = net.initial_state(4), torch.full_like(whole, torch.nan)
        for picked, part in pieces(lengths, [min(n, split) for n in lengths]):
            got[picked], state = net.append(events[picked], stamps[picked], part, state)
        torch.testing.assert_close(got, whole, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        torch.testing.assert_close(tuple(state), tuple(final), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@of(STREAMING)
def test_rows_may_bring_different_numbers_of_events_one_by_one(config):
    lengths = [5, 2, 0]
    net, (events, stamps, layout) = streaming(config), history(lengths)
    state, got = net.initial_state(3), torch.full_like(events, torch.nan)
    for t in range(5):
        bring = [int(t < n) for n in lengths]
        picked = layout.offsets[:-1][torch.tensor(bring) > 0] + t
        got[picked], state = net.append(events[picked], stamps[picked], JaggedLayout.from_lengths(bring), state)
    torch.testing.assert_close(got, net(events, stamps, layout), atol=1e-12, rtol=0)


@of(STREAMING)
def test_appending_nothing_changes_nothing_and_leaves_the_old_state_alone(config):
    net, (events, stamps, layout) = streaming(config), history([3, 2])
    state = net.append(events, stamps, layout, net.initial_state(2))[1]
    kept = [t.clone() for t in state]
    none, same = net.append(events[:0], stamps[:0], JaggedLayout.from_lengths([0, 0]), state)
    assert none.shape == (0, 8)
    assert all(map(torch.equal, same, kept))
    net.append(events + 1, stamps, layout, state)
    assert all(map(torch.equal, state, kept))


@of(STREAMING)
def test_a_state_has_one_size_whatever_the_row_has_seen(config):
    net, (events, stamps, layout) = streaming(config, torch.float32), history([7, 0], torch.float32)
    fresh, used = net.initial_state(2), net.append(events, stamps, layout, net.initial_state(2))[1]
    assert [(t.shape, t.dtype) for t in fresh] == [(t.shape, t.dtype) for t in used]
    assert all(len(t) == 2 for t in fresh)


@of(STREAMING)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_state_of_other_rows_is_refused(rows, config):
    net, (events, stamps, layout) = streaming(config), history([3, 0])
    with pytest.raises(JaggedLayoutError, match=f"state must hold the 2 rows of the layout, got {rows}"):
        net.append(events, stamps, layout, net.initial_state(rows))


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@of(CONFIGS)
@DTYPES
def test_every_parameter_gets_a_gradient(dtype, config, dropout, lengths):
    net = encoder(replace(config, **dropouts(config, dropout)), dtype).train()
    out = net(*history(lengths, dtype))
    assert (out.shape, out.dtype) == ((sum(lengths), 8), dtype)
    (out * torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)).sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert bool(parameter.grad.any()) == bool(sum(lengths)), name


@of({name: CONFIGS[name] for name in ("sasrec", "tisasrec", "bert4rec", "gru4rec-2", "caser-3")})
def test_the_gradient_is_that_of_the_output(config):
    net, (events, stamps, layout) = encoder(config), history([3, 0, 2])
    assert torch.autograd.gradcheck(lambda x: net(x, stamps, layout), events.requires_grad_())


@of(CONFIGS)
def test_the_same_input_gives_the_same_bits(config):
    net, args = encoder(config, torch.float32), history([6, 0, 4], torch.float32)
    gradients = [torch.autograd.grad(net(*args).square().sum(), [*net.parameters()]) for _ in range(2)]
    assert torch.equal(net(*args), net(*args))
    assert all(map(torch.equal, *gradients))


def dropouts(config: EncoderConfig, share: float) -> dict[str, float]:
    return {field.name: share for field in fields(config) if field.name.endswith("dropout")}


@pytest.mark.parametrize(
    ("config", "dropped"),
    [pytest.param(c, name, id=f"{at}-{name}") for at, c in CONFIGS.items() for name in dropouts(c, 0.0)],
)
def test_each_dropout_acts_in_training_only(config, dropped):
    none = replace(config, **dropouts(config, 0.0))
    net, args = encoder(replace(none, **{dropped: 0.5})), history([6])
    assert torch.equal(net(*args), encoder(none)(*args))
    net.train()
    assert not torch.equal(net(*args), net(*args))


@of(CONFIGS)
def test_events_and_timestamps_of_another_batch_are_refused(config):
    net, (events, stamps, layout) = encoder(config), history([3])
    for wrong in ((events[:2], stamps), (events, stamps[:2])):
        with pytest.raises(JaggedLayoutError, match=r"events must be \(3, ...\)"):
            net(*wrong, layout)
