"""The k best items of each user, with a checkpoint, into a Parquet file.

    users file ─► rows of a data set ─► whole histories in batches ─► (M, D) queries ─► top k over the catalogue ─► file

Users known to the data set are asked about once, however often they are asked for. For every
`users_per_pass` users the catalogue is scored once, in chunks: where it lies if its table is split by rows, else looked
up by all ranks together. The answers are kept, 8 k
bytes a user, and written by rank 0 in the order asked for.
"""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.progress import Progress
from torch import Tensor

from ssd_torchrec.data.asked import AskedUsers, read_asked_users
from ssd_torchrec.data.batch_plan import BatchConfig
from ssd_torchrec.data.batches import Share
from ssd_torchrec.data.history_batches import HistoryBatch, HistoryBatches
from ssd_torchrec.data.parquet import UserHistories, open_dataset
from ssd_torchrec.data.rows import Ints, offsets_of
from ssd_torchrec.data.scratch import scratch_folder
from ssd_torchrec.data.vocabulary import Vocabulary
from ssd_torchrec.distributed.checkpoint import load_weights
from ssd_torchrec.distributed.collectives import word_of_rank_0
from ssd_torchrec.distributed.process import World, all_or_none, from_all_ranks, ranks_where
from ssd_torchrec.distributed.vocab_parallel import CatalogueShard
from ssd_torchrec.errors import CheckpointError, ConfigError, DataError
from ssd_torchrec.models.next_item import ITEM_WEIGHT, NextItemModel
from ssd_torchrec.training.build import build
from ssd_torchrec.training.catalogue import Seen, catalogue
from ssd_torchrec.training.histories import data_folder
from ssd_torchrec.training.in_place import top_items_in_place
from ssd_torchrec.training.job import checkpoint_at
from ssd_torchrec.training.run import config_of
from ssd_torchrec.training.top_items import NOTHING, items_of, scores_of, top_items

USERS_PER_WRITE = 8192


@dataclass(frozen=True, kw_only=True)
class RecommendConfig:
    """What is recommended, and in what portions; the portions change memory and time, not the answers."""

    k: int = 20
    """Items a user. Users get fewer where fewer are left, as when they have seen nearly all."""

    filter_seen: bool = True
    """Leave out items of the user's history."""

    skip_unknown: bool = False
    """Leave out users that the data set does not know, instead of refusing the file."""

    data: str = ""
    """Data set that knows users and items; empty: the one the checkpoint was trained on."""

    tokens_per_batch: int = 16384
    """Events encoded at a time, over all ranks. A longer history is a batch of its own; none is cut shorter than the
    run had it."""

    users_per_pass: int = 16384
    """Users, about and over all ranks, for whom the catalogue passes by once."""

    candidates_per_chunk: int = 8192
    """Items scored at a time; the (users, items) score matrix is never whole."""

    def __post_init__(self) -> None:
        for name in ("k", "tokens_per_batch", "users_per_pass", "candidates_per_chunk"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}; raise it")


@dataclass(frozen=True, kw_only=True)
class Recommended:
    """What was written."""

    num_users: int
    """Rows of the file."""

    num_items: int
    """Items recommended to all of them together."""

    num_without_items: int
    """Rows with an empty list: users without a history, or who have seen everything."""

    num_unknown: int
    """Users left out since the data set does not know them."""

    elapsed_s: float
    """From the first history read to the file in its place."""

    def __str__(self) -> str:
        rate = self.num_users / max(self.elapsed_s, 1e-9)
        parts = [
            f"{self.num_items:,} items for {self.num_users:,} users in {self.elapsed_s:.1f} s, {rate:,.0f} users/s"
        ]
        parts += [f"{self.num_without_items:,} users without any"] if self.num_without_items else []
        parts += [f"{self.num_unknown:,} unknown users left out"] if self.num_unknown else []
        return ", ".join(parts)


