"""Raw item ids of which there is no end, in a table that has one: TorchRec remaps them, and evicts what is not used.

    int64 ids ──► mix (one to one) ──► id map of the table's rows ──► EmbeddingCollection ──► event vectors

A table of R rows holds R - 1 ids; its last row is the vector of every id that has no row of its own. Split over ranks,
an id belongs to the rank that its mixed bits name, and each rank keeps the last of its own rows for ids without one.

Source: torchrec.modules.mc_modules, whose MCHManagedCollisionModule keeps the map, scores and evicts.
"""

from collections.abc import Callable, Sequence
from math import lcm
from typing import Literal

import torch
from torch import Tensor
from torchrec import EmbeddingCollection, EmbeddingConfig, JaggedTensor
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingCollection
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    LFU_EvictionPolicy,
    LRU_EvictionPolicy,
    ManagedCollisionCollection,
    MCHEvictionPolicy,
    MCHManagedCollisionModule,
)

from ssd_torchrec.errors import ConfigError

Eviction = Literal["distance_lfu", "lfu", "lru"]

_POLICIES: dict[str, Callable[[], MCHEvictionPolicy]] = {
    "distance_lfu": DistanceLFU_EvictionPolicy,
    "lfu": LFU_EvictionPolicy,
    "lru": LRU_EvictionPolicy,
}
_NO_ID = torch.iinfo(torch.int64).max  # what TorchRec writes where a row has no id
_MOVED = -0x2BB93DF0A930EDEB  # what the finaliser makes of _NO_ID, xor _NO_ID
_ANY_WORLD = lcm(*range(1, 1025))  # TorchRec's planner asks that the ranks, 1024 at most, divide a map's buckets


def managed_ids(
    collection: EmbeddingCollection, *, eviction: Eviction = "distance_lfu", eviction_interval: int = 100
) -> ManagedCollisionEmbeddingCollection:
    """Let every table of a collection take any int64 ids; give the result to `plug_into_dlrm` or `HistoryCollection`.

    An id never seen reads the last row of its table, shared by all that have none. In training mode ids are counted,
    and every `eviction_interval` batches those of the batches since are given rows: free ones first, then those of the
    ids that score lowest, if the newcomer scores higher. In eval mode the map stays as it is.

    What becomes of an evicted row, as TorchRec does it: in whole tables weights and optimizer state stay, so the new id
    starts as the old one ended. In split tables a row's weights are drawn anew by `init_fn`, from the rank's generator,
    whenever it is given to an id; its optimizer state starts anew with rowwise_adagrad, and stays with all others.

    Args:
        collection: whose tables are used on; may be on "meta", where the maps then are too.
        eviction: the score of an id. lru: how recently it came. lfu: how often it came, ever: in a full table a
            newcomer must come more often within an interval than the rarest id has in all. distance_lfu: how often it
            came, divided by the batches since it last did.
        eviction_interval: batches between two updates of the map, each of which sorts the whole map. Ids of that many
            batches are held on the device, in 8 to 32 bytes an event. A checkpoint has the map but not these ids: a run
            that resumes is the one that never stopped if it was saved after a multiple of the interval, and the
            generators are seeded by step.

    Returns:
        A collection whose forward gives (event vectors by feature, None). Its maps take 24 bytes a row beside the
        table, 32 with distance_lfu, and are part of its state.

    Raises:
        ConfigError: it is no EmbeddingCollection, a table has fewer than two rows, two tables share a feature,
            `eviction` is unknown or `eviction_interval` less than 1.
    """
    _check(collection, eviction, eviction_interval)
    tables = collection.embedding_configs()
    maps = {
        table.name: ManagedRows(
            zch_size=table.num_embeddings,
            device=collection.embeddings[table.name].weight.device,  # type: ignore[arg-type]  # no module, a tensor
            eviction_policy=_POLICIES[eviction](),
            eviction_interval=eviction_interval,
            input_hash_func=mixed,
            buckets=_ANY_WORLD,
        )
        for table in tables
    }
    return ManagedCollisionEmbeddingCollection(collection, ManagedCollisionCollection(maps, tables))  # type: ignore[arg-type]  # theirs is invariant


