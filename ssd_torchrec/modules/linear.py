"""`torch.nn.Linear` of events, through our operator."""

from torch import Tensor, nn

from ssd_torchrec.ops.linear import linear


class Linear(nn.Linear):
    """`x weight^T + bias`, event by event."""

    def forward(self, input: Tensor) -> Tensor:
        """(T, D) in, (T, E) out."""
        return linear(input, self.weight, self.bias)
