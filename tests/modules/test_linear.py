import torch
from torch import nn

from ssd_torchrec.modules.linear import Linear


def test_it_is_pytorchs_with_the_same_weights():
    ours, theirs = Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(7, 5)
    torch.testing.assert_close(ours(x), theirs(x))
