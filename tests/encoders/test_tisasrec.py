import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ssd_torchrec.encoders import tisasrec as module
from ssd_torchrec.encoders.encoder import StreamingEncoder
from ssd_torchrec.encoders.tisasrec import PRESETS, TiSASRec, TiSASRecConfig
from ssd_torchrec.errors import ConfigError, JaggedLayoutError
from ssd_torchrec.jagged import JaggedLayout

CONFIG = TiSASRecConfig(width=8, heads=2, max_length=7, unit_s=50, max_interval=9)
UNITS = ["seconds", "row-minimum"]
of_both_units = pytest.mark.parametrize("unit", UNITS)


def encoder(config: TiSASRecConfig = CONFIG, dtype: torch.dtype = torch.float64) -> TiSASRec:
    """In eval mode, with weights that matter, so that whatever is left out shows."""
    torch.manual_seed(0)
    net = config.build().to(dtype).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return net


def history(lengths: list[int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, JaggedLayout]:
    rng = torch.Generator().manual_seed(1)
    events = torch.randn(sum(lengths), 8, generator=rng, dtype=torch.float64).to(dtype)
    gaps_s = torch.randint(0, 5, (sum(lengths),), generator=rng) * 70  # some are 0
    return events, 1_600_000_000 + gaps_s.cumsum(0), JaggedLayout.from_lengths(lengths)


def attend_pair_by_pair(net: TiSASRec, x: Tensor, interval: Tensor) -> Tensor:
    """The attention of the first layer to one row, as the paper has it."""
    tables, heads = net.tables, net.config.heads
    query, key, value = (part.unflatten(-1, (heads, -1)) for part in net.layers[0].attention.in_proj(x).chunk(3, -1))
    place_key, place_value, interval_key, interval_value = (
        t.unflatten(-1, (heads, -1))
        for t in (tables.position_key.weight, tables.position_value.weight, tables.interval_key, tables.interval_value)
    )
    rows = []
    for t in range(len(x)):
        keys = torch.stack([key[s] + place_key[s] + interval_key[interval[t, s]] for s in range(t + 1)])
        values = torch.stack([value[s] + place_value[s] + interval_value[interval[t, s]] for s in range(t + 1)])
        weights = ((query[t] * keys).sum(-1) / math.sqrt(query.shape[-1])).softmax(0)  # (s, H)
        rows.append((weights[..., None] * values).sum(0).flatten())
    return torch.stack(rows)


STAMPS_S = [0, 120, 120, 270, 5_000]
INTERVALS = {  # whole times 50 s, or the shortest gap, 120 s; no more than 9
    "seconds": [[0], [2, 0], [2, 0, 0], [5, 3, 3, 0], [9, 9, 9, 9, 0]],
    "row-minimum": [[0], [1, 0], [1, 0, 0], [2, 1, 1, 0], [9, 9, 9, 9, 0]],
}


@pytest.mark.parametrize("heads", [1, 2])
@of_both_units
def test_it_is_the_block_diagram_of_the_paper(unit, heads):
    net = encoder(replace(CONFIG, layers=1, heads=heads, interval_unit=unit))
    (layer,) = net.layers
    events, _, layout = history([5])
    stamps = torch.tensor(STAMPS_S) + 1_600_000_000
    interval = torch.zeros(5, 5, dtype=torch.int64)
    for t, row in enumerate(INTERVALS[unit]):
        interval[t, : t + 1] = torch.tensor(row)
    x = math.sqrt(8) * events
    x = x + attend_pair_by_pair(net, layer.attention_norm(x), interval)
    inner = layer.feed_forward.expand(layer.feed_forward_norm(x)).relu()
    wanted = net.norm(x + layer.feed_forward.contract(inner))
    torch.testing.assert_close(net(events, stamps, layout), wanted, atol=1e-12, rtol=0)


def test_the_shortest_gap_of_a_row_tells_an_event_of_later_ones():
    net, (events, _, layout) = encoder(replace(CONFIG, interval_unit="row-minimum")), history([4])
    stamps = torch.tensor([0, 600, 1_200, 1_800])
    closer = torch.tensor([0, 600, 1_200, 1_300])
    before, after = net(events, stamps, layout), net(events, closer, layout)
    assert not torch.allclose(before[1], after[1])
    assert not net.causal
    later = events.clone()
    later[3] = 1.0
    assert torch.equal(before[:3], net(later, stamps, layout)[:3])  # of what they are, it tells nothing


@of_both_units
def test_only_gaps_matter_not_the_date(unit):
    net, (events, stamps, layout) = encoder(replace(CONFIG, interval_unit=unit)), history([4, 2])
    assert torch.equal(net(events, stamps, layout), net(events, stamps + 10**9, layout))


def test_under_row_minimum_only_ratios_of_gaps_matter():
    events, stamps, layout = history([5, 3])
    stretched = 7 * stamps
    net = encoder(replace(CONFIG, interval_unit="row-minimum"))
    assert torch.equal(net(events, stamps, layout), net(events, stretched, layout))
    net = encoder()
    assert not torch.equal(net(events, stamps, layout), net(events, stretched, layout))


@of_both_units
def test_events_at_one_time_are_no_interval_apart(unit):
    net, (events, stamps, layout) = encoder(replace(CONFIG, interval_unit=unit)), history([4])
    out = net(events, torch.zeros_like(stamps), layout)
    with torch.no_grad():
        for table in (net.tables.interval_key, net.tables.interval_value):
            table[1:] = 100.0
    assert torch.equal(out, net(events, torch.zeros_like(stamps), layout))


@of_both_units
def test_chunks_of_rows_give_what_all_rows_at_once_give(unit, monkeypatch):
    net, args = encoder(replace(CONFIG, interval_unit=unit)), history([4, 4, 0, 4, 7, 4])
    whole = net(*args)
    monkeypatch.setattr(module, "CHUNK_VALUES", 2 * 4 * (4 + 10) * 2 + 1)  # two rows of 4, one of 7
    torch.testing.assert_close(net(*args), whole, atol=1e-12, rtol=0)


def test_memory_for_the_way_back_does_not_hold_the_weights_of_all_rows():
    net, args = encoder(replace(CONFIG, layers=1)), history([7] * 20)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        net(*args)
    assert kept
    assert not [shape for shape in kept if shape[-2:] in ((7, 7), (7, 10))]


def test_places_make_a_difference():
    net, (events, stamps, layout) = encoder(), history([4])
    events[0] = events[1] = 0.0  # the two would be alike
    out = net(events, torch.zeros_like(stamps), layout)
    assert not torch.allclose(out[0], out[1])


def test_the_first_gap_is_no_gap_of_the_row_before():
    stamps, layout = torch.tensor([0, 500, 501, 900]), JaggedLayout.from_lengths([2, 2])
    assert module._shortest_gap_s(stamps, layout).tolist() == [500, 500, 399, 399]


def test_autocast_stays_close():
    net, args = encoder(dtype=torch.float32), history([5, 3], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = net(*args)
    torch.testing.assert_close(got.float(), net(*args), atol=0.15, rtol=0)


def test_it_does_not_stream_and_its_rows_have_a_cap():
    assert not isinstance(encoder(), StreamingEncoder)
    assert (CONFIG.causal, CONFIG.streams, CONFIG.reads_time, CONFIG.length_cap) == (True, False, True, 7)
    published = replace(CONFIG, interval_unit="row-minimum")
    assert (published.causal, published.build().causal) == (False, False)


PUBLISHED = {"ml-1m-64d": (200, 0.2, 2_048), "beauty-64d": (50, 0.4, 512)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_is_the_published_size(name):
    config, (max_length, dropout, max_interval) = PRESETS[name], PUBLISHED[name]
    assert (config.length_cap, config.dropout, config.attention_dropout) == (max_length, dropout, dropout)
    tables = 2 * 64 * (max_length + max_interval + 1)
    layer = 3 * 64 * 64 + 2 * (64 * 64 + 64) + 2 * 2 * 64
    assert sum(p.numel() for p in config.build().parameters()) == 2 * layer + tables + 2 * 64


def test_each_projection_starts_as_glorot_has_it():
    net = TiSASRecConfig(width=64).build()
    for part in net.layers[0].attention.in_proj.weight.chunk(3):
        assert part.std().item() == pytest.approx(math.sqrt(2 / 128), rel=0.05)


REFUSED = {
    "no-layers": ({"layers": 0}, "layers must be at least 1, got 0"),
    "no-positions": ({"max_length": 0}, "max_length must be at least 1, got 0"),
    "no-unit": ({"unit_s": 0}, "unit_s must be at least 1, got 0"),
    "unit": ({"interval_unit": "days"}, "interval_unit must be seconds or row-minimum, got 'days'"),
    "heads": ({"heads": 3}, "width 64 does not split into 3 heads"),
    "percent": ({"dropout": 20.0}, r"dropout must be in \[0, 1\), got 20.0; it is a share, not percent"),
    "certain-dropout": ({"attention_dropout": 1.0}, r"attention_dropout must be in \[0, 1\)"),
    "no-epsilon": ({"norm_eps": 0.0}, "norm_eps must be above 0"),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED)
def test_what_makes_no_encoder_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        TiSASRecConfig(**fields)


def test_a_row_longer_than_its_positions_is_refused():
    with pytest.raises(JaggedLayoutError, match="rows must have at most 7 events, got one of 8"):
        encoder()(*history([1, 8]))
