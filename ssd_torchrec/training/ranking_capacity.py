"""Does a ranking model fit these GPUs, and how many does it take: worked out before there are any.

`distributed.fit` judges, of the very model that `ranking_run` trains; beside its tables and dense part it needs:

    activations   of the encoder: events x width x layers x SAVED_FLOATS x 4, see `distributed.capacity`
                  of the rest: what dense part, interaction, top and loss keep of a row, from a pass on "meta"

Lookups are counted at the longest histories, since training tells the planner no other length; activations at the
mean. The loss is a few numbers a row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor
from torchrec.models.dlrm import DLRM

from ssd_torchrec.data.ranking.schema import RankingMeta
from ssd_torchrec.distributed.capacity import encoder_bytes
from ssd_torchrec.distributed.fit import MOST_RANKS, Fit, FitRequest, Need, dense_bytes, judge
from ssd_torchrec.distributed.plan import ShardingConfig, Workload
from ssd_torchrec.distributed.tables import tables_of
from ssd_torchrec.errors import ConfigError
from ssd_torchrec.models.ranking import RankingModel
from ssd_torchrec.training.ranking_config import RankingModelConfig
from ssd_torchrec.training.ranking_run import ranking_model, ranking_workload


@dataclass(frozen=True, kw_only=True)
class RankingCapacityRequest(FitRequest):
    """Which DLRM is to fit where; `mean_length` is of each history, and a history whose longest is less counts that."""

    meta: RankingMeta
    """What the data set holds: features and rows of their tables, histories and the longest of each."""

    model: RankingModelConfig = field(default_factory=RankingModelConfig)
    """The DLRM."""

    rows_per_batch: int = 512
    """Impressions of one global batch, over all ranks: a multiple of their number."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, "rows_per_batch")
        if self.rows_per_batch % self.ranks:
            raise ConfigError(
                f"rows_per_batch must be a multiple of the {self.ranks} ranks, so that each gets as many, got "
                f"{self.rows_per_batch}; raise it to {ceil(self.rows_per_batch / self.ranks) * self.ranks}"
            )
        longest = {name: self.meta.longest.get(name, 0) for name in self.meta.histories}
        if unsaid := sorted(name for name, events in longest.items() if events < 1):
            raise ConfigError(
                f"meta.longest must be at least 1 event for each history, got none or 0 for {', '.join(unsaid)}; say "
                "how many a row has at most"
            )
        if 0 < self.length_cap < max(longest.values()):
            raise ConfigError(
                f"histories must have at most the {self.length_cap} events that the encoder takes, got "
                f"{max(longest.values())}; cut them, or take another encoder"
            )
        if self.model.history != "none" and self.mean_length > max(longest.values()):
            raise ConfigError(
                f"mean_length must be at most {max(longest.values())}, the longest history, got {self.mean_length:g}; "
                "lower it, or raise the longest"
            )

    @property
    def length_cap(self) -> int:
        """Events of the longest history that can be read; 0 for any, as where no encoder reads them."""
        return self.encoder.length_cap if self.model.history == "encoder" else 0


@dataclass(frozen=True, kw_only=True)
class RankingCapacity(Fit):
    """The answer for a ranking model."""

    rows_per_rank: int
    """Of a batch."""

    events_per_rank: int
    """Of a batch, over all histories, on average; 0 where none are read."""


def plan_ranking_capacity(request: RankingCapacityRequest) -> RankingCapacity:
    """Place the tables, count what every rank needs, and judge whether that fits. Starts no process and needs no GPU.

    Raises:
        ConfigError: the model does not fit the data set, the split not the ranks, or the optimizer or the kernel not
            the split. That something does not fit the memory is an answer, not an error.

    Deterministic.
    """
    with torch.device("meta"):
        model = ranking_model(request.model, request.encoder, request.meta)
    row_bytes = _row_bytes(model, len(request.meta.dense))
    need = _RankingNeed(request, tables_of(model), dense_bytes(model, request.dense), row_bytes)
    fit = judge(model, need)
    rows = need.rows(request.ranks)
    return RankingCapacity(**vars(fit), rows_per_rank=rows, events_per_rank=need.events(request.ranks))


@dataclass(frozen=True)
class _RankingNeed(Need):
    request: RankingCapacityRequest
    row_bytes: int  # that a row keeps for backward beside the encoder's

    by_rows: ClassVar[tuple[str, Literal["auto", "row_wise"]]] = ("sharding auto", "auto")  # small tables stay whole

    @property
    def main_table(self) -> str:
        return max(self.tables.values(), key=lambda table: table.num_embeddings).name

    def workload(self, config: ShardingConfig, ranks: int) -> Workload:
        return ranking_workload(self.request.meta, self.rows(ranks))

    def activations_bytes(self, ranks: int) -> int:
        read = self.request.model.history == "encoder"
        of_encoder = encoder_bytes(self.request.encoder, self.events(ranks)) if read else 0
        return of_encoder + self.row_bytes * self.rows(ranks)

    def possible_ranks(self) -> Sequence[int]:
        rows = self.request.rows_per_batch
        return [ranks for ranks in range(1, min(rows, MOST_RANKS) + 1) if rows % ranks == 0]

    def relief(self) -> tuple[str, dict[str, Any]] | None:
        """The batch halved until it fits."""
        ranks = self.request.ranks
        rows = self.rows(ranks) // 2
        while rows:
            change: Mapping[str, Any] = {"rows_per_batch": rows * ranks}
            if self.fits_with(change):
                return f"batch {rows * ranks:,}", dict(change)
            rows //= 2
        return None

    def rows(self, ranks: int) -> int:
        return self.request.rows_per_batch // ranks

    def events(self, ranks: int) -> int:
        """Of all histories."""
        request = self.request
        if request.model.history == "none":
            return 0
        of_row = sum(min(request.mean_length, request.meta.longest[name]) for name in request.meta.histories)
        return ceil(self.rows(ranks) * of_row)


def _row_bytes(model: RankingModel, dense_features: int) -> int:
    """What a row keeps for backward from where its features are looked up and encoded: three rows less two, so that
    what is kept once for all, as parameters are, does not count."""
    return _kept_bytes(model, dense_features, 3) - _kept_bytes(model, dense_features, 2)


def _kept_bytes(model: RankingModel, dense_features: int, rows: int) -> int:
    dlrm, kept = cast(DLRM, model.dlrm), {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor  # the tensor too, so that no storage comes twice
        return tensor

    dense = torch.empty(rows, dense_features, device="meta")
    sparse = torch.empty(rows, dlrm.sparse_arch.F, dlrm.sparse_arch.D, device="meta", requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = dlrm.over_arch(dlrm.inter_arch(dlrm.dense_arch(dense), sparse))
        model.loss(logits, torch.empty(rows, device="meta"))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
