"""What a row group must be before anything is trained on it: each refusal names file, row group, user and mend."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ssd_torchrec.data.rows import Ints, Jagged, Rows
from ssd_torchrec.data.schema import EVENT_COLUMNS, RAW_USER_ID, DatasetMeta
from ssd_torchrec.errors import DataError

_PREPARE_AGAIN = "prepare the data set again"


@dataclass(frozen=True)
class Place:
    """Where rows come from, for messages."""

    file: str
    row_group: int | None = None  # none before they are written

    def __str__(self) -> str:
        return self.file if self.row_group is None else f"{self.file}, row group {self.row_group}"


def check_schema(schema: pa.Schema, meta: DatasetMeta, file: str) -> None:
    """Refuse a file whose columns are not those of `meta`.

    Raises:
        DataError: a column is missing or of another type.
    """
    _check_column(schema, "user_id", "int64", pa.types.is_int64, file)
    if meta.raw_user_type == "string":
        _check_column(schema, RAW_USER_ID, "string", _is_string, file)
    for name in (*EVENT_COLUMNS, *meta.context, *meta.event_columns):
        _check_column(schema, name, "list<int64>", _is_list_of_int64, file)


def check_nulls(column: pa.Array, name: str, place: Place) -> None:
    """Refuse nulls in a column, or inside its lists.

    Raises:
        DataError: there is one.
    """
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError(f"{place}, row {row}: {name} must not be null; write an empty list or drop the user")
    if _is_list(column.type) and column.flatten().null_count:
        event = int(np.flatnonzero(column.flatten().is_null().to_numpy(zero_copy_only=False))[0])
        row = int(np.searchsorted(column.value_lengths().to_numpy().cumsum(), event, side="right"))
        raise DataError(f"{place}, row {row}: {name} must hold no null; drop the event in all event columns")


def check_equal_lengths(lengths: dict[str, Ints], place: Place) -> None:
    """Refuse rows whose event columns do not go together.

    Raises:
        DataError: some row has more of one column than of another.
    """
    for name, other in lengths.items():
        wrong = np.flatnonzero(lengths["item"] != other)
        if len(wrong):
            row = int(wrong[0])
            raise DataError(
                f"{place}, row {row}: item and {name} must be equally long, got {lengths['item'][row]} and "
                f"{other[row]}; write one {name} an event"
            )


def check_rows(rows: Rows, meta: DatasetMeta, place: Place) -> None:
    """Refuse values that no batch may hold.

    Raises:
        DataError: an id outside the table or its column's range, a mask, a negative or falling timestamp.
    """
    table_rows = _Range(
        1,
        meta.num_table_rows,
        f"item must be table rows 1..{meta.num_table_rows - 1} (row 0 is the mask)",
        "map raw ids with the data set's Vocabulary, which gives unknown ones an out-of-vocabulary row",
    )
    table_rows.check(Jagged(rows.item, rows.offsets), rows, place)
    _check_timestamps(rows, place)
    further = rows.context | {name: Jagged(ids, rows.offsets) for name, ids in rows.event_columns.items()}
    for name, count in {**meta.context, **meta.event_columns}.items():
        holds = f"{name} must be ids 0..{count - 1} as meta.json says"
        mend = f"correct the ids, or the count of {name} in meta.json, and {_PREPARE_AGAIN}"
        _Range(0, count, holds, mend).check(further[name], rows, place)


def _check_timestamps(rows: Rows, place: Place) -> None:
    timestamps = Jagged(rows.timestamp, rows.offsets)
    seconds = _Range(0, 2**63 - 1, "timestamp must be unix seconds, 0 or later", "correct the log")
    seconds.check(timestamps, rows, place)
    falls = np.diff(rows.timestamp) < 0
    starts = rows.offsets[1:-1]
    inner = starts[(starts > 0) & (starts < rows.num_events)]
    falls[inner - 1] = False  # a new row may begin earlier than the last one ended
    if falls.any():
        event = int(np.argmax(falls)) + 1
        raise DataError(
            f"{_user(event, timestamps, rows, place)}: timestamps must ascend within a row, got "
            f"{rows.timestamp[event]} after {rows.timestamp[event - 1]}; sort the events of each user by time"
        )


@dataclass(frozen=True)
class _Range:
    """What every value of a column must be."""

    least: int
    stop: int
    holds: str
    mend: str

    def check(self, column: Jagged, rows: Rows, place: Place) -> None:
        outside = (column.values < self.least) | (column.values >= self.stop)
        if outside.any():
            event = int(np.argmax(outside))
            user = _user(event, column, rows, place)
            raise DataError(f"{user}: {self.holds}, got {column.values[event]}; {self.mend}")


def _user(event: int, column: Jagged, rows: Rows, place: Place) -> str:
    row = int(np.searchsorted(column.offsets, event, side="right")) - 1
    return f"{place}, row {row} (user_id {rows.user_id[row]})"


def _check_column(schema: pa.Schema, name: str, expected: str, holds, file: str) -> None:
    at = schema.get_field_index(name)
    if at < 0:
        raise DataError(f"{file}: column {name} must be there once, got columns {schema.names}; {_PREPARE_AGAIN}")
    if not holds(schema.field(at).type):
        raise DataError(f"{file}: column {name} must be {expected}, got {schema.field(at).type}; cast it")


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_list_of_int64(kind: pa.DataType) -> bool:
    return _is_list(kind) and pa.types.is_int64(kind.value_type)