def recommend(path: Path, users: Path, output: Path, config: RecommendConfig, world: World) -> Recommended:
    """Write the best items of each user: columns user_id as given, item list<raw id>, score list<float32>. Collective.

    Rows stand in the order of `users`, items from the best; of equal scores the item that the vocabulary has first.
    Mask and out-of-vocabulary rows are never recommended. A user without events gets an empty list. The answers do not
    depend on the number of ranks but for the rounding of scores.

    Args:
        path: a checkpoint, or a run for its best one.
        users: Parquet, CSV or JSON lines: ids of users the data set knows, or users with their histories; see
            `read_asked_users`.
        output: written beside and renamed: a file that is there stays until the new one is whole.

    Raises:
        ConfigError, DataError, CheckpointError: the folder of `output` is not there or not writable, `users` is not
            what it must be, the data set has another vocabulary than the checkpoint; before any work. Or scores are
            not finite.
    """
    checkpoint = checkpoint_at(path)
    run = config_of(checkpoint, config.data, world)
    with _folder_beside(users, output, world) as partial:
        known = open_dataset(data_folder(run, world)).with_event_columns(run.data.event_columns)
        vocabulary = known.vocabulary()
        asked, histories = _ask(users, known, partial / "histories", config, world)
        trainable = build(run, known.meta, world)
        load_weights(checkpoint, trainable, vocabulary=known.meta.item_vocabulary_hash)
        assert isinstance(trainable.module, NextItemModel)
        started_s = time.monotonic()
        rows, answer_of = np.unique(asked.row, return_inverse=True)
        plan = BatchConfig(tokens_per_batch=config.tokens_per_batch, max_length=run.max_asked)
        share = Share(rank=world.rank, world_size=world.size)
        batches = HistoryBatches(histories, rows, plan, share, asks_at_mask=run.objective.asks_at_mask)
        shard = CatalogueShard.of(trainable, ITEM_WEIGHT, known.meta.first_item)
        keys = _answers(trainable.module, shard, batches, len(rows), config, world)
        with all_or_none(f"writing {output}", DataError):
            counts = np.zeros(0, np.int64)
            if world.rank == 0:
                counts = _write(partial / "items.parquet", asked.user_id, keys, answer_of, vocabulary)
                os.replace(partial / "items.parquet", output)
    counts = word_of_rank_0(counts)
    return Recommended(
        num_users=len(counts),
        num_items=int(counts.sum()),
        num_without_items=int((counts == 0).sum()),
        num_unknown=asked.num_unknown,
        elapsed_s=time.monotonic() - started_s,
    )


@contextmanager
def _folder_beside(users: Path, output: Path, world: World) -> Iterator[Path]:
    """A folder of the run's own where `output` goes, gone after the block; rank 0 makes it and removes it."""
    with ExitStack() as until_end:
        folder = None
        with all_or_none(f"preparing {output}", ConfigError):
            if world.rank == 0:
                folder = until_end.enter_context(_made(users, output))
        folder = word_of_rank_0(folder)
        assert folder is not None
        yield folder


def _made(users: Path, output: Path) -> AbstractContextManager[Path]:
    if output.suffix != ".parquet" or output.is_dir() or not output.absolute().parent.is_dir():
        raise ConfigError(
            f"{output} must be a file that ends in .parquet, new or old, in a folder that is there; name it such as "
            "items.parquet, and make its folder first"
        )
    if users.resolve() == output.resolve():
        raise ConfigError(f"{output} must be another file than the one with the users; give it another name")
    return scratch_folder(output.absolute(), "partial")


def _ask(
    users: Path, known: UserHistories, folder: Path, config: RecommendConfig, world: World
) -> tuple[AskedUsers, UserHistories]:
    """Who is asked for, and the data set with their histories. Collective: rank 0 reads the file."""
    asked = None
    with all_or_none(f"reading {users}", DataError):
        if world.rank == 0:
            asked = read_asked_users(users, known, folder, skip_unknown=config.skip_unknown)
    asked = word_of_rank_0(asked)
    assert asked is not None
    return asked, known if asked.folder == known.folder else open_dataset(asked.folder)


