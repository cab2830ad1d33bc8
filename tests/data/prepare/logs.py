"""Small raw logs, written as a test needs them."""

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from ssd_torchrec.data.prepare.log import LogConfig
from ssd_torchrec.data.prepare.stage import StagedLog, stage

HEADER = "user_id,item_id,timestamp\n"
NOON_S = 1_457_524_800  # 2016-03-09 12:00:00
LINES = "".join(f"{at % 3},{at},{NOON_S + at}\n" for at in range(10))


def write(file: Path, content: str | bytes | list[Mapping[str, Any]] | pa.Table) -> Path:
    """Text, bytes, objects as JSON lines, or a table as Parquet of some row groups; compressed if the name says so."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, pa.Table):
        pq.write_table(content, file, row_group_size=max(2, len(content) // 8))
        return file
    if isinstance(content, list):
        content = "".join(json.dumps(line) + "\n" for line in content)
    data = content.encode() if isinstance(content, str) else content
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" and isinstance(content, str) else data)
    return file


def table(**columns: Any) -> pa.Table:
    """Three events, with some of their columns changed."""
    usual = {"user_id": [1, 2, 1], "item_id": ["a", "b", "01"], "timestamp": [NOON_S] * 3}
    return pa.table({name: values for name, values in (usual | columns).items() if values is not None})


def reviews(**columns: list[Any]) -> list[dict[str, Any]]:
    """Three lines of Amazon's, with some of their columns changed."""
    usual = {"reviewerID": ["A1", "A2", "A1"], "asin": ["0001", "B", "B"], "unixReviewTime": [NOON_S] * 3}
    names = usual | columns
    return [dict(zip(names, values, strict=True)) for values in zip(*names.values(), strict=True)]


def staged(log: Path, threads: int = 2, **options: Any) -> tuple[StagedLog, duckdb.DuckDBPyConnection]:
    """A log in a database of its own."""
    connection = duckdb.connect(config={"threads": threads, "memory_limit": "512MiB"})
    return stage(connection, log, LogConfig(**options)), connection


def events(log: Path, **options: Any) -> list[tuple[Any, ...]]:
    """All events of a log without their positions, by their positions."""
    told, connection = staged(log, **options)
    rows = connection.execute("SELECT * EXCLUDE (position) FROM events ORDER BY position").fetchall()
    assert len(rows) == told.num_events
    return rows
