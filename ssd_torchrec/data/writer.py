"""Writing a data set so that an interrupted write leaves the old one, or none, but never half of one."""

from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ssd_torchrec.data.checks import Place, check_rows
from ssd_torchrec.data.distribution import Distribution, gaps_of
from ssd_torchrec.data.fingerprint import Fingerprint
from ssd_torchrec.data.rows import Jagged, Rows, cut_under_budget
from ssd_torchrec.data.schema import EVENT_COLUMNS, META_FILE, RAW_USER_ID, DatasetMeta, RawType, Scores
from ssd_torchrec.data.scratch import replace_folder, scratch_folder
from ssd_torchrec.data.values import Values, save_values, values_hash
from ssd_torchrec.data.vocabulary import Vocabulary
from ssd_torchrec.errors import DataError


class DatasetWriter:
    """Writes rows to a folder beside the target, which takes the target's place in `finish`.

    with DatasetWriter(folder, name="shop", vocabulary=vocabulary, context={"segment": 8}) as writer:
        for rows in blocks:
            writer.append(rows)
        meta = writer.finish()

    Left without `finish`, or killed, it leaves the old data set, or none, under the target's name. What a killed one
    leaves beside the target is cleared away by the next.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        name: str,
        vocabulary: Vocabulary,
        context: dict[str, int] | None = None,
        event_columns: dict[str, int] | None = None,
        values: Values | None = None,
        raw_user_type: RawType = "int64",
        events_per_row_group: int = 2**18,
        events_per_file: int = 2**24,
    ) -> None:
        """Check the target; entering the writer begins to write.

        Args:
            folder: the target; an old data set there is replaced, anything else is refused.
            vocabulary: where the table rows come from; saved beside the rows.
            context: context columns and the number of values of each.
            event_columns: further event columns and the number of ids of each.
            values: what the ids of both kinds of columns mean; saved beside the rows.
            raw_user_type: what users are called in the log; with "string", `append` is given their names.
            events_per_row_group: bounds a row group, which readers hold in memory at once; a longer row is its own.
            events_per_file: a file that holds so many is followed by the next.

        Raises:
            DataError: `folder` holds something that is no data set, or `values` are not those of the columns.
        """
        self._target = Path(folder).absolute()
        check_target(self._target)
        self._values = values or {}
        self._described = DatasetMeta(
            name=name,
            num_users=0,
            num_events=0,
            num_items=len(vocabulary),
            num_oov_buckets=vocabulary.num_oov_buckets,
            item_vocabulary_hash=vocabulary.content_hash,
            raw_user_type=raw_user_type,
            context=dict(context or {}),
            event_columns=dict(event_columns or {}),
            values_hash=values_hash(self._values) if self._values else "",
            fingerprint="",
        )
        self._check_values()
        self._events_per_row_group, self._events_per_file = events_per_row_group, events_per_file
        self._vocabulary = vocabulary
        self._fingerprint = Fingerprint(self._described)
        self._lengths, self._gaps_s = Distribution(), Distribution()
        self._scratch = ExitStack()
        self._file: pq.ParquetWriter | None = None
        self._files = self._events_in_file = 0

    def __enter__(self) -> "DatasetWriter":
        with ExitStack() as until_failure:
            self._partial = until_failure.enter_context(scratch_folder(self._target, "partial"))
            self._vocabulary.save(self._partial)
            if self._values:
                save_values(self._values, self._partial)
            self._open_next_file()
            self._scratch = until_failure.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        with self._scratch:
            self._close_file()

    def append(self, rows: Rows, raw_user_ids: pa.Array | None = None) -> None:
        """Write these users after the ones before.

        Args:
            raw_user_ids: (R,) strings that the users are called in the log; none where they are called `user_id`.

        Raises:
            DataError: the rows are not what a reader would accept.
        """
        assert (raw_user_ids is not None) == (self._described.raw_user_type == "string")
        check_rows(rows, self._described, Place(f"rows to be written to {self._target.name}"))
        cuts = cut_under_budget(rows.lengths, self._events_per_row_group).tolist()
        for first, stop in pairwise(cuts):
            if self._events_in_file >= self._events_per_file:
                self._open_next_file()
            group = rows[first:stop]
            names = None if raw_user_ids is None else raw_user_ids[first:stop]
            assert self._file is not None
            self._file.write_table(_as_table(group, names, self._schema), row_group_size=max(group.num_rows, 1))
            self._fingerprint.update(group, names)
            self._lengths.add(group.lengths)
            self._gaps_s.add(gaps_of(group.timestamp, group.offsets))
            self._events_in_file += group.num_events

    def finish(self, *, attainable: Scores | None = None, attainable_without_time: Scores | None = None) -> DatasetMeta:
        """Put the data set in its place and say what it holds."""
        self._close_file()
        meta = replace(
            self._described,
            num_users=self._fingerprint.num_users,
            num_events=self._fingerprint.num_events,
            lengths=self._lengths.summary(),
            gaps_s=self._gaps_s.summary(),
            attainable=attainable,
            attainable_without_time=attainable_without_time,
            fingerprint=self._fingerprint.hexdigest(),
        )
        meta.write(self._partial)
        replace_folder(self._target, self._partial)
        return meta

    def _check_values(self) -> None:
        named = {name: len(values) for name, values in self._values.items()}
        counted = {**self._described.context, **self._described.event_columns}
        if named and named != counted:
            raise DataError(f"values must be given for every column as counted, {counted}, got {named}; give all")

    @property
    def _schema(self) -> pa.Schema:
        meta = self._described
        names = [(RAW_USER_ID, pa.large_string())] if meta.raw_user_type == "string" else []
        jagged = [(name, pa.list_(pa.int64())) for name in (*EVENT_COLUMNS, *meta.event_columns, *meta.context)]
        return pa.schema([("user_id", pa.int64()), *names, *jagged])

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


def check_target(folder: Path) -> None:
    """Refuse to write where something else lies.

    Raises:
        DataError: `folder` holds something that is no data set.
    """
    if folder.exists() and not (folder / META_FILE).is_file():
        raise DataError(f"{folder} must be a data set to be replaced, or not be there; it has no {META_FILE}")


def _as_table(rows: Rows, raw_user_ids: pa.Array | None, schema: pa.Schema) -> pa.Table:
    events = {"item": rows.item, "timestamp": rows.timestamp, **rows.event_columns}
    jagged = {name: Jagged(values, rows.offsets) for name, values in events.items()} | rows.context
    columns: dict[str, pa.Array] = {"user_id": pa.array(rows.user_id)}
    if raw_user_ids is not None:
        columns[RAW_USER_ID] = raw_user_ids
    for name, lists in jagged.items():
        columns[name] = pa.ListArray.from_arrays(pa.array(lists.offsets, pa.int32()), pa.array(lists.values))
    return pa.table(columns, schema=schema)
