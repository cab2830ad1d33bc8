import math

import pytest
import torch
import torch.nn.functional as F

from ssd_torchrec.errors import ConfigError, JaggedLayoutError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.modules.attention import PointwiseFeedForward, Positions, SelfAttention

LAYOUT = JaggedLayout.from_lengths([3, 0, 2])


@pytest.mark.parametrize("has_out_proj", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_that_of_each_head_side_by_side(causal, has_out_proj):
    torch.manual_seed(0)
    net = SelfAttention(8, 2, causal=causal, dropout=0.0, has_out_proj=has_out_proj).double()
    x = torch.randn(5, 8, dtype=torch.float64)
    rows = []
    for row in x.split([3, 2]):
        query, key, value = (part.view(len(row), 2, 4).transpose(0, 1) for part in net.in_proj(row).chunk(3, -1))
        scores = query @ key.mT / math.sqrt(4)
        if causal:
            scores += torch.full((len(row), len(row)), -math.inf).triu(1)
        rows.append((scores.softmax(-1) @ value).transpose(0, 1).reshape(len(row), 8))
    wanted = torch.cat(rows) @ net.out_proj.weight.T if has_out_proj else torch.cat(rows)
    torch.testing.assert_close(net(x, LAYOUT), wanted)


def test_weights_are_dropped_in_training_only():
    torch.manual_seed(0)
    net, x = SelfAttention(8, 2, causal=True, dropout=0.5, has_out_proj=False), torch.randn(5, 8)
    assert not torch.equal(net(x, LAYOUT), net(x, LAYOUT))
    net.eval()
    assert torch.equal(net(x, LAYOUT), net(x, LAYOUT))


@pytest.mark.parametrize(("activation", "apply"), [("relu", F.relu), ("gelu", F.gelu)])
def test_the_feed_forward_is_two_maps_around_its_activation(activation, apply):
    torch.manual_seed(0)
    net, x = PointwiseFeedForward(4, 6, activation, dropout=0.0), torch.randn(5, 4)
    hidden = apply(F.linear(x, net.expand.weight, net.expand.bias))
    torch.testing.assert_close(net(x), F.linear(hidden, net.contract.weight, net.contract.bias))


def test_what_is_dropped_between_its_maps_differs_from_call_to_call_in_training_only():
    net, x = PointwiseFeedForward(4, 64, "relu", dropout=0.5), torch.randn(5, 4)
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))


def test_positions_count_from_the_first_event_of_each_row():
    net = Positions(4, max_length=3)
    assert torch.equal(net(LAYOUT), net.weight[[0, 1, 2, 0, 1]])


def test_a_row_longer_than_the_positions_is_refused():
    net = Positions(4, max_length=3)
    with pytest.raises(JaggedLayoutError, match="at most 3 events, got one of 4; cut histories to their newest"):
        net(JaggedLayout.from_lengths([1, 4]))


def test_heads_that_do_not_split_the_width_are_refused():
    with pytest.raises(ConfigError, match="width 8 does not split into 3 heads"):
        SelfAttention(8, 3, causal=True, dropout=0.0, has_out_proj=False)


def test_an_unknown_activation_is_refused():
    with pytest.raises(ConfigError, match="activation must be relu or gelu, got 'tanh'"):
        PointwiseFeedForward(4, 4, "tanh", dropout=0.0)
