"""Small data sets to try things on."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from hypothesis import settings

from ssd_torchrec.data.parquet import UserHistories, open_dataset
from ssd_torchrec.data.rows import Ints, Jagged, Rows, offsets_of
from ssd_torchrec.data.schema import DatasetMeta
from ssd_torchrec.data.vocabulary import Vocabulary
from ssd_torchrec.data.writer import DatasetWriter

FEW = settings(derandomize=True, max_examples=30, deadline=None)
NUM_ITEMS = 50
NUM_SEGMENTS = 4
NUM_ACTIONS = 8
VOCABULARY = Vocabulary(np.arange(NUM_ITEMS), num_oov_buckets=2)
FIRST_ITEM = VOCABULARY.first_item


def jagged(lists: list[list[int]]) -> Jagged:
    return Jagged(
        np.array([value for row in lists for value in row], np.int64), offsets_of(np.array([*map(len, lists)]))
    )


def rows_of(items: list[list[int]], timestamps: list[list[int]] | None = None) -> Rows:
    """Rows of these items; by default an hour apart. User u of segment u % 4."""
    item = jagged(items)
    timestamp = jagged(timestamps or [[1000 + 3600 * t for t in range(len(row))] for row in items])
    segments = jagged([[u % NUM_SEGMENTS] for u in range(len(items))])
    return Rows(np.arange(len(items)), item.values, timestamp.values, item.offsets, {"segment": segments})


def random_rows(lengths: list[int] | Ints, seed: int = 0) -> Rows:
    """Rows of these lengths whose events all differ by (item, timestamp), so that each can be told."""
    rng = np.random.default_rng(seed)
    total = int(np.sum(lengths))
    return Rows(
        user_id=100 + np.arange(len(lengths)),
        item=rng.integers(FIRST_ITEM, FIRST_ITEM + NUM_ITEMS, size=total),
        timestamp=10**9 + rng.integers(1, 10**6, size=total).cumsum(),
        offsets=offsets_of(np.array(lengths, np.int64)),
        context={"segment": jagged([[u % NUM_SEGMENTS] for u in range(len(lengths))])},
    )


def with_action(rows: Rows) -> Rows:
    """The same with an event column that its item decides, so that each id tells whose it is."""
    return replace(rows, event_columns={"action": action_of(rows.item)})


def action_of(item: Ints) -> Ints:
    """1..7 of items and out-of-vocabulary rows, 0 of the mask."""
    return np.where(item == 0, 0, 1 + item % (NUM_ACTIONS - 1))


def write(folder: Path, rows: Rows, *, events_per_row_group: int = 40, events_per_file: int = 100) -> DatasetMeta:
    columns = {"context": {"segment": NUM_SEGMENTS}, "event_columns": dict.fromkeys(rows.event_columns, NUM_ACTIONS)}
    limits = {"events_per_row_group": events_per_row_group, "events_per_file": events_per_file}
    with DatasetWriter(folder, name="sample", vocabulary=VOCABULARY, **columns, **limits) as writer:
        writer.append(rows)
        return writer.finish()


def dataset(folder: Path, rows: Rows, **limits: int) -> UserHistories:
    write(folder, rows, **limits)
    return open_dataset(folder)


def lists(values: Ints, offsets: Ints) -> list[list[int]]:
    return [values[first:stop].tolist() for first, stop in pairwise(offsets)]
