import torch
import torch.nn.functional as F

from ssd_torchrec.modules.feed_forward import FeedForward


def test_it_adds_what_came_in_and_normalises():
    torch.manual_seed(0)
    layer, x = FeedForward(8, 32, dropout=0.0), torch.randn(5, 8)
    hidden = F.hardswish(x @ layer.expand.weight.T) @ layer.contract.weight.T  # biases start at 0
    torch.testing.assert_close(layer(x), F.layer_norm(hidden + x, (8,), eps=1e-12))


def test_what_it_drops_differs_from_call_to_call_in_training_only():
    layer, x = FeedForward(8, 32, dropout=0.5), torch.randn(5, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
