"""`torch.nn.Dropout`, through our operator."""

from torch import Tensor, nn

from ssd_torchrec.ops.dropout import dropout


class Dropout(nn.Dropout):
    """In training, zeros with chance p, the rest scaled up; else nothing."""

    def forward(self, input: Tensor) -> Tensor:
        """Of any shape."""
        return dropout(input, self.p, training=self.training)