def _answers(
    model: NextItemModel,
    shard: CatalogueShard | None,
    asked: HistoryBatches,
    num_rows: int,
    config: RecommendConfig,
    world: World,
) -> Ints:
    """Keys of the best items of each of these rows, on every rank: (C, min(k, V)) int64. Collective."""
    answers = np.full((num_rows, min(config.k, model.tables.num_items)), NOTHING)
    bar = Progress(disable=world.rank > 0 or not sys.stdout.isatty(), transient=True)
    task = bar.add_task("users", total=num_rows)
    model.eval()
    with torch.no_grad(), bar:  # inference mode hides the keys under which FBGEMM registers its CPU lookups
        for parts in _passes(asked, config.users_per_pass):
            queries, seen = _queries(model, parts, config.filter_seen, world.device)
            if shard:
                keys = top_items_in_place(queries, seen, shard, config.k, config.candidates_per_chunk)
            else:
                keys = top_items(queries, seen, catalogue(model, world.device, config.candidates_per_chunk), config.k)
            _refuse_broken(keys, world)
            ours = np.concatenate([part.chosen for part in parts])
            for chosen, found in from_all_ranks((ours, keys.cpu().numpy())):
                answers[chosen] = found
            bar.advance(task, sum(part.num_rows for part in parts))
    return answers


def _passes(batches: Iterable[HistoryBatch], users: int) -> Iterator[list[HistoryBatch]]:
    """Consecutive batches together until they hold so many users, the same on all ranks."""
    parts: list[HistoryBatch] = []
    for batch in batches:
        parts.append(batch)
        if sum(part.num_rows for part in parts) >= users:
            yield parts
            parts = []
    if parts:
        yield parts


def _queries(
    model: NextItemModel, parts: list[HistoryBatch], filter_seen: bool, device: torch.device
) -> tuple[Tensor, Seen]:
    """What this rank's users ask for, (M, D) fp32, and what they are not to get. Collective."""
    queries, seen, asked = [], [Seen.none(device)], 0
    for part in parts:
        batch, ours = part.batch.to(device), len(part.chosen)
        queries.append(model.last_queries(batch)[:ours])  # a rank without rows brings an empty one
        if filter_seen and ours:
            seen.append(Seen.of(batch, torch.arange(asked, asked + ours, device=device), model.tables.first_item))
        asked += ours
    return torch.cat(queries), Seen.joined(seen)


def _refuse_broken(keys: Tensor, world: World) -> None:
    best = scores_of(keys[:, 0])
    if ranks_where((best.isnan() | best.isposinf()).any(), world.device):
        raise CheckpointError("scores must be finite, the checkpoint gives some that are not; take an earlier one")


def _write(file: Path, user_id: pa.Array, keys: Ints, answer_of: Ints, vocabulary: Vocabulary) -> Ints:
    """Write the answers in the order asked for; returns the (N,) number of items of each user."""
    plain = {pa.large_string(): pa.string()}  # other tools know it better
    id_type, item_type = (plain.get(kind, kind) for kind in (user_id.type, vocabulary.ids.type))
    columns = {"user_id": id_type, "item": pa.list_(item_type), "score": pa.list_(pa.float32())}
    counts = []
    with pq.ParquetWriter(file, pa.schema(list(columns.items())), compression="zstd") as writer:
        for first in range(0, len(user_id), USERS_PER_WRITE):
            found = torch.from_numpy(keys[answer_of[first : first + USERS_PER_WRITE]])
            scores = scores_of(found).numpy()
            kept = scores > -np.inf
            counts.append(kept.sum(1))
            offsets = pa.array(offsets_of(counts[-1]), pa.int32())
            items = vocabulary.ids_of(vocabulary.first_item + items_of(found).numpy()[kept]).cast(item_type)
            lists = [pa.ListArray.from_arrays(offsets, values) for values in (items, pa.array(scores[kept]))]
            users = user_id[first : first + USERS_PER_WRITE].cast(id_type)
            writer.write_table(pa.Table.from_arrays([users, *lists], schema=writer.schema))
    return np.concatenate([np.zeros(0, np.int64), *counts])
