"""Histories beside pooled features: long jagged histories become one vector a row, where a DLRM expects its features.

    KeyedJaggedTensor ──► EmbeddingBagCollection ─────────────────────► (B, F, D)  ─┐
           │                                                                        ├─► (B, F + n, D)
           └────► EmbeddingCollection ─► (T, D) events ─► encoder ─► (B, n, D) ─────┘

The collection stands beside the encoders and not in them: TorchRec's pipelines trace what holds a table, and the rest,
which may look at data, is a leaf to them. Item ids and timestamps are keys of the same KeyedJaggedTensor as all other
features, so loader, loop and loss stay as they are.

Where a row asks about one item, as an impression about the item shown, `target_key` brings its vector too, from the
table of the history's items. It comes as a further feature and not as a product with the history's: what crosses
features in a DLRM then compares it with the history and with all else, and the table learns one vector an item.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torchrec import EmbeddingCollection, JaggedTensor, KeyedJaggedTensor, KeyedTensor
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingCollection

from ssd_torchrec.encoders.encoder import Encoder
from ssd_torchrec.errors import ConfigError, DataError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.models.managed_ids import event_tables


@dataclass(frozen=True, kw_only=True)
class History:
    """One history of a row: what it did, and when."""

    item_key: str
    """Key of the events' item ids, a feature of a table of the EmbeddingCollection."""

    timestamp_key: str
    """Key of their unix seconds, int64 and ascending within a row; no table owns it."""

    pooling: Literal["last", "mean"] = "last"
    """What stands for a row: its last event, or the mean of its events; zeros for a row without any."""

    longest: int | None = None
    """A promise of how many events a row has at most. On a GPU it spares each batch a wait for the device, which None
    costs once a history; a row that breaks it ends the process there, and raises an error on CPU."""

    target_key: str | None = None
    """Key of the item that the row asks about, one id a row, a feature of the same table as item_key; None for none.
    Its vector comes behind those of all histories, and once for histories that share it."""

    def __post_init__(self) -> None:
        if self.longest is not None and self.longest < 1:
            raise ConfigError(f"longest must be at least 1, got {self.longest} for {self.item_key}; None counts")
        if self.item_key == self.timestamp_key:
            raise ConfigError(f"item_key and timestamp_key must differ, got {self.item_key} twice; name the other key")
        if self.target_key in (self.item_key, self.timestamp_key):
            raise ConfigError(
                f"target_key must differ from item_key and timestamp_key, got {self.target_key} twice; name the key of "
                "the item in question, or leave it None"
            )


