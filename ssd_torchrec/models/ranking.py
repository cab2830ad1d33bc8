"""A ranking model to train: a DLRM, with what its histories become, and its loss."""

from typing import Literal

import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig, PoolingType
from torchrec.datasets.utils import Batch
from torchrec.models.dlrm import DLRM

from ssd_torchrec.data.ranking.schema import RankingMeta, times_of
from ssd_torchrec.encoders.encoder import Encoder
from ssd_torchrec.models.dlrm import plug_into_dlrm
from ssd_torchrec.models.history import History

HistoryUse = Literal["encoder", "mean", "none"]


class RankingModel(nn.Module):
    """Binary cross-entropy of a DLRM's logits, in the shape that TorchRec's pipelines and the training loop expect.

    Args:
        dlrm: any model of (R, n) dense features and a KeyedJaggedTensor to (R, 1) logits.
    """

    def __init__(self, dlrm: nn.Module) -> None:
        super().__init__()
        self.dlrm = dlrm
        self.loss = ClickLoss()

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """From a batch of R rows, as many on every rank.

        Returns:
            () mean loss to differentiate; (2,) detached: its sum over the rows in nats, and R.
        """
        return self.loss(self.dlrm(batch.dense_features, batch.sparse_features), batch.labels)


class ClickLoss(nn.Module):
    """Mean binary cross-entropy of (R, 1) logits and (R,) labels; a leaf to TorchRec's tracer."""

    def forward(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns () to differentiate; (2,) detached: the sum over the rows in nats, and R."""
        loss = nn.functional.binary_cross_entropy_with_logits(logits.squeeze(-1), labels.to(logits))
        rows = loss.new_tensor(float(len(logits)))
        return loss, torch.stack([loss.detach() * rows, rows])


def tables_for(
    meta: RankingMeta, width: int, use: HistoryUse, *, target: bool = False
) -> tuple[EmbeddingBagCollection, EmbeddingCollection]:
    """Tables on "meta" of a data set's categorical features, and of its histories' items.

    Args:
        width: D of all.
        use: "mean" puts histories into bags.
        target: read targets from the tables of histories too.
    """

    def bag(name: str, rows: int, pooling: PoolingType) -> EmbeddingBagConfig:
        return EmbeddingBagConfig(
            name=f"t_{name}", embedding_dim=width, num_embeddings=rows, feature_names=[name], pooling=pooling
        )

    device = torch.device("meta")
    bags = [bag(name, rows, PoolingType.SUM) for name, rows in meta.categorical.items()]
    if use == "mean":
        bags += [bag(name, rows, PoolingType.MEAN) for name, rows in meta.histories.items()]
    items = [
        EmbeddingConfig(
            name=f"t_{name}",
            embedding_dim=width,
            num_embeddings=rows,
            feature_names=[name, *([meta.targets[name]] if target and name in meta.targets else [])],
        )
        for name, rows in meta.histories.items()
    ]
    return EmbeddingBagCollection(tables=bags, device=device), EmbeddingCollection(tables=items, device=device)


def with_histories(
    dlrm: DLRM,
    items: EmbeddingCollection,
    encoder: Encoder,
    meta: RankingMeta,
    autocast_dtype: torch.dtype | None = None,
    *,
    target: bool = False,
) -> DLRM:
    """Plug all histories of a data set into a new DLRM, through one encoder; with their targets, if `target` says so.

    The added weights start at zero here too: that learns faster than drawn ones (docs/decisions.md).
    """
    histories = [
        History(
            item_key=name,
            timestamp_key=times_of(name),
            longest=meta.longest[name],
            target_key=meta.targets.get(name) if target else None,
        )
        for name in meta.histories
    ]
    return plug_into_dlrm(dlrm, items, encoder, histories, autocast_dtype=autocast_dtype)
