import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ssd_torchrec.encoders.encoder import StreamingEncoder
from ssd_torchrec.encoders.sasrec import PRESETS, SASRec, SASRecConfig
from ssd_torchrec.errors import ConfigError, JaggedLayoutError
from ssd_torchrec.jagged import JaggedLayout

CONFIG = SASRecConfig(width=8, heads=2, max_length=7)


def encoder(config: SASRecConfig = CONFIG, dtype: torch.dtype = torch.float64) -> SASRec:
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


def test_it_is_the_block_diagram_of_the_paper():
    net = encoder(replace(CONFIG, layers=1, heads=1))
    (layer,) = net.layers
    events, stamps, layout = history([5])
    x = math.sqrt(8) * events + net.positions.weight[:5]
    query, key, value = layer.attention.in_proj(layer.attention_norm(x)).chunk(3, -1)
    scores = query @ key.T / math.sqrt(8) + torch.full((5, 5), -math.inf).triu(1)
    x = x + scores.softmax(-1) @ value
    inner = layer.feed_forward.expand(layer.feed_forward_norm(x)).relu()
    wanted = net.norm(x + layer.feed_forward.contract(inner))
    torch.testing.assert_close(net(events, stamps, layout), wanted, atol=1e-12, rtol=0)


def test_places_make_a_difference():
    net, (events, stamps, layout) = encoder(), history([4])
    events[0] = events[1] = 0.0  # the two would be alike
    out = net(events, stamps, layout)
    assert not torch.allclose(out[0], out[1])


def test_autocast_stays_close():
    net, args = encoder(dtype=torch.float32), history([5, 3], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = net(*args)
    torch.testing.assert_close(got.float(), net(*args), atol=0.15, rtol=0)


def test_it_does_not_stream_and_its_rows_have_a_cap():
    assert not isinstance(encoder(), StreamingEncoder)
    assert (CONFIG.causal, CONFIG.streams, CONFIG.reads_time, CONFIG.length_cap) == (True, False, False, 7)


PUBLISHED = {"ml-1m-64d": (200, 0.2), "beauty-64d": (50, 0.4)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_is_the_published_size(name):
    config, (max_length, dropout) = PRESETS[name], PUBLISHED[name]
    assert (config.length_cap, config.dropout, config.attention_dropout) == (max_length, dropout, dropout)
    layer = 3 * 64 * 64 + 2 * (64 * 64 + 64) + 2 * 2 * 64
    assert sum(p.numel() for p in config.build().parameters()) == 2 * layer + 64 * max_length + 2 * 64


def test_each_projection_starts_as_glorot_has_it():
    net = SASRecConfig(width=64).build()
    for part in net.layers[0].attention.in_proj.weight.chunk(3):
        assert part.std().item() == pytest.approx(math.sqrt(2 / 128), rel=0.05)


REFUSED = {
    "no-layers": ({"layers": 0}, "layers must be at least 1, got 0"),
    "no-positions": ({"max_length": 0}, "max_length must be at least 1, got 0"),
    "heads": ({"heads": 3}, "width 64 does not split into 3 heads"),
    "percent": ({"dropout": 20.0}, r"dropout must be in \[0, 1\), got 20.0; it is a share, not percent"),
    "certain-dropout": ({"attention_dropout": 1.0}, r"attention_dropout must be in \[0, 1\)"),
    "no-epsilon": ({"norm_eps": 0.0}, "norm_eps must be above 0"),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED)
def test_what_makes_no_encoder_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        SASRecConfig(**fields)


def test_a_row_longer_than_its_positions_is_refused():
    with pytest.raises(JaggedLayoutError, match="rows must have at most 7 events, got one of 8"):
        encoder()(*history([1, 8]))