def event_tables(collection: EmbeddingCollection | ManagedCollisionEmbeddingCollection) -> Sequence[EmbeddingConfig]:
    """The tables of a collection, whether their ids are managed or not."""
    if isinstance(collection, ManagedCollisionEmbeddingCollection):
        collection = collection._embedding_collection
    return collection.embedding_configs()


class ManagedRows(MCHManagedCollisionModule):
    """TorchRec's id map of one table, that counts every event.

    TorchRec makes room for the events of an interval after its first batch, and leaves out what does not fit: all of
    them, if that batch has none. Here the room grows.
    """

    def profile(self, features: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
        """Count a batch's ids in training mode, and update the map when an interval is over; returns `features`."""
        if self.training:
            self._make_room(sum(len(feature.values()) for feature in features.values()))
        return super().profile(features)

    def _make_room(self, events: int) -> None:
        held, room = self._current_history_buffer_offset, self._input_history_buffer_size
        if held + events <= room:
            return
        size = max(held + events, 2 * room)
        self._history_accumulator = _longer(getattr(self, "_history_accumulator", None), held, size, self.device)
        for name, _, of_history in self._eviction_policy.metadata_info:
            if of_history:
                longer = _longer(self._history_metadata.get(name), held, size, self.device)
                self.register_buffer(f"_history_{name}", longer, persistent=False)
                self._history_metadata[name] = longer
        self._input_history_buffer_size = size


def mixed(ids: Tensor, _: int = 0) -> Tensor:
    """Spread ids over all of int64, one to one, so that ranks and rows get equally many whatever the ids look like.

    Args:
        ids: any shape, of any integer dtype; 2^63 - 1, which TorchRec keeps for itself, is read as 2^63 - 2.

    Returns:
        int64, never 2^63 - 1.

    Deterministic. The finaliser of MurmurHash3, which is invertible, moved so that it maps 2^63 - 1 to itself.
    """
    return _finalised(ids.long().clamp(max=_NO_ID - 1)) ^ _MOVED


def _finalised(ids: Tensor) -> Tensor:
    for factor in (0xFF51AFD7ED558CCD - 2**64, 0xC4CEB9FE1A85EC53 - 2**64):
        ids = (ids ^ _shifted(ids)) * factor  # modulo 2^64
    return ids ^ _shifted(ids)


def _shifted(ids: Tensor) -> Tensor:
    """By 33 bits to the right, with zeros coming in."""
    return (ids >> 33) & (2**31 - 1)


def _longer(old: Tensor | None, held: int, size: int, device: torch.device) -> Tensor:
    new = torch.zeros(size, dtype=torch.int64, device=device)
    if old is not None:
        new[:held] = old[:held]
    return new


def _check(collection: EmbeddingCollection, eviction: str, eviction_interval: int) -> None:
    if not isinstance(collection, EmbeddingCollection):
        raise ConfigError(
            f"ids can be managed for an EmbeddingCollection, got {type(collection).__name__}; build one of the tables"
        )
    if eviction not in _POLICIES:
        raise ConfigError(f"eviction must be one of {', '.join(_POLICIES)}, got {eviction}; take distance_lfu")
    if eviction_interval < 1:
        raise ConfigError(f"eviction_interval must be at least 1 batch, got {eviction_interval}; take 100")
    owners: dict[str, str] = {}
    for table in collection.embedding_configs():
        if table.num_embeddings < 2:
            raise ConfigError(
                f"a table of managed ids must have a row for ids without one and another, got {table.name} with "
                f"{table.num_embeddings}; set num_embeddings to one more than the ids that are to have rows"
            )
        for feature in table.feature_names:
            if feature in owners:
                raise ConfigError(
                    f"a feature of managed ids must be of one table, got {feature} of {owners[feature]} and "
                    f"{table.name}; take it out of one's feature_names"
                )
            owners[feature] = table.name
