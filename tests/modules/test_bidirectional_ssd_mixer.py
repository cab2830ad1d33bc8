from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_torchrec.errors import JaggedLayoutError, ShapeError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.modules import bidirectional_ssd_mixer
from ssd_torchrec.modules.bidirectional_ssd_mixer import BidirectionalSSDMixer
from ssd_torchrec.modules.ssd_mixer import SSDMixer, SSDMixerConfig
from ssd_torchrec.ops.ssd_bidirectional import ssd_scan_bidirectional

CONFIG = SSDMixerConfig(width=8, head_width=4, state=3)  # 4 heads
LENGTHS = [4, 0, 1, 2]
LAYOUT = JaggedLayout.from_lengths(LENGTHS)


def mixer(config: SSDMixerConfig = CONFIG) -> BidirectionalSSDMixer:
    torch.manual_seed(0)
    return BidirectionalSSDMixer(config).double()


def events_and_gate(num_events: int = 7) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    return (
        torch.randn(num_events, 8, generator=rng, dtype=torch.float64),
        torch.rand(num_events, 2, 4, generator=rng, dtype=torch.float64),
    )


def rows_of(events: Tensor) -> tuple[Tensor, ...]:
    return events.split(LENGTHS)


def test_it_is_the_recurrence_written_out():
    net, (x, gate) = mixer(replace(CONFIG, raw_step=1.0)), events_and_gate(5)
    layout = JaggedLayout.from_lengths([5])
    z, xbc, raw = net.in_proj(x).split([16, 22, 8], -1)
    inputs, B, C = net.conv(xbc, layout)[0].split([16, 3, 3], -1)
    inputs, raw = inputs.unflatten(-1, (4, 4)), raw.unflatten(-1, (2, 4))
    y = net.D[:, None] * inputs
    for way, order in enumerate([range(5), range(4, -1, -1)]):
        step, S = F.softplus(raw[:, way] * gate[:, way] + net.dt_bias[way]), torch.zeros(4, 4, 3).double()
        for t in order:
            decay = torch.exp(-net.A_log[way].exp() * step[t])[:, None, None]
            S = decay * S + step[t, :, None, None] * inputs[t, :, :, None] * B[t]
            y = y.index_add(0, torch.tensor([t]), (S @ C[t])[None])
    u = y.flatten(1) * F.silu(z)
    normed = u * (u.square().mean(-1, keepdim=True) + CONFIG.norm_eps).rsqrt()
    torch.testing.assert_close(net(x, gate, layout), net.out_proj(normed))


def test_forward_alone_is_the_causal_mixer():
    """Where the steps backward are next to nothing."""
    torch.manual_seed(0)
    both, (x, gate) = mixer(), events_and_gate()
    causal = SSDMixer(CONFIG).double()
    own = {name: p[0] if name in ("dt_bias", "A_log") else p for name, p in both.state_dict().items()}
    own |= {name: own[name][:-4] for name in ("in_proj.weight", "in_proj.bias")}
    causal.load_state_dict(own)
    with torch.no_grad():
        both.dt_bias[1] = -100.0
    torch.testing.assert_close(both(x, gate, LAYOUT), causal(x, gate[:, 0], LAYOUT)[0])


def test_no_gate_is_a_gate_of_one():
    net, (x, gate) = mixer(), events_and_gate()
    assert torch.equal(net(x, None, LAYOUT), net(x, torch.ones_like(gate), LAYOUT))


def test_a_batch_gives_what_its_rows_give_alone():
    net, (x, gate) = mixer(), events_and_gate()
    alone = [net(*row, JaggedLayout.from_lengths([len(row[0])])) for row in zip(rows_of(x), rows_of(gate), strict=True)]
    torch.testing.assert_close(net(x, gate, LAYOUT), torch.cat(alone))


def test_rows_may_come_in_any_order():
    net, (x, gate) = mixer(), events_and_gate()
    order = [2, 3, 0, 1]
    x_moved, gate_moved, expected = (
        torch.cat([rows_of(t)[row] for row in order]) for t in (x, gate, net(x, gate, LAYOUT))
    )
    layout = JaggedLayout.from_lengths([LENGTHS[row] for row in order])
    torch.testing.assert_close(net(x_moved, gate_moved, layout), expected)


def test_turned_rows_with_swapped_directions_give_turned_outputs_where_the_convolution_is_of_one_tap():
    config = replace(CONFIG, taps=1)
    net, swapped, (x, gate) = mixer(config), mixer(config), events_and_gate()
    with torch.no_grad():
        for parameter in (swapped.dt_bias, swapped.A_log):
            parameter.copy_(parameter.flip(0))
        for parameter in (swapped.in_proj.weight, swapped.in_proj.bias):
            parameter[-8:] = parameter[-8:].unflatten(0, (2, 4)).flip(0).flatten(0, 1)

    def turned(events: Tensor) -> Tensor:
        return torch.cat([row.flip(0) for row in rows_of(events)])

    torch.testing.assert_close(swapped(turned(x), turned(gate).flip(1), LAYOUT), turned(net(x, gate, LAYOUT)))


