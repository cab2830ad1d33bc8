"""Add long histories to a DLRM that exists, without losing what it knows.

    dense_arch ─┬────────────────────────────► the old interaction ─► the old first layer ─┐
    sparse_arch ┘                                                                          + ─► the rest, as it was
    histories ──► dot products with all, and themselves ────────────► an added linear map ─┘

A history's target, the item that a row asks about, is a further vector of `histories` here, so its dot products with
the history and with everything else are among them.

The added map starts at zero, so the first logits are the old model's. It learns from the first step; the encoder and
the table of histories, whose gradient comes through it, from the second. Cross and branch layers get zeroed rows and
columns in the same way. Old parameters stay the same objects under the same names, but for `sparse_arch`, which is
`sparse_arch.base` from then on.

Source of the models: torchrec.models.dlrm; Naumov et al. 2019, arXiv:1906.00091; Wang et al. 2020, arXiv:2008.13535.
"""

from collections.abc import Sequence
from math import sqrt
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchrec import EmbeddingCollection
from torchrec.models.dlrm import (
    DLRM,
    InteractionArch,
    InteractionDCNArch,
    InteractionProjectionArch,
)
from torchrec.modules.crossnet import LowRankCrossNet
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingCollection

from ssd_torchrec.encoders.encoder import Encoder
from ssd_torchrec.errors import ConfigError
from ssd_torchrec.models.history import History, HistoryCollection, HistorySparseArch


def plug_into_dlrm(
    dlrm: DLRM,
    embedding_collection: EmbeddingCollection | ManagedCollisionEmbeddingCollection,
    encoder: Encoder | Sequence[Encoder],
    histories: History | Sequence[History],
    *,
    warm_start: bool = True,
    autocast_dtype: torch.dtype | None = None,
) -> DLRM:
    """Give a DLRM, DLRM_DCN or DLRM_Projection histories, in place; before it is sharded.

    Args:
        dlrm: trained or not; its loader, DLRMTrain and pipelines stay as they are.
        embedding_collection: the tables of the histories' items, as wide as the DLRM's features; may be on "meta".
            Made by `managed_ids`, it takes ids that no table has rows for.
        encoder: one for all histories, or one for each in order.
        histories: which keys of its KeyedJaggedTensor make a history.
        warm_start: begin with the old model's logits: bit for bit in fp32 for DLRM and DLRM_Projection, within rounding
            for DLRM_DCN, whose cross layers become wider. Else the added weights are drawn as a new model's.
        autocast_dtype: run the encoders in this dtype (bf16 on CUDA); None for full precision.

    Returns:
        `dlrm`.

    Raises:
        ConfigError: it is none of these models, compiled, sharded or plugged already; or the histories do not fit it,
            see `HistoryCollection` and `HistorySparseArch`. It is as it was then.
    """
    _check(dlrm)
    collection = HistoryCollection(embedding_collection, encoder, histories, autocast_dtype=autocast_dtype)
    old_features = len(dlrm.sparse_arch.sparse_feature_names)
    sparse_arch = HistorySparseArch(dlrm.sparse_arch, collection)
    more = len(collection.keys)
    over_arch = cast(nn.Module, dlrm.over_arch)
    collection.tower.to(next(over_arch.parameters()).device)
    if isinstance(dlrm.inter_arch, InteractionDCNArch):
        crossnet = _widened_cross(cast(LowRankCrossNet, dlrm.inter_arch.crossnet), more * sparse_arch.D, warm_start)
        dlrm.inter_arch = InteractionDCNArch(old_features + more, crossnet)
        _widen_first(over_arch, more * sparse_arch.D, warm_start)
    elif isinstance(dlrm.inter_arch, InteractionProjectionArch):
        branches = (dlrm.inter_arch.interaction_branch1, dlrm.inter_arch.interaction_branch2)
        for branch in branches:
            _widen_first(branch, more * sparse_arch.D, warm_start)
        dlrm.inter_arch = InteractionProjectionArch(old_features + more, *branches)
    else:
        dlrm.inter_arch = HistoryInteractionArch(cast(InteractionArch, dlrm.inter_arch), more, sparse_arch.D)
        _widen_first(over_arch, dlrm.inter_arch.added_width, warm_start)
    dlrm.sparse_arch = sparse_arch  # type: ignore[assignment]  # what DLRM needs of a SparseArch
    return dlrm


