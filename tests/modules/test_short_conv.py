import pytest
import torch
import torch.nn.functional as F

from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.modules.short_conv import ShortConv


def test_it_is_the_causal_convolution_of_pytorch():
    torch.manual_seed(0)
    conv, x = ShortConv(3, 4, "silu"), torch.randn(6, 3)
    y, tail = conv(x, JaggedLayout.from_lengths([6]))
    padded = F.pad(x.T[None], (3, 0))
    torch.testing.assert_close(y, F.silu(F.conv1d(padded, conv.weight[:, None], conv.bias, groups=3))[0].T)
    assert tail is None


def test_a_tail_keeps_its_own_dtype():
    conv, layout = ShortConv(2, 3, "hardswish"), JaggedLayout.from_lengths([1, 0])
    y, tail = conv(torch.ones(1, 2, dtype=torch.bfloat16), layout, torch.zeros(2, 2, 2))
    assert (y.dtype, tail.dtype) == (torch.bfloat16, torch.float32)
    assert tail.tolist() == [[[0, 0], [1, 1]], [[0, 0], [0, 0]]]


STARTS = {"uniform": 1 / 12**0.5, "kaiming": (2 / (256 * 4)) ** 0.5}  # of 4 taps: within +-1/2; and std sqrt(2 / (C K))


@pytest.mark.parametrize("init", STARTS)
def test_it_starts_as_published(init):
    torch.manual_seed(0)
    conv = ShortConv(256, 4, "silu", init)
    assert conv.weight.std().item() == pytest.approx(STARTS[init], rel=0.05)
    assert (conv.bias == 0).all() == (init == "kaiming")
