import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_torchrec.errors import ConfigError, JaggedLayoutError, ShapeError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.modules import mamba_mixer
from ssd_torchrec.modules.mamba_mixer import MambaMixer, MambaMixerConfig, MambaMixerState
from ssd_torchrec.ops import selective_scan as scan_door
from ssd_torchrec.ops import selective_triton, short_conv_triton
from ssd_torchrec.ops import short_conv as conv_door
from ssd_torchrec.ops.launch import INTERPRETED

CONFIG = MambaMixerConfig(width=20, state=3)  # 40 channels, steps through 2 numbers
LENGTHS = [4, 0, 1, 2]
LAYOUT = JaggedLayout.from_lengths(LENGTHS)


def mixer(config: MambaMixerConfig = CONFIG) -> MambaMixer:
    """With states and steps that matter: as it starts, the skip is most of what comes out."""
    torch.manual_seed(0)
    net = MambaMixer(config).double()
    for linear in (net.in_proj, net.x_proj, net.dt_proj):
        torch.nn.init.normal_(linear.weight, std=0.5)
    return net


def events(num_events: int = 7) -> Tensor:
    return torch.randn(num_events, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def no_state(rows: int) -> MambaMixerState:
    return MambaMixerState(torch.zeros(rows, 3, 40).double(), torch.zeros(rows, 40, 3).double())


def test_it_is_the_recurrence_written_out():
    net, given = mixer(), events(5)
    x, z = net.in_proj(given).split(40, -1)
    padded = F.pad(x.T[None], (3, 0))
    x = F.silu(F.conv1d(padded, net.conv.weight[:, None], net.conv.bias, groups=40))[0].T
    r, B, C = net.x_proj(x).split([2, 3, 3], -1)
    step = F.softplus(r @ net.dt_proj.weight.T + net.dt_bias)
    S, y = torch.zeros(40, 3).double(), []
    for t in range(5):
        S = torch.exp(-net.A_log.exp() * step[t, :, None]) * S + (step[t] * x[t])[:, None] * B[t]
        y.append(S @ C[t] + net.D * x[t])
    out, state = net(given, JaggedLayout.from_lengths([5]))
    torch.testing.assert_close(out, (torch.stack(y) * F.silu(z)) @ net.out_proj.weight.T)
    assert state is None


def test_the_published_block_has_this_many_parameters():
    """A published layer of 72,128, less the norm of 128 and the feed-forward of 33,216 that follow the block."""
    net = MambaMixer(MambaMixerConfig(width=64))
    assert sum(p.numel() for p in net.parameters()) == 72_128 - 128 - 33_216


def test_it_starts_as_mamba_does():
    torch.manual_seed(0)
    net = MambaMixer(MambaMixerConfig(width=64))
    step = F.softplus(net.dt_bias)
    assert 1e-3 <= step.min() < 3e-3
    assert 0.03 < step.max() <= 0.1
    torch.testing.assert_close(net.A_log.exp(), torch.arange(1.0, 33).repeat(128, 1))
    assert (net.D == 1).all()
    assert 0.4 < net.dt_proj.weight.abs().max() <= 0.5  # 4 numbers in
    assert [linear.bias for linear in (net.in_proj, net.x_proj, net.dt_proj, net.out_proj)] == [None] * 4


@pytest.mark.parametrize(("width", "rank"), [(8, 1), (16, 1), (17, 2), (64, 4)])
def test_steps_pass_through_a_sixteenth_of_the_width_rounded_up(width, rank):
    assert MambaMixer(MambaMixerConfig(width=width)).dt_proj.weight.shape == (2 * width, rank)


def test_a_batch_gives_what_its_rows_give_alone():
    net, x = mixer(), events()
    alone = [net(row, JaggedLayout.from_lengths([len(row)]))[0] for row in x.split(LENGTHS)]
    torch.testing.assert_close(net(x, LAYOUT)[0], torch.cat(alone), atol=1e-10, rtol=0)


def test_an_event_knows_its_past_and_nothing_else():
    net, x = mixer(), events()
    jacobian = torch.autograd.functional.jacobian(lambda x: net(x, LAYOUT)[0], x)  # (T, D, T, D)
    knows = (jacobian != 0).any(3).any(1)
    row, position = LAYOUT.row_of_event, LAYOUT.position
    assert torch.equal(knows, (row[:, None] == row) & (position[:, None] >= position))


@pytest.mark.parametrize("split", range(5))
def test_going_on_from_a_state_gives_the_whole(split):
    net, x, layout = mixer(), events(4), JaggedLayout.from_lengths([4])
    whole, final = net(x, layout, no_state(1))
    first, state = net(x[:split], JaggedLayout.from_lengths([split]), no_state(1))
    second, state = net(x[split:], JaggedLayout.from_lengths([4 - split]), state)
    torch.testing.assert_close(torch.cat([first, second]), whole, atol=1e-12, rtol=0)
    torch.testing.assert_close(state, final, atol=1e-12, rtol=0)
    torch.testing.assert_close(whole, net(x, layout)[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("lengths", [LENGTHS, [1], [0, 0], []], ids=str)
def test_gradients_reach_every_parameter(lengths, dtype):
    net, x = mixer().to(dtype), events(sum(lengths)).to(dtype).requires_grad_()
    out, _ = net(x, JaggedLayout.from_lengths(lengths))
    assert out.shape == x.shape
    out.square().sum().backward()
    for name, tensor in {"x": x, **dict(net.named_parameters())}.items():
        assert tensor.grad is not None, name
        assert tensor.grad.isfinite().all(), name
        assert max(lengths, default=0) < 2 or tensor.grad.any(), name


def test_the_derivative_is_the_derivative():
    net, x = mixer(MambaMixerConfig(width=3, state=2)), events()[:, :3].contiguous()
    names = [*dict(net.named_parameters())]

    def named(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(net, dict(zip(names, parameters, strict=True)), (x, LAYOUT))[0]

    inputs = [x, *(p.detach() for p in net.parameters())]
    assert torch.autograd.gradcheck(named, [t.requires_grad_() for t in inputs], fast_mode=True)


def test_steps_and_states_stay_fp32_under_autocast(monkeypatch):
    seen = {}

    def spy(x, dt, A, B, C, layout, **options):
        wide = {"dt": dt, "A": A, **{name: options[name] for name in ("dt_bias", "D", "initial_state")}}
        seen.update({name: t.dtype for name, t in wide.items()})
        return scan_door.selective_scan(x, dt, A, B, C, layout, **options)

    monkeypatch.setattr(mamba_mixer, "selective_scan", spy)
    net, x, state = mixer().float(), events().float(), MambaMixerState(*(t.float() for t in no_state(4)))
    with torch.autocast("cpu", torch.bfloat16):
        out, after = net(x, LAYOUT, state)
    assert out.dtype == torch.bfloat16
    assert set(seen.values()) == {torch.float32}
    assert (after.conv.dtype, after.ssm.dtype) == (torch.float32, torch.float32)
    wanted = net(x, LAYOUT, state)[0]
    assert (out.float() - wanted).abs().max() < 0.03 * wanted.abs().max()


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_the_kernels_give_what_the_cpu_gives(autocast, device, monkeypatch):
    net, x = mixer().float(), events().float()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        wanted = net(x, LAYOUT)[0]
    if INTERPRETED:  # the doors of a CPU tensor lead to the kernels, which cut rows of few events
        monkeypatch.setattr(scan_door, "selective_scan_stepped", selective_triton.selective_scan_triton)
        monkeypatch.setattr(conv_door, "short_conv_stream", short_conv_triton.short_conv_triton)
        monkeypatch.setattr(selective_triton, "CHUNK", 2)
        monkeypatch.setattr(short_conv_triton, "RUN", 2)
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        got = net.to(device)(x.to(device), LAYOUT.to(device))[0]
    tolerance = 0.03 if autocast else 1e-5
    assert got.dtype == wanted.dtype
    assert (got.cpu() - wanted).abs().max() < tolerance * wanted.abs().max()


def test_sizes_below_one_are_refused():
    with pytest.raises(ConfigError, match="state must be at least 1, got 0; raise it"):
        MambaMixerConfig(width=8, state=0)


def test_what_does_not_fit_is_refused():
    with pytest.raises(JaggedLayoutError, match=r"events must be \(7, ...\)"):
        mixer()(events(6), LAYOUT)
    with pytest.raises(ShapeError, match=r"tail must be \(4, 3, 40\)"):
        mixer()(events(), LAYOUT, no_state(3))
