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


def test_places_make_a_difference():
    net, (events, stamps, layout) = encoder(), history([4])
    events[0] = events[1] = 0.0  # the two would be alike
    out = net(events, stamps, layout)
    assert not torch.allclose(out[0], out[1])


BATCHES = {"events": [3, 0, 2, 7], "only-empty-rows": [0, 0], "no-rows": []}


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_parameter_gets_a_gradient(dtype, dropout, lengths):
    net = encoder(replace(CONFIG, dropout=dropout, attention_dropout=dropout), dtype).train()
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


@pytest.mark.parametrize("dropped", ["dropout", "attention_dropout"])
def test_each_dropout_acts_in_training_only(dropped):
    config = replace(CONFIG, dropout=0.0, attention_dropout=0.0)
    net, args = encoder(replace(config, **{dropped: 0.5})), history([6])
    assert torch.equal(net(*args), encoder(config)(*args))
    net.train()
    assert not torch.equal(net(*args), net(*args))


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


def test_events_and_timestamps_of_another_batch_are_refused():
    net, (events, stamps, layout) = encoder(), history([3])
    for wrong in ((events[:2], stamps), (events, stamps[:2])):
        with pytest.raises(JaggedLayoutError, match=r"events must be \(3, ...\)"):
            net(*wrong, layout)


def test_a_row_longer_than_its_positions_is_refused():
    with pytest.raises(JaggedLayoutError, match="rows must have at most 7 events, got one of 8"):
        encoder()(*history([1, 8]))
