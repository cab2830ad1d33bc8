"""GRU4Rec: a gated recurrent unit over each row; causal, jagged, streaming.

    x = dropout(events)
    for each layer:   x = gru(x)             with dropout between layers
    out = linear(x)

Source: Hidasi et al. 2016, GRU4Rec, arXiv:1511.06939. The map back to the width and the sizes of the presets are those
of RecBole, which the comparisons with state-space encoders ran.

PyTorch's GRU takes rows step by step, all rows that have a step side by side: a `PackedSequence`. It is built straight
from the layout, longest rows first, without padding.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ssd_torchrec.encoders.encoder import EncoderConfig, StreamingEncoder, check_state
from ssd_torchrec.errors import ConfigError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.modules.dropout import Dropout
from ssd_torchrec.modules.linear import Linear
from ssd_torchrec.ops.precision import as_given
from ssd_torchrec.ops.rows import rearrange


@dataclass(frozen=True, kw_only=True)
class GRU4RecConfig(EncoderConfig):
    """Shape of the encoder; the defaults are those for MovieLens, 64 wide."""

    title: ClassVar[str] = "GRU4Rec"
    paper: ClassVar[str] = "Hidasi et al. 2016, arXiv:1511.06939"

    width: int = 64
    """Channels D of an event, in and out."""

    layers: int = 1
    """Recurrent units, one on top of the other."""

    hidden: int = 128
    """Channels of a unit's state."""

    dropout: float = 0.2
    """Of events and of what goes from unit to unit."""

    def __post_init__(self) -> None:
        for name in ("width", "layers", "hidden"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}; raise it")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must be in [0, 1), got {self.dropout}; it is a share, not percent")

    @property
    def causal(self) -> bool:
        """Always."""
        return True

    @property
    def streams(self) -> bool:
        """Always."""
        return True

    def build(self) -> "GRU4Rec":
        """The encoder with new weights."""
        return GRU4Rec(self)


PRESETS: dict[str, GRU4RecConfig] = {
    "ml-1m-64d": GRU4RecConfig(),
    "beauty-64d": GRU4RecConfig(dropout=0.4),
}
"""Width and dropout of the comparisons with state-space encoders. They cut histories to 200 and 50 events, which this
encoder need not."""


class GRU4RecState(NamedTuple):
    """What the encoder keeps of a row, of one size whatever the row has seen."""

    hidden: Tensor  # (B, L, hidden) state of each of the L units


@dataclass(frozen=True, eq=False)
class _Steps:
    """The events of a batch step by step: the first of all rows, the second of all that have one, and so on.

    # lengths   1  0  3        rows  2 0        order  1 0 2 3        rows_at  2 1 1
    """

    order: Tensor  # (T,) int64 events, of each step those of the longest rows first
    inverse: Tensor  # (T,) int64
    rows: Tensor  # rows with events, longest first
    rows_at: Tensor  # (longest,) int64 rows that have each step; on the host, where PyTorch wants it


_STEPS: WeakKeyDictionary[JaggedLayout, _Steps] = WeakKeyDictionary()


def _steps_of(layout: JaggedLayout) -> _Steps:
    """Built at first use, which on a GPU waits for the device, and kept as long as the layout lives."""
    if layout not in _STEPS:
        _STEPS[layout] = _laid_out(layout.to("cpu"), layout.offsets.device)
    return _STEPS[layout]


def _laid_out(host: JaggedLayout, device: torch.device) -> _Steps:
    lengths, rows = host.offsets.diff().sort(descending=True, stable=True)
    order = (host.position * host.num_rows + rows.argsort()[host.row_of_event]).argsort()
    rows, rows_at = rows[lengths > 0], host.position.bincount()
    return _Steps(order.to(device), order.argsort().to(device), rows.to(device), rows_at)


