import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_torchrec.errors import JaggedLayoutError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.modules.time_window import WindowGate, WindowMix, WindowSignal, WindowTime, WindowTimeConfig

CONFIG = WindowTimeConfig(length=6, heads=2, taps=3)
LENGTHS = [6, 1, 0, 4]


def branch(config: WindowTimeConfig = CONFIG, layers: int = 2) -> WindowTime:
    """In eval mode, with weights so large that every part of it shows."""
    torch.manual_seed(0)
    net = WindowTime(config, layers).double().eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return net


def history(lengths: list[int]) -> tuple[Tensor, JaggedLayout]:
    rng = torch.Generator().manual_seed(1)
    gaps_s = torch.randn(sum(lengths), generator=rng).mul(4).add(8).exp().long()
    return 1_600_000_000 + gaps_s.cumsum(0), JaggedLayout.from_lengths(lengths)


def written_out(net: WindowTime, stamps: Tensor, lengths: list[int]) -> list[Tensor]:
    """Row by row, on padded rows of PyTorch's own layers; (T, H) a layer."""
    config, rows = net.signal.config, []
    for row in stamps.split(lengths):
        padded = F.pad(row, (0, config.length - len(row)))
        gap_s = torch.cat([torch.zeros(1), padded[1:].double() - padded[:-1].double()]).double()
        d = normed(gap_s, net.signal.norm, config).expand(config.heads, -1)
        gates = []
        for gate, mix in zip(net.gates, net.mixes, strict=True):
            hidden = F.silu(d @ gate.hidden.weight.T + gate.hidden.bias)
            g = (hidden @ gate.alpha.weight.T + gate.alpha.bias) * d
            for conv in (gate.first, gate.second):
                padded_left = F.pad(g[None], (config.taps - 1, 0))
                g = F.hardswish(F.conv1d(padded_left, conv.weight[:, None], conv.bias, groups=config.heads))[0]
            weight = torch.sigmoid(d @ mix.weigh.weight.T + mix.weigh.bias)
            d = normed(weight * d + (1 - weight) * g, mix.norm, config)
            gates.append(g.T[: len(row)])
        rows.append(gates)
    return [torch.cat(of_layer) for of_layer in zip(*rows, strict=True)]


def normed(x: Tensor, norm: torch.nn.LayerNorm, config: WindowTimeConfig) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return norm.weight * centred / (centred.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() + norm.bias


@pytest.mark.parametrize("by_slot", [False, True], ids=["weight-a-head", "weight-a-slot"])
@pytest.mark.parametrize("norm_eps", [1e-12, 1e-2])
def test_it_is_the_published_branch_written_out(norm_eps, by_slot):
    net = branch(replace(CONFIG, mix_by_slot=by_slot, norm_eps=norm_eps))
    stamps, layout = history(LENGTHS)
    for got, wanted in zip(net(stamps, layout), written_out(net, stamps, LENGTHS), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-10, rtol=0)


def test_heads_start_from_one_signal_and_part_later():
    net, (stamps, _) = branch(), history([6])
    signal = net.signal(stamps[None])
    assert torch.equal(signal[:, 0], signal[:, 1])
    gate = net.gates[0](signal, JaggedLayout.from_lengths([6]))
    later = net.mixes[0](signal, gate)
    assert not torch.equal(later[:, 0], later[:, 1])


def test_beside_the_first_empty_slot_a_row_has_hardly_any_gaps():
    signal = WindowSignal(CONFIG).double()
    stamps = torch.tensor([[1_600_000_000, 1_600_086_400, 1_600_090_000, 0, 0, 0]])
    got = signal(stamps)[0, 0]
    jump, rest = got[3].item(), torch.cat([got[:3], got[4:]])
    assert jump == pytest.approx(-math.sqrt(5), rel=1e-3)
    torch.testing.assert_close(rest, torch.full_like(rest, 1 / math.sqrt(5)), atol=1e-3, rtol=0)


def test_a_later_time_reaches_an_earlier_gate_of_its_row_and_no_other_row():
    net, (stamps, layout) = branch(), history(LENGTHS)
    moved = stamps.clone()
    moved[5] += 100_000
    for before, after in zip(net(stamps, layout), net(moved, layout), strict=True):
        assert (before[:5] != after[:5]).all()
        assert torch.equal(before[6:], after[6:])


def test_float32_rounds_timestamps_to_two_minutes():
    exact, rounded = branch(), branch(replace(CONFIG, float32_timestamps=True))
    layout = JaggedLayout.from_lengths([6])
    stamps = 1_600_000_000 + torch.tensor([0, 128, 1280, 1290, 1300, 2560])
    floored = 1_600_000_000 + torch.tensor([0, 128, 1280, 1280, 1280, 2560])
    assert not torch.equal(exact(stamps, layout)[0], rounded(stamps, layout)[0])
    assert torch.equal(exact(floored, layout)[0], rounded(stamps, layout)[0])


def test_gaps_are_dropped_for_all_heads_at_once_and_signals_head_by_head():
    config = replace(CONFIG, length=64, heads=8, gap_dropout=0.5, dropout=0.5)
    signal = WindowSignal(config).double().train()
    stamps = 1_600_000_000 + torch.randint(1, 1000, (1, 64)).cumsum(1)
    first, again = signal(stamps), signal(stamps)
    assert torch.equal(first[:, 0], first[:, 7])
    assert not torch.equal(first, again)
    mix = WindowMix(config).double().train()
    mixed = mix(first, torch.zeros_like(first))
    assert not torch.equal(mixed[:, 0], mixed[:, 7])


def test_it_starts_as_published():
    torch.manual_seed(0)
    gate = WindowGate(replace(CONFIG, length=200, heads=1024, taps=4, conv_init="kaiming"))
    assert gate.hidden.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert gate.first.weight.std().item() == pytest.approx(math.sqrt(2 / (4 * 1024)), rel=0.05)
    assert not any(linear.bias.any() for linear in (gate.hidden, gate.alpha))


BATCHES = {"events": LENGTHS, "only-empty-rows": [0, 0], "no-rows": []}


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_parameter_gets_a_gradient_and_the_last_mix_one_of_zeros(dtype, lengths):
    net, (stamps, layout) = branch().to(dtype), history(lengths)
    gates = net(stamps, layout)
    assert [gate.shape for gate in gates] == 2 * [(sum(lengths), 2)]
    torch.cat(gates).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any() == (bool(sum(lengths)) and not name.startswith("mixes.1")), name


def test_the_derivative_is_the_derivative():
    net, (stamps, layout) = branch(replace(CONFIG, length=4, norm_eps=1e-2)), history([4, 2])
    names = [*dict(net.named_parameters())]

    def named(*parameters: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.func.functional_call(net, dict(zip(names, parameters, strict=True)), (stamps, layout)))

    assert torch.autograd.gradcheck(named, [p.detach().requires_grad_() for p in net.parameters()], fast_mode=True)


def test_a_row_longer_than_the_window_is_refused():
    with pytest.raises(JaggedLayoutError, match="at most the 6 events of the window, got one of 7; cut rows"):
        branch()(*history([3, 7]))