class HistoryTower(nn.Module):
    """Event vectors and timestamps of a batch to one vector a row and history; a leaf to TorchRec's tracer.

    Args:
        encoders: of each history in order; one may stand there more than once, and then is shared.
        autocast_dtype: run the encoders in this dtype (bf16 on CUDA); None for full precision.
    """

    def __init__(
        self, histories: Sequence[History], encoders: Sequence[Encoder], autocast_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.histories = tuple(histories)
        self.encoders = nn.ModuleList(encoders)
        self.autocast_dtype = autocast_dtype

    @property
    def keys(self) -> list[str]:
        """Whose vectors come, in order: items of histories, then targets, each once."""
        targets = (history.target_key for history in self.histories if history.target_key is not None)
        return list(dict.fromkeys([*(history.item_key for history in self.histories), *targets]))

    def forward(self, embedded: dict[str, JaggedTensor], features: KeyedJaggedTensor) -> Tensor:
        """From (T, D) events and (B, D) targets by key, and timestamps by theirs; returns (B, (n + m)·D), as in `keys`.

        Raises:
            DataError: a history has no timestamps, or another number of them than of events; or, on CPU, a row has not
                one target. On a GPU their number in all tells, and that they lie one in each row is believed.
        """
        rows = [
            self._row_vectors(history, encoder, embedded[history.item_key], features)
            for history, encoder in zip(self.histories, self.encoders, strict=True)
        ]
        return torch.cat([*rows, *(_targets(key, embedded[key]) for key in self.keys[len(rows) :])], dim=1)

    def _row_vectors(
        self, history: History, encoder: nn.Module, events: JaggedTensor, features: KeyedJaggedTensor
    ) -> Tensor:
        timestamps = _timestamps(history, events, features)
        layout = _layout(events.lengths(), len(timestamps), history)
        values = events.values()
        with torch.autocast(values.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            encoded = encoder(values, timestamps, layout)
        encoded = encoded.to(values.dtype)
        if history.pooling == "mean":
            sums = torch.segment_reduce(encoded, "sum", offsets=layout.offsets, axis=0, unsafe=True)
            return sums / layout.offsets.diff().clamp(min=1)[:, None]
        return _last(encoded, layout)


class HistoryCollection(nn.Module):
    """Histories as a KeyedTensor, for pipelines that concatenate or regroup pooled features.

    Args:
        embedding_collection: holds the tables of the histories' items, each as wide as the encoders; with ids below
            the number of rows, or managed ones, see `managed_ids`.
        encoder: one for all histories, or one for each in order.
        histories: which keys make a history.
        autocast_dtype: run the encoders in this dtype (bf16 on CUDA); None for full precision.

    Raises:
        ConfigError: a history names a feature that no table has, or timestamps that one has, or a target that its
            items' table has not; widths differ; two histories read the same items, or one's are another's target. The
            message names the feature and the mend.
    """

    def __init__(
        self,
        embedding_collection: EmbeddingCollection | ManagedCollisionEmbeddingCollection,
        encoder: Encoder | Sequence[Encoder],
        histories: History | Sequence[History],
        *,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        histories = [histories] if isinstance(histories, History) else list(histories)
        encoders = [encoder] * len(histories) if isinstance(encoder, Encoder) else list(encoder)
        _check(embedding_collection, encoders, histories)
        self.embedding_collection = embedding_collection
        self._managed = isinstance(embedding_collection, ManagedCollisionEmbeddingCollection)
        self.tower = HistoryTower(histories, encoders, autocast_dtype)
        self._keyed = _Keyed(self.tower.keys, encoders[0].width)

    @property
    def histories(self) -> tuple[History, ...]:
        """As given."""
        return self.tower.histories

    @property
    def keys(self) -> list[str]:
        """Of the vectors that come: the n item keys in order, then the m targets, each once."""
        return self._keyed.keys

    @property
    def width(self) -> int:
        """Channels D of a row's vector."""
        return self._keyed.width

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Look up and encode; returns (B, (n + m)·D) under `keys`."""
        embedded = self.embedding_collection(features)
        if self._managed:
            embedded = embedded[0]  # and the remapped ids
        return self._keyed(self.tower(embedded, features))


class HistorySparseArch(nn.Module):
    """A DLRM's sparse part that brings histories too; stands where SparseArch stood.

    Args:
        base: the sparse part so far: KeyedJaggedTensor to (B, F, D), with `D` and `sparse_feature_names`.
        histories: whose vectors come after the F of `base`.

    Raises:
        ConfigError: `base` is no sparse part, the widths differ, or a table of `base` owns a history's timestamps.
    """

    def __init__(self, base: nn.Module, histories: HistoryCollection) -> None:
        super().__init__()
        width, names = getattr(base, "D", None), getattr(base, "sparse_feature_names", None)
        if not isinstance(width, int) or names is None:
            raise ConfigError(
                f"base must be a SparseArch, with D and sparse_feature_names, got {type(base).__name__}; give "
                "dlrm.sparse_arch"
            )
        if width != histories.width:
            raise ConfigError(
                f"histories must be as wide as the DLRM's features, got {histories.width} and {width}; build encoder "
                f"and item table {width} wide"
            )
        for history in histories.histories:
            if history.timestamp_key in names:
                raise ConfigError(_owned(history, "the DLRM's EmbeddingBagCollection"))
        self.base = base
        self.histories = histories
        self.D = width
        self._more = len(histories.keys)
        self.F = len(names) + self._more
        self._names = [*names, *histories.keys]

    @property
    def sparse_feature_names(self) -> list[str]:
        """Those of `base`, then the keys of `histories`."""
        return self._names

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        """Look up, pool and encode; returns (B, F + n + m, D): n histories, m targets."""
        pooled = self.base(features)
        history = self.histories(features).values()
        return torch.cat([pooled, history.view(-1, self._more, self.D)], dim=1)


class _Keyed(nn.Module):
    """A leaf to the tracer, which cannot build a KeyedTensor."""

    def __init__(self, keys: list[str], width: int) -> None:
        super().__init__()
        self.keys = keys
        self.width = width

    def forward(self, values: Tensor) -> KeyedTensor:
        return KeyedTensor(self.keys, [self.width] * len(self.keys), values)


def _last(events: Tensor, layout: JaggedLayout) -> Tensor:
    """(B, D), zeros where a row has none. `index_select` goes back by one kernel, where an index would sort."""
    last = layout.last_event
    if not len(events):
        return events.sum() + events.new_zeros(len(last), events.shape[1])  # the sum, so that weights have gradients
    return events.index_select(0, last.clamp_min(0)).masked_fill(last[:, None] < 0, 0)


def _timestamps(history: History, events: JaggedTensor, features: KeyedJaggedTensor) -> Tensor:
    """(T,) int64."""
    if history.timestamp_key not in features.keys():  # noqa: SIM118  a KeyedJaggedTensor is no dict
        raise DataError(
            f"batches must bring {history.timestamp_key}, the times of {history.item_key}, got the keys "
            f"{', '.join(features.keys())}; add it in the loader, or correct timestamp_key"
        )
    times = features[history.timestamp_key]
    if len(times.values()) != len(events.values()) or not _surely_equal(times.lengths(), events.lengths()):
        raise DataError(
            f"each event of {history.item_key} must have its time in {history.timestamp_key}, got "
            f"{len(events.values())} events and {len(times.values())} times, or other rows; correct the loader"
        )
    return times.values().long()


def _targets(key: str, target: JaggedTensor) -> Tensor:
    """(B, D) vectors of each row's one."""
    lengths, vectors = target.lengths(), target.values()
    if len(vectors) != len(lengths) or not _surely_equal(lengths, torch.ones_like(lengths)):
        row = int((lengths != 1).nonzero()[0])
        raise DataError(
            f"each row must have one {key}, the target of its history, got {int(lengths[row])} in row {row}; give one "
            "id a row in the loader, or score several by a CandidateScorer"
        )
    return vectors


def _surely_equal(one: Tensor, other: Tensor) -> bool:
    """On a GPU a wait would tell, so there it is believed."""
    return one.device.type != "cpu" or torch.equal(one, other)


def _layout(lengths: Tensor, num_events: int, history: History) -> JaggedLayout:
    if lengths.device.type == "cpu" or history.longest is None:
        layout = JaggedLayout.from_lengths(lengths.cpu(), lengths.device)
        if history.longest is not None and layout.longest > history.longest:
            raise DataError(
                f"rows of {history.item_key} must have at most {history.longest} events, as longest says, got "
                f"{layout.longest}; cut them in the loader, or raise longest"
            )
        return layout
    return JaggedLayout.promised(lengths, num_events, history.longest)


def _check(
    collection: EmbeddingCollection | ManagedCollisionEmbeddingCollection,
    encoders: list[Encoder],
    histories: list[History],
) -> None:
    if not histories:
        raise ConfigError("there must be at least one history, got none; give History(item_key=..., timestamp_key=...)")
    if len(encoders) != len(histories):
        raise ConfigError(
            f"each history must have its encoder, got {len(encoders)} encoders for {len(histories)} histories; give "
            "one for all, or one for each"
        )
    width_of = {feature: table.embedding_dim for table in event_tables(collection) for feature in table.feature_names}
    keys = [history.item_key for history in histories]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ConfigError(f"histories must read different items, got {', '.join(twice)} twice; drop one")
    for history, encoder in zip(histories, encoders, strict=True):
        if history.item_key not in width_of:
            raise ConfigError(
                f"item_key must be a feature of the EmbeddingCollection ({', '.join(width_of)}), got "
                f"{history.item_key}; add it to a table's feature_names"
            )
        if history.timestamp_key in width_of:
            raise ConfigError(_owned(history, "the EmbeddingCollection"))
        if encoder.width != width_of[history.item_key]:
            raise ConfigError(
                f"the encoder of {history.item_key} must be as wide as its table, got {encoder.width} and "
                f"{width_of[history.item_key]}; build one of them as wide as the other"
            )
        if history.target_key in keys:
            raise ConfigError(
                f"target_key must be no history's item_key, got {history.target_key}; give it its own key"
            )
        if history.target_key is not None:
            check_of_same_table(collection, history.item_key, history.target_key, "target_key")


def check_of_same_table(
    collection: EmbeddingCollection | ManagedCollisionEmbeddingCollection, item_key: str, key: str, called: str
) -> None:
    """Refuse an item whose vectors are not those of a history's items.

    Args:
        called: what `key` is given as, for the message.

    Raises:
        ConfigError: `key` is no feature of the table that `item_key` is a feature of.
    """
    table_of = {feature: table for table in event_tables(collection) for feature in table.feature_names}
    table = table_of[item_key]
    if key not in table.feature_names:
        here = f", a feature of {table_of[key].name}" if key in table_of else ""
        raise ConfigError(
            f"{called} must be a feature of {table.name}, the table of {item_key} ({', '.join(table.feature_names)}), "
            f"got {key}{here}; add it to that table's feature_names"
        )


def _owned(history: History, owner: str) -> str:
    return (
        f"timestamps must not be looked up in a table, got {history.timestamp_key}, the times of {history.item_key}, "
        f"as a feature of {owner}; take it out of the table's feature_names"
    )