class GRU4Rec(StreamingEncoder[GRU4RecState]):
    """The encoder: `forward` trains on whole histories, `append` goes on from a state; both run the same code."""

    def __init__(self, config: GRU4RecConfig) -> None:
        super().__init__()
        self.config = config
        self.width = config.width
        self.dropout = Dropout(config.dropout)
        inputs = [config.width] + [config.hidden] * (config.layers - 1)
        self.units = nn.ModuleList(nn.GRU(size, config.hidden) for size in inputs)
        self.out_proj = Linear(config.hidden, config.width)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.xavier_uniform_(parameter)
            else:
                nn.init.zeros_(parameter)

    def forward(self, events: Tensor, timestamps: Tensor, layout: JaggedLayout) -> Tensor:
        """Encode whole histories; timestamps make no difference.

        Args:
            events: (T, D).
            timestamps: (T,) int64 unix seconds.

        Returns:
            (T, D), each event's vector from it and earlier events of its row only, in the dtype of the parameters.

        Raises:
            JaggedLayoutError: `events` or `timestamps` are not those of `layout`.

        Deterministic on the CPU; on a GPU as far as cuDNN is. With T = 0 every parameter still gets a gradient, of
        zeros. Units stay in the dtype of their parameters under autocast.
        """
        return self.append(events, timestamps, layout, self.initial_state(layout.num_rows))[0]

    def initial_state(self, rows: int) -> GRU4RecState:
        """Zeros: the state of rows that have seen nothing."""
        return GRU4RecState(self.out_proj.weight.new_zeros(rows, self.config.layers, self.config.hidden))

    def append(
        self, events: Tensor, timestamps: Tensor, layout: JaggedLayout, state: GRU4RecState
    ) -> tuple[Tensor, GRU4RecState]:
        """Go on from `state`; see `StreamingEncoder.append`.

        Raises:
            JaggedLayoutError: events, timestamps or state are not those of `layout`.
        """
        layout.check(events)
        layout.check(timestamps)
        check_state(state, layout)
        if not layout.num_events:
            return self.out_proj(self._nothing(events)), state
        steps = _steps_of(layout)
        x, kept = rearrange(events, steps.order, steps.inverse), []
        for depth, unit in enumerate(self.units):
            x, hidden = _run(unit, self.dropout(x), state.hidden[steps.rows, depth], steps.rows_at)
            kept.append(state.hidden[:, depth].index_copy(0, steps.rows, hidden))
        out = self.out_proj(rearrange(x, steps.inverse, steps.order))
        return out, GRU4RecState(torch.stack(kept, dim=1))

    def _nothing(self, events: Tensor) -> Tensor:
        """(0, hidden), and every unit in the graph."""
        zero = torch.stack([p.flatten()[:0].sum() for p in self.units.parameters()]).sum() + events.sum()
        return zero.expand(0, self.config.hidden)


def _run(unit: nn.Module, x: Tensor, hidden: Tensor, rows_at: Tensor) -> tuple[Tensor, Tensor]:
    """One unit over all steps: (T, inputs) in their order and (rows, hidden) to both after it."""
    x = x.to(hidden.dtype)
    with as_given(x):
        if torch.is_grad_enabled() and not x.is_cuda:
            return _run_step_by_step(unit, x, hidden, rows_at)
        out, last = unit(PackedSequence(x, rows_at), hidden[None])
    return out.data, last[0]


def _run_step_by_step(unit: nn.Module, x: Tensor, hidden: Tensor, rows_at: Tensor) -> tuple[Tensor, Tensor]:
    """The same: PyTorch's gradient of a packed sequence on the CPU writes all of it anew for each step."""
    of_input, of_hidden, input_bias, hidden_bias = unit.parameters()
    outputs = []
    for step in x.split(rows_at.tolist()):
        outputs.append(torch.gru_cell(step, hidden[: len(step)], of_input, of_hidden, input_bias, hidden_bias))
        hidden = torch.cat([outputs[-1], hidden[len(step) :]])  # rows that have ended keep theirs
    return torch.cat(outputs), hidden
