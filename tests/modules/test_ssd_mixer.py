from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ssd_torchrec.errors import ConfigError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.modules import ssd_mixer
from ssd_torchrec.modules.ssd_mixer import SSDMixer, SSDMixerConfig, SSDMixerState, inverse_softplus
from ssd_torchrec.ops.ssd_scan import ssd_scan

CONFIG = SSDMixerConfig(width=8, head_width=4, state=3)  # 4 heads
LAYOUT = JaggedLayout.from_lengths([4, 0, 2])


def mixer(config: SSDMixerConfig = CONFIG) -> SSDMixer:
    torch.manual_seed(0)
    return SSDMixer(config).double()


def test_it_is_the_recurrence_written_out():
    net = mixer(replace(CONFIG, raw_step=1.0))
    x, gate = torch.randn(5, 8).double(), torch.rand(5, 4).double()
    z, xbc, raw = net.in_proj(x).split([16, 22, 4], -1)
    inputs, B, C = net.conv(xbc, JaggedLayout.from_lengths([5]))[0].split([16, 3, 3], -1)
    step, S, y = F.softplus(raw * gate + net.dt_bias), torch.zeros(4, 4, 3).double(), []
    for t in range(5):
        head_inputs = inputs[t].view(4, 4)
        decay = torch.exp(-net.A_log.exp() * step[t])[:, None, None]
        S = decay * S + step[t, :, None, None] * head_inputs[:, :, None] * B[t]
        y.append((S @ C[t] + net.D[:, None] * head_inputs).flatten())
    u = torch.stack(y) * F.silu(z)
    normed = u * (u.square().mean(-1, keepdim=True) + CONFIG.norm_eps).rsqrt()
    out, state = net(x, gate, JaggedLayout.from_lengths([5]))
    torch.testing.assert_close(out, net.out_proj(normed))
    assert state is None


def test_no_gate_is_a_gate_of_one():
    net, x = mixer(), torch.randn(6, 8).double()
    assert torch.equal(net(x, None, LAYOUT)[0], net(x, torch.ones(6, 4).double(), LAYOUT)[0])


def test_the_published_block_has_this_many_parameters():
    """A published layer of 69,051 at 50 slots, less its time branch of 5,291 and what follows the mixer, of 33,344."""
    net = SSDMixer(SSDMixerConfig(width=64))
    assert sum(p.numel() for p in net.parameters()) == 69_051 - 5_291 - 33_344


def test_steps_start_in_the_published_range_at_gate_one():
    net = mixer(SSDMixerConfig(width=64, head_width=1, raw_step=1.0))  # 128 heads
    step = F.softplus(net.in_proj.bias[-128:] + net.dt_bias)
    assert 1e-3 <= step.min() < 3e-3
    assert 0.03 < step.max() <= 0.1
    assert ((net.A_log.exp() >= 1) & (net.A_log.exp() <= 16)).all()
    assert (net.D == 1).all()


def test_inverse_softplus_is_the_inverse():
    y = torch.tensor([1e-4, 0.1, 1.0, 30.0], dtype=torch.float64)
    torch.testing.assert_close(F.softplus(inverse_softplus(y), threshold=100), y)


def test_steps_and_states_stay_fp32_under_autocast(monkeypatch):
    seen = {}

    def spy(x, dt, A, B, C, layout, **options):
        seen.update({name: t.dtype for name, t in {"dt": dt, "A": A, **options}.items() if isinstance(t, torch.Tensor)})
        return ssd_scan(x, dt, A, B, C, layout, **options)

    monkeypatch.setattr(ssd_mixer, "ssd_scan", spy)
    net, x, gate = mixer().float(), torch.randn(6, 8), torch.ones(6, 4)
    state = SSDMixerState(torch.zeros(3, 3, 22), torch.zeros(3, 4, 4, 3))
    with torch.autocast("cpu", torch.bfloat16):
        out, after = net(x, gate, LAYOUT, state)
    assert out.dtype == torch.bfloat16
    assert set(seen.values()) == {torch.float32}
    assert (after.conv.dtype, after.ssm.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(out.float(), net(x, gate, LAYOUT, state)[0], atol=0.02, rtol=0.02)


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="expand \\* width = 16 must split into heads of 5 channels"):
        SSDMixerConfig(width=8, head_width=5)
