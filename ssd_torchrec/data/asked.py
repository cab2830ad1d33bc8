"""Whom to recommend to: users that a data set knows, by their ids, or users who bring their histories.

    # known         user_id                              as the log had them
    # with history  user_id  item        timestamp       a list of raw ids, as many unix seconds ascending
    #               "ann"    [70, 3, 3]  [100, 160, 900]
    #               ... and for each context column of the data set a list of its values, or of ids if they have none;
    #               for each event column as many of these as items, null for an event without a value

Histories that are brought become a data set of their own in a folder of the caller's, item ids mapped by the
vocabulary of the data set the model was trained on. So both kinds come down to rows of a data set.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ssd_torchrec.data.asked_file import Block, IdType, blocks_of
from ssd_torchrec.data.parquet import UserHistories
from ssd_torchrec.data.rows import Ints, Jagged, Rows
from ssd_torchrec.data.schema import UNKNOWN, DatasetMeta
from ssd_torchrec.data.values import Values
from ssd_torchrec.data.vocabulary import Vocabulary
from ssd_torchrec.data.writer import DatasetWriter
from ssd_torchrec.errors import DataError

LATEST_S = 4_102_444_800  # 2100-01-01: what lies beyond is no time in seconds
_SHOWN = 5  # unknown users that a message names


@dataclass(frozen=True, eq=False)
class AskedUsers:
    """N users in the order in which they were asked for; the same one may come again."""

    folder: Path  # the data set that holds their histories
    row: Ints  # (N,) of that data set, in the order of its files
    user_id: pa.Array  # (N,) int64 or large_string, as given
    num_unknown: int  # asked for besides, and left out


def read_asked_users(file: Path, histories: UserHistories, folder: Path, *, skip_unknown: bool = False) -> AskedUsers:
    """Read and check a whole file of users; the forms it may have are at the head of this module and of `asked_file`.

    Args:
        histories: the data set whose users and items are known; its vocabulary maps raw item ids, and unknown ones get
            the rows for unknown ids. Event columns are those that it reads.
        folder: where histories that are brought go, as a data set; not made for users known by their ids.
        skip_unknown: leave users out that the data set does not know.

    Raises:
        DataError: the file is empty or unreadable, has other columns, a null, ids of another type than the data set's,
            item and timestamp or an event column of different length, times that fall, are negative or no seconds, ids
            or values that the data set's columns do not have, or users that are unknown. The message names the row.
    """
    blocks = blocks_of(file)
    first = next(blocks, None)
    if first is None:
        raise DataError(f"{file} must hold at least one user, got none; write one row a user")
    blocks = chain([first], blocks)
    if _brings_histories(first, histories.meta):
        return _with_histories(blocks, histories, folder)
    return _known(blocks, histories, skip_unknown)


def _brings_histories(first: Block, meta: DatasetMeta) -> bool:
    columns, whole = set(first.columns), {"user_id", "item", "timestamp", *meta.context, *meta.event_columns}
    if columns not in ({"user_id"}, whole):
        others = ", ".join(sorted(whole - {"user_id"}))
        raise DataError(
            f"{first.file}: columns must be user_id alone, for users of the data set, or user_id, {others}, for users "
            f"with their histories; got {', '.join(sorted(columns)) or 'none'}: rename, add or drop columns"
        )
    return columns == whole


def _known(blocks: Iterator[Block], histories: UserHistories, skip_unknown: bool) -> AskedUsers:
    known = pa.chunked_array([histories.raw_user_ids(group) for group in range(histories.num_row_groups)])
    expected = IdType(known.type, "as in the data set")
    asked = pa.concat_arrays([block.ids("user_id", expected) for block in blocks])
    row = _rows_of_users(asked, known)
    unknown = np.flatnonzero(row < 0)
    if len(unknown) and not skip_unknown:
        named = [repr(asked[int(at)].as_py()) for at in unknown[:_SHOWN]]
        raise DataError(
            f"every user must be in {histories.folder}, but {len(unknown):,} of {len(asked):,} are not: "
            f"{', '.join(named + ['...'] * (len(unknown) > _SHOWN))}; leave them out with --skip-unknown, or give "
            "users with their histories"
        )
    found = np.flatnonzero(row >= 0)
    return AskedUsers(histories.folder, row[found], asked.take(pa.array(found)), len(unknown))


def _rows_of_users(asked: pa.Array, known: pa.ChunkedArray) -> Ints:
    """(N,) place of each id asked for among the known ones, -1 for none."""
    distinct = asked.dictionary_encode()
    # hashed are the ids asked for, not the users of the data set, who may be many more
    options = pc.SetLookupOptions(value_set=distinct.dictionary)
    place = pc.call_function("index_in", [known], options).combine_chunks()
    hits = np.flatnonzero(place.is_valid().to_numpy(zero_copy_only=False))
    row = np.full(len(distinct.dictionary), -1, np.int64)
    row[place.take(pa.array(hits)).to_numpy()] = hits
    return row[distinct.indices.to_numpy()]


def _with_histories(blocks: Iterator[Block], histories: UserHistories, folder: Path) -> AskedUsers:
    vocabulary, values, meta = histories.vocabulary(), histories.values(), histories.meta
    parts: list[pa.Array] = []
    with DatasetWriter(
        folder, name="asked", vocabulary=vocabulary, context=meta.context, event_columns=meta.event_columns
    ) as writer:
        for block in blocks:
            expected = IdType(parts[0].type if parts else None, "as in the rows before" if parts else "")
            parts.append(block.ids("user_id", expected))
            writer.append(_rows(block, meta, vocabulary, values))
        writer.finish()
    user_id = pa.concat_arrays(parts)
    return AskedUsers(folder, np.arange(len(user_id)), user_id, 0)


def _rows(block: Block, meta: DatasetMeta, vocabulary: Vocabulary, values: Values) -> Rows:
    item, offsets = block.id_lists("item", IdType(vocabulary.ids.type, "as in the vocabulary"))
    timestamp = _seconds(block, offsets)
    context = {
        name: _bags_of_values(block, name, values[name]) if name in values else _bags(block, name, count)
        for name, count in meta.context.items()
    }
    event_columns = {
        name: _event_ids(block, name, offsets, count, values) for name, count in meta.event_columns.items()
    }
    number = block.first_row + np.arange(len(offsets) - 1)  # ids of any type, so the rows are numbered instead
    return Rows(number, vocabulary.rows_of(item), timestamp, offsets, context, event_columns)


def _seconds(block: Block, item_offsets: Ints) -> Ints:
    values, offsets = block.id_lists("timestamp", IdType(pa.int64(), "unix seconds"))
    _refuse_other_lengths(block, "timestamp", offsets, item_offsets, "give each item a time")
    seconds = values.to_numpy()
    block.refuse_where(
        (seconds < 0) | (seconds > LATEST_S),
        offsets,
        lambda at: (
            f"timestamp must be unix seconds from 0 to {LATEST_S} (the year 2100), got {seconds[at]}; "
            "divide milliseconds by 1,000, microseconds by 1,000,000"
        ),
    )
    falls = np.diff(seconds, prepend=seconds[:1]) < 0
    falls[offsets[:-1][np.diff(offsets) > 0]] = False  # a new row may begin earlier than the last one ended
    block.refuse_where(
        falls,
        offsets,
        lambda at: (
            f"timestamps must ascend, got {seconds[at]} after {seconds[at - 1]}; sort the events of each user by time"
        ),
    )
    return seconds


def _refuse_other_lengths(block: Block, name: str, offsets: Ints, item_offsets: Ints, mend: str) -> None:
    items, others = np.diff(item_offsets), np.diff(offsets)
    block.refuse_where(
        items != others,
        np.arange(len(offsets)),
        lambda at: f"item and {name} must be equally long, got {items[at]} and {others[at]}; {mend}",
    )


def _bags(block: Block, name: str, count: int) -> Jagged:
    values, offsets = block.id_lists(name, IdType(pa.int64(), "of the data set's context"))
    return Jagged(_in_range(block, name, values.to_numpy(), offsets, count), offsets)


def _in_range(block: Block, name: str, ids: Ints, offsets: Ints, count: int) -> Ints:
    block.refuse_where(
        (ids < 0) | (ids >= count),
        offsets,
        lambda at: f"{name} must be ids 0..{count - 1} as in the data set, got {ids[at]}; correct the id",
    )
    return ids


def _bags_of_values(block: Block, name: str, known: pa.Array) -> Jagged:
    values, offsets = block.id_lists(name, IdType(None, "of the data set's context"))
    return Jagged(_ids_of_values(block, name, values, offsets, known, "leave it out of the list"), offsets)


def _ids_of_values(block: Block, name: str, values: pa.Array, offsets: Ints, known: pa.Array, mend: str) -> Ints:
    options = pc.SetLookupOptions(value_set=known)
    ids = pc.call_function("index_in", [values.cast(pa.large_string())], options)
    block.refuse_where(
        ids.is_null().to_numpy(zero_copy_only=False),
        offsets,
        lambda at: f"{name} must be values that the data set knows, got {values[at].as_py()!r}; {mend}",
    )
    return ids.to_numpy().astype(np.int64)


def _event_ids(block: Block, name: str, item_offsets: Ints, count: int, values: Values) -> Ints:
    """(E,) id of each event in an event column; null is unknown."""
    of_type = IdType(None if name in values else pa.int64(), "of the data set's event column")
    given, offsets = block.id_lists(name, of_type, nulls=True)
    _refuse_other_lengths(block, name, offsets, item_offsets, f"give each item its {name}, or null")
    if name not in values:
        return _in_range(block, name, given.fill_null(UNKNOWN).to_numpy(), offsets, count)
    return _ids_of_values(block, name, given, offsets, values[name], "write null for an event without a value")