@pytest.mark.parametrize("of", ["events", "gate"])
def test_an_event_knows_all_of_its_row_and_nothing_else(of):
    net, (x, gate) = mixer(), events_and_gate()
    given = {"events": lambda t: net(t, gate, LAYOUT), "gate": lambda t: net(x, t, LAYOUT)}[of]
    jacobian = torch.autograd.functional.jacobian(given, x if of == "events" else gate)  # (T, D, T, ...)
    knows = (jacobian.flatten(3) != 0).any(3).any(1)
    assert torch.equal(knows, LAYOUT.row_of_event[:, None] == LAYOUT.row_of_event)


def test_each_gate_acts_in_its_own_direction():
    """The gate forward of an event reaches it and what follows; the gate backward it and what precedes."""
    net, (x, gate) = mixer(), events_and_gate(5)
    layout = JaggedLayout.from_lengths([5])
    jacobian = torch.autograd.functional.jacobian(lambda g: net(x, g, layout), gate)  # (T, D, T, 2, H)
    reaches = (jacobian != 0).any(4).any(1)  # (T, T, 2)
    assert torch.equal(reaches[..., 0], torch.ones(5, 5).tril().bool())
    assert torch.equal(reaches[..., 1], torch.ones(5, 5).triu().bool())


def test_rows_without_numbers_spoil_no_others():
    net, (x, gate) = mixer().float(), (t.float() for t in events_and_gate())
    spoilt = x.index_fill(0, torch.tensor([4]), torch.nan)
    clean, dirty = net(x, gate, LAYOUT), net(spoilt, gate, LAYOUT)
    others = LAYOUT.row_of_event != LAYOUT.row_of_event[4]
    assert torch.equal(dirty[others], clean[others])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("lengths", [LENGTHS, [1], [0, 0], []], ids=str)
def test_gradients_reach_every_parameter(lengths, dtype):
    net, (x, gate) = mixer().to(dtype), (t.to(dtype).requires_grad_() for t in events_and_gate(sum(lengths)))
    out = net(x, gate, JaggedLayout.from_lengths(lengths))
    assert out.shape == x.shape
    out.square().sum().backward()
    for name, tensor in {"x": x, "gate": gate, **dict(net.named_parameters())}.items():
        assert tensor.grad is not None, name
        assert tensor.grad.isfinite().all(), name
        if max(lengths, default=0) > 1:
            assert tensor.grad.any(), name
            assert name not in ("A_log", "dt_bias") or tensor.grad.any(1).all(), name  # in either direction


def test_the_derivative_is_the_derivative():
    net, (x, gate) = mixer(replace(CONFIG, head_width=8, norm_eps=1e-3)), events_and_gate()
    names = [*dict(net.named_parameters())]

    def named(x: Tensor, gate: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(net, dict(zip(names, parameters, strict=True)), (x, gate, LAYOUT))

    inputs = [x, gate[..., :2].contiguous(), *(p.detach() for p in net.parameters())]
    assert torch.autograd.gradcheck(named, [t.requires_grad_() for t in inputs], fast_mode=True)


def test_either_direction_starts_as_the_causal_mixer_does():
    net = mixer(SSDMixerConfig(width=64, head_width=1, raw_step=1.0))  # 128 heads
    step, rate = F.softplus(net.in_proj.bias[-256:].view(2, 128) + net.dt_bias), net.A_log.exp()
    for way in (0, 1):
        assert 1e-3 <= step[way].min() < 3e-3
        assert 0.03 < step[way].max() <= 0.1
        assert ((rate[way] >= 1) & (rate[way] <= 16)).all()
    assert not torch.equal(step[0], step[1])
    assert (net.D == 1).all()
    assert not net.in_proj.bias[:-256].any()


def test_steps_stay_fp32_under_autocast(monkeypatch):
    seen = {}

    def spy(x, dt, A, B, C, layout, **options):
        seen.update({name: t.dtype for name, t in {"dt": dt, "A": A, **options}.items()})
        return ssd_scan_bidirectional(x, dt, A, B, C, layout, **options)

    monkeypatch.setattr(bidirectional_ssd_mixer, "ssd_scan_bidirectional", spy)
    net, (x, gate) = mixer().float(), (t.float() for t in events_and_gate())
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x, gate, LAYOUT)
    assert out.dtype == torch.bfloat16
    assert seen == dict.fromkeys(("dt", "A", "dt_bias", "D"), torch.float32)
    torch.testing.assert_close(out.float(), net(x, gate, LAYOUT), atol=0.02, rtol=0.02)
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in net.parameters())


def test_the_gate_of_one_direction_is_refused():
    net, (x, gate) = mixer(), events_and_gate()
    with pytest.raises(ShapeError, match=r"gate must be \(7, 2, 4\), got \(7, 4\); stack the gates of both directions"):
        net(x, gate[:, 0], LAYOUT)


def test_events_of_another_batch_are_refused():
    with pytest.raises(JaggedLayoutError, match=r"events must be \(7, ...\)"):
        mixer()(*events_and_gate(6), LAYOUT)
