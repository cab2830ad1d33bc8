"""Does a catalogue fit, and on how many GPUs: worked out on any machine, before there are any.

`fit` judges; a next-item model needs, beside tables and dense part:

    activations   events x width x layers x SAVED_FLOATS x 4: histories are jagged, so events are all there is
    loss          scored in place: queries of all ranks, one chunk of the table, one block of scores or, where the
                  kernels take the width, none; else the candidates and queries, and their gradients
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any

import torch

from ssd_torchrec.data.objective import ObjectiveConfig
from ssd_torchrec.distributed.fit import Fit, FitRequest, Need, dense_bytes, judge
from ssd_torchrec.distributed.plan import ShardingConfig, Workload
from ssd_torchrec.distributed.rank_storage import TablePlacement
from ssd_torchrec.distributed.scoring import num_candidates, scores_in_place
from ssd_torchrec.distributed.tables import tables_of
from ssd_torchrec.distributed.vocab_parallel import QUERIES_PER_BLOCK, ROWS_PER_CHUNK
from ssd_torchrec.encoders.encoder import EncoderConfig
from ssd_torchrec.encoders.registry import name_of
from ssd_torchrec.errors import ConfigError
from ssd_torchrec.models.next_item import ITEM_TABLE, NextItemModel, TablesConfig
from ssd_torchrec.ops.item_softmax_triton import LARGEST_BLOCK, PROGRAMS, WIDEST

SAVED_FLOATS = {
    "tim4rec": 52.0,
    "ssd4rec": 75.0,
    "ssd4rec_star": 51.0,
    "bi_tim4rec": 63.0,
    "recmamba": 33.0,
    "mamba4rec": 50.0,
    "sasrec": 14.0,
    "tisasrec": 13.0,
    "bert4rec": 22.0,
    "gru4rec": 18.0,
    "caser": 16.0,
    "lrurec": 27.0,
}
"""Numbers that an encoder keeps for backward, for each event, channel and layer, by the system's name.

Measured on the CPU in fp32, in training mode, on the small preset of each system (64 wide): 16 rows of 40 to 60 events
(Caser of less), forward under `torch.autograd.graph.saved_tensors_hooks`, the bytes of every storage that was saved
counted once, without parameters and the events themselves, over 4 x events x width x layers. TiM4Rec has 52.0 there,
51.7 on rows of 1,000 events, and 47 where it is 256 wide. The kernels of a GPU save other tensors: expect the same
size, not the same number."""


@dataclass(frozen=True, kw_only=True)
class CapacityRequest(FitRequest):
    """What is to fit where."""

    items: int
    """Items of the catalogue, at least 1."""

    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What is asked for, which decides how many candidates a batch lists."""

    context: dict[str, int] = field(default_factory=dict)
    """Context features: name, and how many ids it draws from."""

    event_columns: dict[str, int] = field(default_factory=dict)
    """Event columns: name, and how many ids it draws from."""

    tokens_per_batch: int = 4096
    """Events of one global batch, over all ranks."""

    num_oov_buckets: int = 16
    """Rows of the item table for unknown ids."""

    def __post_init__(self) -> None:
        self._at_least(1, "items", "tokens_per_batch", "num_oov_buckets")
        super().__post_init__()
        for kind in ("context", "event_columns"):
            if taken := sorted({ITEM_TABLE, "candidate"}.intersection(getattr(self, kind))):
                raise ConfigError(f"{kind} must be named other than the items, got {', '.join(taken)}; rename it")


@dataclass(frozen=True, kw_only=True)
class Capacity(Fit):
    """The answer for a next-item model."""

    scored_in_place: bool
    """Whether the softmax goes over the table where it lies, and batches list no candidates."""

    events_per_rank: int
    """Of a batch."""

    candidates_per_rank: int
    """Items that a rank's batch lists, at most."""


