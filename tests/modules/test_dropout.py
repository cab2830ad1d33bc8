import torch

from ssd_torchrec.modules.dropout import Dropout


def test_it_drops_in_training_only():
    dropout, x = Dropout(0.5), torch.ones(1000)
    assert 400 < (dropout(x) == 0).sum() < 600
    assert torch.equal(dropout.eval()(x), x)
