"""Predict every next item of a history from one sharded item table.

    ids ─► EmbeddingCollection ─► (T, D) ─┐
    event columns ─► EmbeddingCollection ─┴─► (T, D) events ─► encoder ─► (T, D) ─┐
    context bags ─► EmbeddingBagCollection ─► (B, F·D) ─► linear ─────────────────┴─► queries (T, D)
    candidate ids ─► the same item table ─► (C, D) ─► softmax over queries · candidates

Events keep their order, so they come from an EmbeddingCollection; context features are pooled to one vector a row, so
they come from an EmbeddingBagCollection. Features "item" and "candidate" share one table: input and output embeddings
are tied. What else is known of an event, such as its action or category, is added to its item's vector; candidates are
items alone. Event columns have a collection of their own: a table that is scored in place shares its lookup with none.

The forward below is the only code that TorchRec's pipeline traces symbolically. Everything in it that holds no table
(the tower, the loss) is a leaf to the tracer and may do as it likes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    JaggedTensor,
    KeyedJaggedTensor,
    PoolingType,
)

from ssd_torchrec.data.batch import IDS_A_ROW, Batch
from ssd_torchrec.data.rows import even_offsets
from ssd_torchrec.encoders.encoder import Encoder
from ssd_torchrec.errors import ConfigError
from ssd_torchrec.ops.item_softmax import item_softmax
from ssd_torchrec.ops.precision import as_given

ITEM_TABLE = "item"
ITEM_WEIGHT = f"items.embeddings.{ITEM_TABLE}.weight"  # of a NextItemModel's state
INIT_STD = 0.02  # of every table, as all the published systems have it


@dataclass(frozen=True, kw_only=True)
class TablesConfig:
    """Which embedding tables a next-item model has; their width is the encoder's."""

    num_item_rows: int
    """Rows of the item table: mask, out-of-vocabulary buckets, items."""

    first_item: int
    """First row that is an item; the rows before it are never candidates."""

    context: dict[str, int] = field(default_factory=dict)
    """Context features: name of the bag a row carries, and how many ids it draws from."""

    event_columns: dict[str, int] = field(default_factory=dict)
    """Event columns: name of the key with an id an event, and how many ids it draws from; 0 is unknown."""

    def __post_init__(self) -> None:
        if not 0 < self.first_item < self.num_item_rows:
            raise ConfigError(
                f"the item table must hold at least one item after its {self.first_item} reserved rows, got "
                f"{self.num_item_rows} rows in all; take both numbers from the data set's meta.json"
            )
        for kind, counts in {"context features": self.context, "event columns": self.event_columns}.items():
            if empty := [name for name, values in counts.items() if values < 1]:
                raise ConfigError(f"{kind} must have at least 1 id, got {empty} with none; drop them")
        if both := sorted(self.context.keys() & self.event_columns):
            raise ConfigError(f"context features and event columns must have names of their own, got {both} twice")

    @property
    def num_items(self) -> int:
        """Items that can be recommended."""
        return self.num_item_rows - self.first_item


