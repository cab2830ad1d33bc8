"""Writing a data set so that an interrupted write leaves the old one, or none, but never half of one."""

import os
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ssd_torchrec.data.checks import Place, check_rows
from ssd_torchrec.data.fingerprint import Fingerprint
from ssd_torchrec.data.rows import Jagged, Rows, cut_under_budget
from ssd_torchrec.data.schema import EVENT_COLUMNS, META_FILE, DatasetMeta, Scores
from ssd_torchrec.data.vocabulary import Vocabulary
from ssd_torchrec.errors import DataError


class DatasetWriter:
    """Writes rows to a folder beside the target, which takes the target's place in `finish`.

    with DatasetWriter(folder, name="shop", vocabulary=vocabulary, context={"segment": 8}) as writer:
        for rows in blocks:
            writer.append(rows)
        meta = writer.finish()

    Left without `finish`, or killed, it leaves the old data set, or none, under the target's name.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        name: str,
        vocabulary: Vocabulary,
        context: dict[str, int] | None = None,
        events_per_row_group: int = 2**18,
        events_per_file: int = 2**24,
    ) -> None:
        """Check the target; entering the writer begins to write.

        Args:
            folder: the target; an old data set there is replaced, anything else is refused.
            vocabulary: where the table rows come from; saved beside the rows.
            context: context columns and the number of values of each.
            events_per_row_group: bounds a row group, which readers hold in memory at once; a longer row is its own.
            events_per_file: a file that holds so many is followed by the next.

        Raises:
            DataError: `folder` holds something that is no data set.
        """
        self._target = Path(folder).absolute()
        if self._target.exists() and not (self._target / META_FILE).is_file():
            raise DataError(f"{folder} must be a data set to be replaced, or not be there; it has no {META_FILE}")
        self._described = DatasetMeta(
            name=name,
            num_users=0,
            num_events=0,
            num_items=len(vocabulary),
            num_oov_buckets=vocabulary.num_oov_buckets,
            item_vocabulary_hash=vocabulary.content_hash,
            context=dict(context or {}),
            fingerprint="",
        )
        self._events_per_row_group, self._events_per_file = events_per_row_group, events_per_file
        self._partial = self._target.with_name(f".{self._target.name}.partial-{os.getpid()}")
        self._vocabulary = vocabulary
        self._fingerprint = Fingerprint(self._described)
        self._file: pq.ParquetWriter | None = None
        self._files = self._events_in_file = 0

    def __enter__(self) -> "DatasetWriter":
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        self._vocabulary.save(self._partial)
        self._open_next_file()
        return self

    def __exit__(self, *_: object) -> None:
        self._close_file()
        shutil.rmtree(self._partial, ignore_errors=True)

    def append(self, rows: Rows) -> None:
        """Write these users after the ones before.

        Raises:
            DataError: the rows are not what a reader would accept.
        """
        check_rows(rows, self._described, Place(f"rows to be written to {self._target.name}"))
        cuts = cut_under_budget(rows.lengths, self._events_per_row_group).tolist()
        for first, stop in pairwise(cuts):
            if self._events_in_file >= self._events_per_file:
                self._open_next_file()
            group = rows[first:stop]
            assert self._file is not None
            self._file.write_table(_as_table(group, self._schema), row_group_size=max(group.num_rows, 1))
            self._fingerprint.update(group)
            self._events_in_file += group.num_events

    def finish(self, *, attainable: Scores | None = None, attainable_without_time: Scores | None = None) -> DatasetMeta:
        """Put the data set in its place and say what it holds."""
        self._close_file()
        meta = replace(
            self._described,
            num_users=self._fingerprint.num_users,
            num_events=self._fingerprint.num_events,
            attainable=attainable,
            attainable_without_time=attainable_without_time,
            fingerprint=self._fingerprint.hexdigest(),
        )
        meta.write(self._partial)
        _replace(self._target, self._partial)
        return meta

    @property
    def _schema(self) -> pa.Schema:
        jagged = [(name, pa.list_(pa.int64())) for name in (*EVENT_COLUMNS, *self._described.context)]
        return pa.schema([("user_id", pa.int64()), *jagged])

    def _open_next_file(self) -> None:
        self._close_file()
        file = self._partial / f"users-{self._files:05d}.parquet"
        self._file = pq.ParquetWriter(file, self._schema, compression="zstd")
        self._files += 1
        self._events_in_file = 0

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _as_table(rows: Rows, schema: pa.Schema) -> pa.Table:
    jagged = {
        "item": Jagged(rows.item, rows.offsets),
        "timestamp": Jagged(rows.timestamp, rows.offsets),
        **rows.context,
    }
    lists = [pa.ListArray.from_arrays(pa.array(c.offsets, pa.int32()), pa.array(c.values)) for c in jagged.values()]
    return pa.Table.from_arrays([pa.array(rows.user_id), *lists], schema=schema)


def _replace(target: Path, partial: Path) -> None:
    """Rename `partial` to `target`; in between there may be no target, but never half of one."""
    old = partial.with_name(f"{partial.name}-old")
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)
