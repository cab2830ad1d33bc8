"""Ranking data sets on disk: written beside and put in place when whole, read by row groups with every row checked."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ssd_torchrec.data.ranking.rows import RankingRows, check_rows
from ssd_torchrec.data.ranking.schema import META_FILE, PARTS, Part, RankingMeta
from ssd_torchrec.data.rows import Ints, Jagged
from ssd_torchrec.data.scratch import replace_folder, scratch_folder
from ssd_torchrec.errors import DataError

ROWS_PER_GROUP = 8192


class RankingWriter:
    """Writes impressions to a folder beside the target, which takes the target's place in `finish`.

    with RankingWriter(folder, meta) as writer:
        writer.append("train", rows)
        meta = writer.finish()

    Args:
        folder: one that holds a ranking data set is replaced.
        meta: what is known beforehand; rows, positives and longest histories are counted.

    Raises:
        DataError: `folder` holds something that is no ranking data set.
    """

    def __init__(self, folder: Path, meta: RankingMeta, *, rows_per_group: int = ROWS_PER_GROUP) -> None:
        self._target = folder.absolute()
        if self._target.exists() and not (self._target / META_FILE).is_file():
            raise DataError(
                f"{folder} must be a ranking data set to be replaced, or not be there; it has no {META_FILE}"
            )
        self._meta = replace(
            meta,
            num_rows=dict.fromkeys(PARTS, 0),
            num_positives=dict.fromkeys(PARTS, 0),
            longest=dict.fromkeys(meta.histories, 1),
        )
        self._rows_per_group = rows_per_group
        self._files: dict[Part, pq.ParquetWriter] = {}
        self._scratch = ExitStack()

    def __enter__(self) -> "RankingWriter":
        with ExitStack() as until_failure:
            self._partial = until_failure.enter_context(scratch_folder(self._target, "partial"))
            for part in PARTS:
                file = pq.ParquetWriter(self._partial / f"{part}.parquet", schema_of(self._meta), compression="zstd")
                self._files[part] = until_failure.enter_context(file)
            self._scratch = until_failure.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._scratch.close()

    def append(self, part: Part, rows: RankingRows) -> None:
        """Write these impressions after those before.

        Raises:
            DataError: the rows are not what a reader would accept.
        """
        check_rows(rows, self._meta, f"rows to be written to {self._target.name}/{part}")
        self._files[part].write_table(_as_table(rows, self._meta), row_group_size=self._rows_per_group)
        self._meta.num_rows[part] += len(rows)
        self._meta.num_positives[part] += int(rows.label.sum())
        for name in self._meta.histories:
            self._meta.longest[name] = max(self._meta.longest[name], int(rows.jagged[name].lengths.max(initial=0)))

    def finish(self) -> RankingMeta:
        """Put the data set in its place and say what it holds."""
        for file in self._files.values():
            file.close()
        self._meta.write(self._partial)
        replace_folder(self._target, self._partial)
        return self._meta


class RankingPart:
    """The impressions of one part, read by row groups."""

    def __init__(self, folder: Path, part: Part) -> None:
        """Open a part; its rows are checked when they are read.

        Raises:
            DataError: there is no such data set, or the part is not what ranking.json says.
        """
        self.meta = RankingMeta.read(folder)
        self.part: Part = part
        self._path = folder / f"{part}.parquet"
        try:
            self._file = pq.ParquetFile(self._path)
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{self._path} must be Parquet, but {error}; prepare the data set again") from error
        if not self._file.schema_arrow.equals(schema_of(self.meta)):
            raise DataError(
                f"{self._path} must have the columns of {META_FILE}, {schema_of(self.meta).names}, got "
                f"{self._file.schema_arrow.names}; prepare the data set again"
            )
        if self._file.metadata.num_rows != self.meta.num_rows[part]:
            raise DataError(
                f"{self._path} must have {self.meta.num_rows[part]} rows as {META_FILE} says, got "
                f"{self._file.metadata.num_rows}; prepare the data set again"
            )

    def __len__(self) -> int:
        return self._file.metadata.num_rows

    @property
    def group_sizes(self) -> Ints:
        """(row groups,) rows of each."""
        groups = range(self._file.num_row_groups)
        return np.array([self._file.metadata.row_group(group).num_rows for group in groups], np.int64)

    def read(self, group: int) -> RankingRows:
        """The rows of one row group.

        Raises:
            DataError: they are not what ranking.json says, naming the row.
        """
        place = f"{self._path}, row group {group}"
        try:
            table = self._file.read_row_group(group)
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{place} must be readable, but {error}; prepare the data set again") from error
        for name in table.column_names:
            if table[name].null_count or (
                pa.types.is_list(table[name].type) and table[name].combine_chunks().flatten().null_count
            ):
                raise DataError(f"{place}: {name} must hold no null; prepare the data set again")
        rows = _as_rows(table, self.meta)
        check_rows(rows, self.meta, place)
        return rows


def schema_of(meta: RankingMeta) -> pa.Schema:
    """Columns of a part."""
    columns = [("label", pa.int64()), ("timestamp", pa.int64()), *((name, pa.float32()) for name in meta.dense)]
    return pa.schema([*columns, *((key, pa.list_(pa.int64())) for key in meta.keys)])


def _as_table(rows: RankingRows, meta: RankingMeta) -> pa.Table:
    columns = [
        pa.array(rows.label),
        pa.array(rows.timestamp),
        *(pa.array(rows.dense[:, n]) for n in range(len(meta.dense))),
    ]
    for key in meta.keys:
        jagged = rows.jagged[key]
        columns.append(pa.ListArray.from_arrays(pa.array(jagged.offsets, pa.int32()), pa.array(jagged.values)))
    return pa.table(columns, schema=schema_of(meta))


def _as_rows(table: pa.Table, meta: RankingMeta) -> RankingRows:
    def numbers(name: str) -> np.ndarray:
        return table[name].combine_chunks().to_numpy(zero_copy_only=False)

    jagged = {}
    for key in meta.keys:
        lists = table[key].combine_chunks()
        offsets = lists.offsets.to_numpy().astype(np.int64)
        jagged[key] = Jagged(lists.flatten().to_numpy(), offsets - offsets[0])
    dense = (
        np.stack([numbers(name) for name in meta.dense], axis=1)
        if meta.dense
        else np.zeros((len(table), 0), np.float32)
    )
    return RankingRows(numbers("label"), numbers("timestamp"), dense, jagged)