def plan_capacity(request: CapacityRequest) -> Capacity:
    """Place the tables, count what every rank needs, and judge whether that fits. Starts no process and needs no GPU.

    Raises:
        ConfigError: the split does not fit the ranks, or the optimizer, the loss or the kernel not the split. That
            something does not fit the memory is an answer, not an error.

    Deterministic.
    """
    with torch.device("meta"):
        tower = request.encoder.build()
        tables = TablesConfig(
            num_item_rows=1 + request.num_oov_buckets + request.items,
            first_item=1 + request.num_oov_buckets,
            context=request.context,
            event_columns=request.event_columns,
        )
        model = NextItemModel(tables, tower, table_device="meta")
    need = _NextItemNeed(request, tables_of(model), dense_bytes(model, request.dense))
    fit = judge(model, need)
    config = need.resolved(request.ranks)
    return Capacity(
        **vars(fit),
        scored_in_place=need.in_place(config),
        events_per_rank=need.events(request.ranks),
        candidates_per_rank=need.candidates(config, request.ranks),
    )


def encoder_bytes(encoder: EncoderConfig, events: int) -> int:
    """What an encoder keeps for backward of so many events, in fp32; see `SAVED_FLOATS`."""
    layers = getattr(encoder, "layers", 1)  # some systems have one, and no field for it
    return ceil(4 * events * encoder.width * layers * SAVED_FLOATS[name_of(encoder)])


@dataclass(frozen=True)
class _NextItemNeed(Need):
    request: CapacityRequest

    @property
    def main_table(self) -> str:
        return ITEM_TABLE

    def workload(self, config: ShardingConfig, ranks: int) -> Workload:
        length = self.request.mean_length
        rows = max(1, round(self.request.tokens_per_batch / length / ranks))
        candidates = self.candidates(config, ranks)
        of_events = dict.fromkeys(["item", *self.request.event_columns], length)
        return Workload(rows_per_rank=rows, ids_per_row=of_events | {"candidate": candidates / rows})

    def activations_bytes(self, ranks: int) -> int:
        return encoder_bytes(self.request.encoder, self.events(ranks))

    def loss_bytes(self, config: ShardingConfig, ranks: int, placed: Sequence[TablePlacement]) -> int:
        events, width = self.events(ranks), self.request.encoder.width
        if not self.in_place(config):
            return 4 * width * 2 * (events + self.candidates(config, ranks))
        items = next(table for table in placed if table.name == ITEM_TABLE)
        rows = max(shard.num_rows for shard in items.shards)
        everyone, chunk = ranks * events, min(ROWS_PER_CHUNK["cuda"], rows)
        queries = width * (2 * everyone + 3 * events)  # with their gradients, and what looked-up rows wait with
        tiled = width <= WIDEST  # scores live in registers, what splits of the rows give the queries does not
        scores = PROGRAMS * LARGEST_BLOCK * width if tiled else min(QUERIES_PER_BLOCK["cuda"], everyone) * chunk
        sums = 2 * 5 * everyone  # in fp64
        return 4 * (queries + scores + sums + 3 * chunk * width)  # a chunk's gradient, and what its step makes of it

    def relief(self) -> tuple[str, dict[str, Any]] | None:
        objective = self.request.objective
        if objective.loss == "sampled_softmax":
            return None
        return "sampled_softmax", {"objective": replace(objective, loss="sampled_softmax", scored="auto")}

    def events(self, ranks: int) -> int:
        """Of a rank's batch: its share, or a whole history if that is more."""
        return ceil(max(self.request.tokens_per_batch / ranks, self.request.mean_length))

    def in_place(self, config: ShardingConfig) -> bool:
        return scores_in_place(self.request.objective, config, self.request.items)

    def candidates(self, config: ShardingConfig, ranks: int) -> int:
        """Items that a rank's batch lists, at most."""
        request = self.request
        listed = num_candidates(request.objective, request.items, request.tokens_per_batch, self.events(ranks))
        return 0 if self.in_place(config) else listed
