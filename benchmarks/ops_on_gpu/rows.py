"""Rows of a benchmark, written as they are measured: a run that was cut short goes on where it stopped."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Rows:
    """A file of one JSON object a line, each under a `key` of its own."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        whole = path.read_text().rpartition("\n")[0] if path.exists() else ""  # the last line may have been cut off
        self._rows: dict[str, Row] = {row["key"]: row for row in map(json.loads, whole.splitlines())}
        path.write_text(whole + "\n" if whole else "")

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def __getitem__(self, key: str) -> Row:
        return self._rows[key]

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def add(self, key: str, row: Row) -> Row:
        row = {"key": key, **row}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self._rows[key] = row
        return row
