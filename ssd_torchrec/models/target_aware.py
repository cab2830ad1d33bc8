"""Score candidates for a row by its history: re-ranking, any number of candidates a row, one pass of the encoder.

    history ids ───► EmbeddingCollection ──► (T, D) events ─► encoder ─► s (B, D), a row's once for all its candidates
    candidate ids ─► the same table ───────► t (C, D)

    logit[c] = <s, t> + MLP([s, t, s·t])        s of the row that candidate c lies in

The dot product is how a retrieval model scores; the MLP, whose last layer starts at zero, learns what to add to it. So
a scorer that is given the encoder and table of one begins with its order.

Shapes: B rows, T events in all, C candidates in all, D width.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torchrec import EmbeddingCollection, JaggedTensor, KeyedJaggedTensor
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingCollection

from ssd_torchrec.encoders.encoder import Encoder
from ssd_torchrec.errors import ConfigError
from ssd_torchrec.models.history import History, HistoryCollection, HistoryTower, check_of_same_table


class CandidateScorer(nn.Module):
    """Logits of a row's candidates; trains with binary cross-entropy against (C,) labels.

        items = EmbeddingConfig(
            name="t_item", embedding_dim=64, num_embeddings=1_000_000, feature_names=["clicked", "candidate"]
        )
        scorer = CandidateScorer(
            EmbeddingCollection(tables=[items]),
            TiM4Rec(TiM4RecConfig(width=64)),
            History(item_key="clicked", timestamp_key="clicked_at"),
            "candidate",
        )
        loss = binary_cross_entropy_with_logits(scorer(features), labels)

    Args:
        embedding_collection: holds the table of the history's items and of the candidates, as wide as the encoder; may
            be on "meta", and its ids managed, see `managed_ids`.
        encoder: reads the history.
        history: which keys make it. Its `target_key` is None: candidates take its place.
        candidate_key: key of the candidates, any number a row, a feature of the same table.
        hidden: widths of the MLP's hidden layers; none make it a linear map.
        autocast_dtype: run the encoder in this dtype (bf16 on CUDA); None for full precision.

    Raises:
        ConfigError: the history does not fit the collection, see `HistoryCollection`, or has a target; the candidates
            are of another table, or a key of the history; a hidden layer is less than 1 wide.
    """

    def __init__(
        self,
        embedding_collection: EmbeddingCollection | ManagedCollisionEmbeddingCollection,
        encoder: Encoder,
        history: History,
        candidate_key: str,
        *,
        hidden: Sequence[int] = (64, 32),
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if history.target_key is not None:
            raise ConfigError(
                f"the history of a CandidateScorer must have no target_key, got {history.target_key}; give it as "
                "candidate_key"
            )
        if candidate_key in (history.item_key, history.timestamp_key):
            raise ConfigError(
                f"candidate_key must differ from the history's keys, got {candidate_key}; give candidates their own"
            )
        if any(width < 1 for width in hidden):
            raise ConfigError(f"hidden must be at least 1 wide each, got {tuple(hidden)}; raise them")
        collection = HistoryCollection(embedding_collection, encoder, history, autocast_dtype=autocast_dtype)
        check_of_same_table(embedding_collection, history.item_key, candidate_key, "candidate_key")
        self.embedding_collection = embedding_collection
        self._managed = isinstance(embedding_collection, ManagedCollisionEmbeddingCollection)
        self.head = CandidateHead(collection.tower, candidate_key, collection.width, hidden)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        """Look up, encode and score; returns (C,) logits, candidates in the order of `candidate_key`.

        A row may have no candidates; one without events has the state zero.

        Raises:
            DataError: the timestamps are not those of the events.
        """
        embedded = self.embedding_collection(features)
        if self._managed:
            embedded = embedded[0]  # and the remapped ids
        return self.head(embedded, features)


class CandidateHead(nn.Module):
    """Vectors of events and candidates to logits; a leaf to TorchRec's tracer.

    Args:
        tower: of one history.
        candidate_key: key of the candidates.
        width: D.
        hidden: widths of the hidden layers.
    """

    def __init__(self, tower: HistoryTower, candidate_key: str, width: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.tower = tower
        self.candidate_key = candidate_key
        layers: list[nn.Module] = []
        for inside, outside in pairwise([3 * width, *hidden]):
            layers += [nn.Linear(inside, outside), nn.ReLU()]
        last = nn.Linear(hidden[-1] if hidden else 3 * width, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.mlp = nn.Sequential(*layers, last)

    def forward(self, embedded: dict[str, JaggedTensor], features: KeyedJaggedTensor) -> Tensor:
        """From (T, D) events and (C, D) candidates by their keys; returns (C,)."""
        candidates = embedded[self.candidate_key]
        vectors, lengths = candidates.values(), candidates.lengths()
        rows = torch.arange(len(lengths), device=lengths.device)
        row_of_candidate = torch.repeat_interleave(
            rows, lengths.long(), output_size=len(vectors)
        )  # waits for no device
        states = self.tower(embedded, features)[row_of_candidate]  # (C, D)
        products = states * vectors
        added = self.mlp(torch.cat([states, vectors, products], dim=1))
        return products.sum(1) + added.squeeze(1)