class QueryTower(nn.Module):
    """What each event asks for: the encoded history so far, shifted by the user's context, a mean over each bag."""

    def __init__(self, encoder: Encoder, contexts: Sequence[str], autocast_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.contexts = tuple(contexts)
        num = len(self.contexts)
        self.context_proj = nn.Linear(num * encoder.width, encoder.width, bias=False) if num else None
        self.autocast_dtype = autocast_dtype

    def forward(self, events: Tensor, context: Tensor | None, batch: Batch) -> Tensor:
        """Encode (T, D) events and (B, F·D) sums of context bags to (T, D) fp32 queries."""
        layout = batch.layout
        if context is not None:
            context = _mean(context, batch.features, self.contexts)
        with torch.autocast(events.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            queries = self.encoder(events, batch.features["timestamp"].values(), layout)
            if self.context_proj is not None:
                queries = queries + self.context_proj(context)[layout.row_of_event]
        return queries.float() if queries.dtype != torch.float64 else queries


class FullSoftmaxLoss(nn.Module):
    """Cross-entropy over the batch's candidates, averaged over the targets of the global batch.

    A rank returns (its sum) x world / (global targets): TorchRec and DDP average gradients over ranks, so what the
    optimizer sees is the mean over the global batch, however many ranks share it.
    """

    def __init__(self, world_size: int = 1) -> None:
        super().__init__()
        self.world_size = world_size

    def forward(self, queries: Tensor, candidates: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """From (T, D) queries and (C, D) candidates.

        Returns:
            () loss to differentiate; (2,) detached: this rank's sum in nats, and its number of targets.
        """
        total = item_softmax(queries, candidates, batch.target).sum()
        local = torch.stack([total.detach(), (batch.target >= 0).sum().to(total)])
        return total * (self.world_size / batch.global_targets), local


class BinaryCrossEntropyLoss(nn.Module):
    """Each target against one wrong item: -log sigmoid(target's score) - log sigmoid(-other's), averaged as above.

    Source: Kang & McAuley 2018, SASRec, arXiv:1808.09781, section 3.6.
    """

    def __init__(self, world_size: int = 1) -> None:
        super().__init__()
        self.world_size = world_size

    def forward(self, queries: Tensor, candidates: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """From (T, D) queries and (C, D) candidates, in fp32 or the dtype of both; returns as `FullSoftmaxLoss`."""
        assert batch.negative is not None, "the objective draws negatives"
        asked = batch.target >= 0
        queries = queries[asked]
        right, wrong = ((queries * candidates[of[asked]]).sum(-1) for of in (batch.target, batch.negative))
        total = (F.softplus(-right) + F.softplus(wrong)).sum()
        return total * (self.world_size / batch.global_targets), torch.stack([total.detach(), asked.sum().to(total)])


class SampledSoftmaxLoss(nn.Module):
    """Cross-entropy over the items S drawn for the batch and each query's own target, averaged as above.

        o[i, k] = queries[i] . candidates[k] - log_q[k]
        loss[i] = log(exp o[i, t] + sum over k in S except t of exp o[i, k]) - o[i, t]          t: target of query i

    A target that was drawn counts once; targets of other queries that were not drawn do not count. That t, of S and t,
    is what was asked for has a chance in proportion to that of t in the whole catalogue over q[t]: so with log_q
    subtracted the scores learn the logarithms of the chances in the whole catalogue.

    Source: Bengio & Senécal 2008, Adaptive importance sampling; Jean et al. 2015, arXiv:1412.2007; Yi et al. 2019,
    Sampling-bias-corrected neural modeling, RecSys, for S the targets of the batch.
    """

    def __init__(self, world_size: int = 1) -> None:
        super().__init__()
        self.world_size = world_size

    def forward(self, queries: Tensor, candidates: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """From (T, D) queries and (C, D) candidates, in fp32 or the dtype of both; returns as `FullSoftmaxLoss`."""
        asked = batch.target >= 0
        queries = queries.masked_fill(~asked[:, None], 0)  # one that is not asked may be anything, even NaN
        with as_given(queries):  # half precision would lose what is left of candidate 0's gradient, below
            total = torch.where(asked, _sampled_softmax(queries, candidates, batch), 0).sum()
        return total * (self.world_size / batch.global_targets), torch.stack([total.detach(), asked.sum().to(total)])


def _sampled_softmax(queries: Tensor, candidates: Tensor, batch: Batch) -> Tensor:
    """(T,) loss where there is a target; any finite number elsewhere.

    The (T, S) scores are never held. Where the target t was drawn the loss is that over S. Elsewhere the loss over S
    with candidate 0 for its target, plus candidate 0's score, is the log of the sum over S that o[t] is held against.
    """
    assert batch.log_q is not None, "the objective draws negatives"
    drawn, log_q = candidates[: batch.num_shared], batch.log_q[: batch.num_shared]
    is_drawn = batch.target < batch.num_shared
    over_drawn = item_softmax(queries, drawn, torch.where(is_drawn, batch.target, 0), log_q=log_q)
    others = over_drawn + (queries * drawn[0]).sum(-1) - log_q[0]
    at = batch.target.clamp_min(0)
    right = (queries * candidates[at]).sum(-1) - batch.log_q[at]
    return torch.where(is_drawn, over_drawn, -F.logsigmoid(right - others))


class NextItemModel(nn.Module):
    """Tables, encoder and loss, in the shape that TorchRec's sharders and pipelines expect.

    Args:
        tables: which tables to build.
        encoder: turns (T, D) events to (T, D); its width is the width of every table.
        loss: from (queries (T, D), candidates (C, D), batch) to what `forward` returns.
        table_device: "meta" when a sharder will allocate the tables, else where they live.
        autocast_dtype: run the encoder in this dtype (bf16 on CUDA); None for full precision.
    """

    def __init__(
        self,
        tables: TablesConfig,
        encoder: Encoder,
        loss: Callable[[Tensor, Tensor, Batch], tuple[Tensor, Tensor]] | None = None,
        *,
        table_device: str | torch.device = "cpu",
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.tables = tables
        self.items = EmbeddingCollection(
            tables=[
                EmbeddingConfig(
                    name=ITEM_TABLE,
                    num_embeddings=tables.num_item_rows,
                    embedding_dim=encoder.width,
                    feature_names=["item", "candidate"],
                    init_fn=_init_table,
                )
            ],
            device=torch.device(table_device),
        )
        self.event_columns = _event_tables(tables, encoder.width, torch.device(table_device))
        self.contexts = _context_tables(tables, encoder.width, torch.device(table_device))
        self.tower = QueryTower(encoder, list(tables.context), autocast_dtype)
        self.loss = loss or FullSoftmaxLoss()

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """One training step: the () loss to differentiate; (2,) detached, this rank's sum in nats and its targets."""
        embedded = self.items(batch.features)
        queries = self._queries(embedded, batch)
        return self.loss(queries, embedded["candidate"].values(), batch)

    def last_queries(self, batch: Batch) -> Tensor:
        """What each row asks for after its last event: (B, D) fp32; an empty row gives zeros.

        Collective when the tables are sharded: every rank calls it with a batch of its own.
        """
        queries = self._queries(self.items(batch.features), batch)
        last = batch.layout.last_event
        if not len(queries):
            return queries.new_zeros(len(last), queries.shape[1])
        return torch.where((last >= 0)[:, None], queries[last.clamp_min(0)], 0)

    def _queries(self, embedded: Mapping[str, JaggedTensor], batch: Batch) -> Tensor:
        """(T, D) fp32, from what the items' collection has looked up."""
        columns = self.event_columns(batch.features) if self.event_columns is not None else {}
        context = self.contexts(batch.features).values() if self.contexts is not None else None
        events = embedded["item"].values()
        for name in self.tables.event_columns:
            events = events + columns[name].values()
        return self.tower(events, context, batch)

    def item_vectors(self, ids: Tensor) -> Tensor:
        """Table rows of (C,) int64 ids: (C, D). Collective when the table is sharded."""
        # all a sharded collection has ever seen
        keys = ["item", "timestamp", "candidate", *self.tables.context, *self.tables.event_columns]
        rows = max(-(-len(ids) // IDS_A_ROW), 1)
        lengths = torch.zeros(len(keys), rows, dtype=torch.int64)
        lengths[keys.index("candidate")] = torch.from_numpy(even_offsets(len(ids), rows)).diff()
        features = KeyedJaggedTensor(keys=keys, values=ids, lengths=lengths.flatten().to(ids.device))
        return self.items(features)["candidate"].values()


def _mean(sums: Tensor, features: KeyedJaggedTensor, keys: Sequence[str]) -> Tensor:
    """(B, F·D) sums over bags to means, 0 for an empty bag: TorchRec adds up the ranks' means under grid_shard."""
    lengths = features.lengths().view(len(features.keys()), -1)
    of_keys = torch.stack([lengths[features.keys().index(key)] for key in keys], dim=1)
    means = sums.view(*of_keys.shape, sums.shape[1] // len(keys)) / of_keys.clamp_min(1)[..., None]
    return means.flatten(1)


def _event_tables(tables: TablesConfig, width: int, device: torch.device) -> EmbeddingCollection | None:
    if not tables.event_columns:
        return None
    return EmbeddingCollection(
        tables=[
            EmbeddingConfig(
                name=name,
                num_embeddings=values,
                embedding_dim=width,
                feature_names=[name],
                init_fn=nn.init.zeros_,  # a value that training never saw adds nothing; those it saw learn at once
            )
            for name, values in tables.event_columns.items()
        ],
        device=device,
    )


def _context_tables(tables: TablesConfig, width: int, device: torch.device) -> EmbeddingBagCollection | None:
    if not tables.context:
        return None
    return EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=name,
                num_embeddings=values,
                embedding_dim=width,
                feature_names=[name],
                pooling=PoolingType.SUM,
                init_fn=_init_table,
            )
            for name, values in tables.context.items()
        ],
        device=device,
    )


def _init_table(weight: Tensor) -> Tensor:
    return nn.init.normal_(weight, std=INIT_STD)
