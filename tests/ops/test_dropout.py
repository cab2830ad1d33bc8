import math

import pytest
import torch

from ssd_torchrec.ops.dropout import LEVELS, dropout

MANY = 400_000


def dropped(share: float, *shape: int, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return dropout(torch.ones(shape), share, training=True)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5, 0.97, 1e-3])
def test_the_share_is_dropped_and_the_mean_stays(share):
    y = dropped(share, MANY)
    error = 5 * math.sqrt(share * (1 - share) / MANY)
    assert abs((y == 0).double().mean().item() - share) < error
    assert abs(y.double().mean().item() - 1) < error / (1 - share)


def test_kept_values_are_scaled_alike():
    x = torch.randn(1000)
    y = dropout(x, 0.2, training=True)
    dropped = round(0.2 * LEVELS)
    torch.testing.assert_close(y[y != 0], x[y != 0] * (LEVELS / (LEVELS - dropped)))


def test_each_place_of_a_drawn_word_drops_as_often_and_alone():
    zero = (dropped(0.3, MANY // 4, 4) == 0).double()
    torch.testing.assert_close(zero.mean(0), torch.full((4,), 0.3).double(), atol=0.008, rtol=0)
    correlation = torch.corrcoef(torch.cat([zero[1:].T, zero[:-1].T])) - torch.eye(8)
    assert correlation.abs().max() < 0.02


def test_the_gradient_passes_where_the_value_did():
    x = torch.randn(7, 5, requires_grad=True)
    y = dropout(x, 0.4, training=True)
    y.sum().backward()
    torch.testing.assert_close(x.grad, (y / x).detach())


@pytest.mark.parametrize("shape", [(0, 4), (1,), (3,), (4, 5), (2, 3, 5)], ids=str)
def test_any_shape_comes_back(shape):
    assert dropped(0.5, *shape).shape == shape


def test_the_seed_decides():
    assert torch.equal(dropped(0.5, 100), dropped(0.5, 100))
    assert not torch.equal(dropped(0.5, 100), dropped(0.5, 100, seed=1))


def test_out_of_training_or_at_zero_nothing_happens():
    x = torch.randn(5)
    before = torch.get_rng_state()
    assert dropout(x, 0.5, training=False) is x
    assert dropout(x, 0.0, training=True) is x
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_dtype_stays(dtype):
    y = dropout(torch.ones(100, dtype=dtype), 0.5, training=True)
    assert y.dtype == dtype
    assert set(y.tolist()) == {0.0, 2.0}


def test_a_device_without_our_bits_takes_pytorchs(device):
    y = dropout(torch.ones(1000, device=device), 0.5, training=True)
    assert set(y.tolist()) == {0.0, 2.0}
