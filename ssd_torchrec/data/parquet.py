"""Data sets on disk, opened with every row checked and streamed by row groups; `writer.py` writes them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from ssd_torchrec.data.checks import Place, check_equal_lengths, check_nulls, check_rows, check_schema
from ssd_torchrec.data.fingerprint import Fingerprint
from ssd_torchrec.data.rows import Ints, Jagged, Rows, offsets_of
from ssd_torchrec.data.schema import EVENT_COLUMNS, META_FILE, RAW_USER_ID, DatasetMeta
from ssd_torchrec.data.values import Values, load_values, values_hash
from ssd_torchrec.data.vocabulary import Vocabulary
from ssd_torchrec.errors import DataError


@dataclass(frozen=True, eq=False)
class UserHistories:
    """An opened data set: every row was checked, row groups are read when asked for."""

    folder: Path
    meta: DatasetMeta
    counts: Ints  # (num_users,) events of each row, in the order of the files
    row_group_offsets: Ints  # (row groups + 1,) boundaries of the row groups among the rows
    fragments: tuple[ds.ParquetFileFragment, ...]  # one a row group

    @property
    def num_rows(self) -> int:
        return len(self.counts)

    @property
    def num_row_groups(self) -> int:
        return len(self.fragments)

    @property
    def fingerprint(self) -> str:
        return self.meta.fingerprint

    def with_event_columns(self, names: Iterable[str]) -> "UserHistories":
        """The same data set, of whose event columns only these are read.

        Raises:
            ConfigError: it has no such column.
        """
        return replace(self, meta=self.meta.with_event_columns(names))

    def read(self, row_group: int) -> Rows:
        """The rows of one row group.

        Raises:
            DataError: the file was changed since the data set was opened.
        """
        rows = _read(self.fragments[row_group], self.meta)
        self._check_unchanged(row_group, np.array_equal(rows.lengths, self.counts[slice(*self._span(row_group))]))
        return rows

    def raw_user_ids(self, row_group: int) -> pa.Array:
        """What the users of one row group are called in the log: int64, or large strings.

        Raises:
            DataError: the file was changed since the data set was opened.
        """
        ids = _read_raw_user_ids(self.fragments[row_group], self.meta)
        first, stop = self._span(row_group)
        self._check_unchanged(row_group, len(ids) == stop - first)
        return ids

    def vocabulary(self) -> Vocabulary:
        """What gave out the table rows.

        Raises:
            DataError: vocabulary.parquet is missing, or is not the one that the rows were made with.
        """
        vocabulary = Vocabulary.load(self.folder)
        if vocabulary.content_hash != self.meta.item_vocabulary_hash:
            raise DataError(
                f"{self.folder}: vocabulary must have the hash {self.meta.item_vocabulary_hash} of meta.json, got "
                f"{vocabulary.content_hash}; copy it from where the data set was prepared"
            )
        return vocabulary

    def values(self) -> Values:
        """What the ids of context and event columns mean, where the data set says so.

        Raises:
            DataError: values.parquet is missing, or is not the one that the rows were made with.
        """
        if not self.meta.values_hash:
            return {}
        values = load_values(self.folder)
        if values_hash(values) != self.meta.values_hash:
            raise DataError(
                f"{self.folder}: values must have the hash {self.meta.values_hash} of meta.json, got "
                f"{values_hash(values)}; copy them from where the data set was prepared"
            )
        return values

    def __iter__(self) -> Iterator[Rows]:
        """Row group after row group, in the order of the files."""
        return map(self.read, range(self.num_row_groups))

    def _span(self, row_group: int) -> tuple[int, int]:
        """First row of a row group, and the one after its last."""
        return int(self.row_group_offsets[row_group]), int(self.row_group_offsets[row_group + 1])

    def _check_unchanged(self, row_group: int, unchanged: bool) -> None:
        if not unchanged:
            raise DataError(f"{_place(self.fragments[row_group])} changed since it was opened; open the data set again")


def open_dataset(folder: Path | str) -> UserHistories:
    """Open a data set after one streaming pass over all rows, a row group in memory at a time.

    Raises:
        DataError: meta.json or a file is missing, of a newer format, cut short or altered; a column is missing, null or
            of another type; item and timestamp differ in length; a timestamp is negative or falls within its row; an
            id lies outside the item table, is the mask, or lies outside its context column's range. The message
            names file, row group and user.
    """
    folder = Path(folder)
    meta = DatasetMeta.read(folder)
    fragments = tuple(_fragments(folder, meta))
    fingerprint = Fingerprint(meta)
    counts = []
    for fragment in fragments:
        rows = _read(fragment, meta)
        check_rows(rows, meta, _place(fragment))
        fingerprint.update(rows, _read_raw_user_ids(fragment, meta) if meta.raw_user_type == "string" else None)
        counts.append(rows.lengths)
    fingerprint.check(meta, folder)
    every_count = np.concatenate([np.zeros(0, np.int64), *counts])
    return UserHistories(folder, meta, every_count, offsets_of(np.array([len(c) for c in counts], np.int64)), fragments)


def _fragments(folder: Path, meta: DatasetMeta) -> Iterator[ds.ParquetFileFragment]:
    files = sorted(folder.glob("users-*.parquet"))
    if not files:
        raise DataError(f"{folder} must hold users-*.parquet beside {META_FILE}, got none; prepare the data set again")
    for file in files:
        try:
            schema = pq.read_schema(file)
            check_schema(schema, meta, str(file))
            for fragment in ds.dataset(file, schema=schema, format="parquet").get_fragments():
                yield from fragment.split_by_row_group()
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{file}: must be a Parquet file, but {error}; copy or prepare it again") from error


def _read(fragment: ds.ParquetFileFragment, meta: DatasetMeta) -> Rows:
    columns = _columns(fragment, ["user_id", *EVENT_COLUMNS, *meta.event_columns, *meta.context])
    events = {name: columns[name].value_lengths().to_numpy() for name in (*EVENT_COLUMNS, *meta.event_columns)}
    check_equal_lengths(events, _place(fragment))
    return Rows(
        user_id=columns["user_id"].to_numpy(),
        item=columns["item"].flatten().to_numpy(),
        timestamp=columns["timestamp"].flatten().to_numpy(),
        offsets=offsets_of(events["item"]),
        context={name: _as_jagged(columns[name]) for name in meta.context},
        event_columns={name: columns[name].flatten().to_numpy() for name in meta.event_columns},
    )


def _read_raw_user_ids(fragment: ds.ParquetFileFragment, meta: DatasetMeta) -> pa.Array:
    if meta.raw_user_type == "int64":
        return _columns(fragment, ["user_id"])["user_id"]
    return _columns(fragment, [RAW_USER_ID])[RAW_USER_ID].cast(pa.large_string())


def _columns(fragment: ds.ParquetFileFragment, names: list[str]) -> dict[str, pa.Array]:
    """Columns of a row group, without nulls."""
    place = _place(fragment)
    try:
        table = fragment.to_table(columns=names, use_threads=False)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{place}: must be readable, but {error}; copy or prepare the file again") from error
    columns = {name: _one_array(table[name]) for name in names}
    for name, column in columns.items():
        check_nulls(column, name, place)
    return columns


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _as_jagged(column: pa.Array) -> Jagged:
    return Jagged(column.flatten().to_numpy(), offsets_of(column.value_lengths().to_numpy()))


def _place(fragment: ds.ParquetFileFragment) -> Place:
    return Place(str(fragment.path), fragment.row_groups[0].id)