class HistoryInteractionArch(nn.Module):
    """The old interaction of dense and pooled features, and after it what histories bring.

    Args:
        base: of F pooled features.
        histories: n, the last of the sparse features: vectors of histories, and of their targets if they have some.
        width: D.
    """

    def __init__(self, base: InteractionArch, histories: int, width: int) -> None:
        super().__init__()
        self.base = base
        self.F = base.F + histories
        self.added_width = histories * (width + base.F + 1) + histories * (histories - 1) // 2
        pairs = torch.triu_indices(histories, histories, offset=1, device=cast(Tensor, base.triu_indices).device)
        self.pairs: Tensor
        self.register_buffer("pairs", pairs, persistent=False)

    def forward(self, dense_features: Tensor, sparse_features: Tensor) -> Tensor:
        """From (B, D) and (B, F + n, D); returns the old (B, D + F + F(F-1)/2), then for the histories (B, n·D), their
        dot products with dense and pooled features (B, n·(F+1)), and those among themselves (B, n(n-1)/2)."""
        pooled, history = sparse_features[:, : self.base.F], sparse_features[:, self.base.F :]
        others = torch.cat([dense_features[:, None], pooled], dim=1)
        with_others = torch.bmm(history, others.transpose(1, 2)).flatten(1)
        among = torch.bmm(history, history.transpose(1, 2))[:, self.pairs[0], self.pairs[1]]
        old = self.base(dense_features, pooled)
        return torch.cat([old, history.flatten(1), with_others, among], dim=1)


class WidenedLinear(nn.Linear):
    """A linear map of more channels than it had: weight and bias are the old one's, `added` takes the channels behind.

    Args:
        old: whose parameters are used on.
        added: channels that come behind.
        warm_start: begin with zeros for them; else as nn.Linear draws its weights.
    """

    def __init__(self, old: nn.Linear, added: int, warm_start: bool) -> None:
        nn.Module.__init__(self)
        self.in_features = old.in_features + added
        self.out_features = old.out_features
        self.weight = old.weight
        self.register_parameter("bias", old.bias)
        self.added = nn.Parameter(old.weight.new_zeros(old.out_features, added))
        if not warm_start:
            bound = 1 / sqrt(self.in_features)
            nn.init.uniform_(self.added, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        """From (B, old + added) to (B, out)."""
        known = self.weight.shape[1]
        return functional.linear(input[:, :known], self.weight, self.bias) + functional.linear(
            input[:, known:], self.added
        )


def _check(dlrm: object) -> None:
    if not isinstance(dlrm, DLRM):
        hint = (
            "give its .model" if isinstance(getattr(dlrm, "model", None), DLRM) else "build one of torchrec.models.dlrm"
        )
        raise ConfigError(f"a DLRM, DLRM_DCN or DLRM_Projection can be plugged into, got {type(dlrm).__name__}; {hint}")
    if isinstance(dlrm.sparse_arch, HistorySparseArch):
        raise ConfigError("this DLRM has histories already; give all of them at once")
    cross = getattr(dlrm.inter_arch, "crossnet", None)
    known = type(dlrm.inter_arch) in (InteractionArch, InteractionProjectionArch) or type(cross) is LowRankCrossNet
    if not known:
        got = " over ".join(type(part).__name__ for part in (dlrm.inter_arch, cross) if part is not None)
        raise ConfigError(
            "the DLRM's interaction must be InteractionArch, InteractionDCNArch over a LowRankCrossNet or "
            f"InteractionProjectionArch, got {got}; plug before compiling, or put a HistorySparseArch into a model of "
            "your own"
        )


def _widen_first(arch: nn.Module, added: int, warm_start: bool) -> None:
    """Replace the first linear map of an MLP."""
    path, old = next((path, module) for path, module in arch.named_modules() if isinstance(module, nn.Linear))
    holder, _, name = path.rpartition(".")
    setattr(arch.get_submodule(holder), name, WidenedLinear(old, added, warm_start))


def _widened_cross(old: LowRankCrossNet, added: int, warm_start: bool) -> LowRankCrossNet:
    """Cross layers over more channels; those behind are passed through as they come, to begin with."""
    known, layers = len(old.bias[0]), len(old.bias)
    new = LowRankCrossNet(known + added, layers, old._low_rank).to(old.bias[0])
    with torch.no_grad():
        for layer in range(layers):
            wide, tall, bias = new.V_kernels[layer], new.W_kernels[layer], new.bias[layer]
            if warm_start:
                wide.zero_()
                tall.zero_()
            wide[:, :known].copy_(old.V_kernels[layer])
            tall[:known].copy_(old.W_kernels[layer])
            bias[:known].copy_(old.bias[layer])
    return new
