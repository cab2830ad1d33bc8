"""Parquet files, whose columns have types: ids are integers or strings, times are numbers, text or instants."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from ssd_torchrec.data.prepare.source import Column, Kind, Source, file_list, first_sentence, missing, quoted_name
from ssd_torchrec.errors import DataError

_AGAIN = "write or copy the file again"


@dataclass(frozen=True)
class ParquetSource(Source):
    """Files whose columns have a type each."""

    def relation(self, files: Sequence[Path]) -> str:
        names = ", ".join(f"{quoted_name(name)} AS {column.sql}" for name, column in self.columns.items())
        return f"(SELECT {names} FROM read_parquet({file_list(files)}, hive_partitioning = false))"

    def place(self, file: Path, row: int) -> str:
        first_row = 0
        metadata = pq.read_metadata(file)
        for group in range(metadata.num_row_groups):
            stop = first_row + metadata.row_group(group).num_rows
            if row < stop:
                return f"{file}, row group {group}, row {row - first_row}"
            first_row = stop
        return f"{file}, row {row}"

    def explain(self, error: duckdb.Error) -> DataError:
        """Looks for the first row group that cannot be read."""
        for file in self.files:
            try:
                table = pq.ParquetFile(file)
            except (OSError, pa.ArrowException) as wrong:
                return _unreadable(str(file), wrong)
            with table:
                for group in range(table.num_row_groups):
                    try:
                        table.read_row_group(group, columns=list(self.columns))
                    except (OSError, pa.ArrowException) as wrong:
                        return _unreadable(f"{file}, row group {group}", wrong)
        return DataError(f"{self.files[0]}: must be readable, but {first_sentence(error)}; {_AGAIN}")


def open_parquet(files: tuple[Path, ...], wanted: Sequence[str]) -> ParquetSource:
    """Find columns in the schemas.

    Raises:
        DataError: a footer cannot be read, misses a column, has one twice, or of another type than the first file.
    """
    schemas = {file: _schema(file) for file in files}
    columns = {}
    for number, name in enumerate(wanted):
        types = {file: _type(file, schema, name) for file, schema in schemas.items()}
        first = types[files[0]]
        for file, kind in types.items():
            if kind != first:
                raise DataError(f"{file}: {name} must be {first} as in {files[0].name}, got {kind}; cast it")
        columns[name] = Column(name, f"c_{number}", files[0], _kind(first), str(first))
    return ParquetSource(files, columns)


def _schema(file: Path) -> pa.Schema:
    try:
        return pq.read_schema(file)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(str(file), error) from error


def _type(file: Path, schema: pa.Schema, name: str) -> pa.DataType:
    if schema.names.count(name) > 1:
        raise DataError(
            f"{file}: must have the column {name} once, got it {schema.names.count(name)} times; rename one"
        )
    if name not in schema.names:
        raise missing(file, name, schema.names)
    found = schema.field(name).type
    return found.value_type if pa.types.is_dictionary(found) else found


def _kind(found: pa.DataType) -> Kind:
    tests: dict[Kind, bool] = {
        "integer": pa.types.is_integer(found),
        "string": pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_string_view(found),
        "real": pa.types.is_floating(found) or pa.types.is_decimal(found),
        "instant": pa.types.is_timestamp(found) or pa.types.is_date(found),
        "boolean": pa.types.is_boolean(found),
    }
    for kind, holds in tests.items():
        if holds:
            return kind
    return "unfit"


def _unreadable(place: str, error: Exception) -> DataError:
    return DataError(f"{place}: must be Parquet, but {str(error).partition(chr(10))[0]}; {_AGAIN}")
