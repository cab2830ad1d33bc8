"""What tells two data sets apart, whatever files and row groups they lie in."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from ssd_torchrec.data.rows import Rows
from ssd_torchrec.data.schema import EVENT_COLUMNS, RAW_USER_ID, DatasetMeta
from ssd_torchrec.errors import DataError


class Fingerprint:
    """sha256 over all columns of all rows in order, and over what ids mean."""

    def __init__(self, meta: DatasetMeta) -> None:
        self._columns = {name: hashlib.sha256() for name in ("user_id", RAW_USER_ID, "length", *EVENT_COLUMNS)}
        self._columns |= {f"event's {name}": hashlib.sha256() for name in meta.event_columns}
        self._columns |= {f"{part} of {name}": hashlib.sha256() for name in meta.context for part in ("length", "bag")}
        self._head = (
            f"{meta.item_vocabulary_hash} {meta.num_oov_buckets} {meta.context} {meta.event_columns} {meta.values_hash}"
        )
        self.num_users = 0
        self.num_events = 0

    def update(self, rows: Rows, raw_user_ids: pa.Array | None = None) -> None:
        """Go on with these rows, and with what their users are called where that is a string."""
        columns = {"user_id": rows.user_id, "length": rows.lengths, "item": rows.item, "timestamp": rows.timestamp}
        columns |= {f"event's {name}": ids for name, ids in rows.event_columns.items()}
        for name, bags in rows.context.items():
            columns |= {f"length of {name}": bags.lengths, f"bag of {name}": bags.values}
        for name, values in columns.items():
            self._columns[name].update(np.ascontiguousarray(values, "<i8").data)
        if raw_user_ids is not None:
            names = "".join(f"{json.dumps(name)}\n" for name in raw_user_ids.to_pylist())
            self._columns[RAW_USER_ID].update(names.encode())
        self.num_users += rows.num_rows
        self.num_events += rows.num_events

    def hexdigest(self) -> str:
        """Of all rows so far."""
        columns = " ".join(f"{name} {digest.hexdigest()}" for name, digest in self._columns.items())
        return hashlib.sha256(f"{self._head} {columns}".encode()).hexdigest()

    def check(self, meta: DatasetMeta, folder: Path) -> None:
        """Refuse rows that `meta` does not describe.

        Raises:
            DataError: there are more or fewer of them, or they hold something else.
        """
        if (self.num_users, self.num_events) != (meta.num_users, meta.num_events):
            raise DataError(
                f"{folder}: must hold {meta.num_users} users and {meta.num_events} events as meta.json says, got "
                f"{self.num_users} and {self.num_events}; a file is missing or foreign: prepare the data set again"
            )
        if self.hexdigest() != meta.fingerprint:
            raise DataError(
                f"{folder}: must have the fingerprint {meta.fingerprint} of meta.json, got {self.hexdigest()}; its "
                "rows were altered after writing: prepare the data set again"
            )
