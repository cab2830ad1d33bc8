from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ssd_torchrec.encoders.caser import PRESETS, Caser, CaserConfig
from ssd_torchrec.encoders.encoder import StreamingEncoder
from ssd_torchrec.errors import ConfigError
from ssd_torchrec.jagged import JaggedLayout

CONFIG = CaserConfig(width=8, window=3, horizontal=2, vertical=2)
VARIANTS = pytest.mark.parametrize("variant", [{"window": 1}, {"window": 3}, {"window": 9}], ids=str)


def encoder(config: CaserConfig = CONFIG, dtype: torch.dtype = torch.float64) -> Caser:
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


@VARIANTS
def test_it_is_the_convolutions_of_the_paper_over_each_window(variant):
    net = encoder(replace(CONFIG, **variant))
    window = net.config.window
    events, stamps, layout = history([5])
    padded = torch.cat([torch.zeros(window - 1, 8).double(), events])
    outputs = []
    for t in range(5):
        image = padded[t : t + window]  # (W, D)
        features = []
        for height, conv in enumerate(net.filters.horizontal, start=1):
            for weight, bias in zip(conv.weight, conv.bias, strict=True):  # (D, h)
                found = [(image[i : i + height] * weight.T).sum() + bias for i in range(window - height + 1)]
                features.append(torch.stack(found).relu().max())
        for channel in image.T:  # (W,)
            features += [(weight[0] * channel).sum() for weight in net.filters.vertical.weight]
        outputs.append(net.out_proj(torch.stack(features)[None])[0].relu())
    torch.testing.assert_close(net(events, stamps, layout), torch.stack(outputs), atol=1e-12, rtol=0)


def test_an_event_sees_its_window_and_nothing_before():
    net, (events, stamps, layout) = encoder(), history([7])
    before = net(events, stamps, layout)
    events[2] += 1.0
    changed = (before != net(events, stamps, layout)).any(-1)
    assert changed.nonzero().flatten().tolist() == [2, 3, 4]


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
    assert config.features == 5 * 16 + 4 * 64
    horizontal, vertical = 16 * (64 * (1 + 2 + 3 + 4 + 5) + 5), 4 * 5
    dense = 64 * config.features + 64
    assert sum(p.numel() for p in config.build().parameters()) == horizontal + vertical + dense


REFUSED = {
    "no-window": ({"window": 0}, "window must be at least 1, got 0"),
    "no-filters": ({"horizontal": 0}, "horizontal must be at least 1, got 0"),
    "no-sums": ({"vertical": 0}, "vertical must be at least 1, got 0"),
    "percent": ({"dropout": 20.0}, r"dropout must be in \[0, 1\), got 20.0; it is a share, not percent"),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED)
def test_what_makes_no_encoder_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        CaserConfig(**fields)
