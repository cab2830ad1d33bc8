"""What the ids of context and event columns mean: DIR/values.parquet, one line an id.

# column   id  value
# segment  0   "18-24"
# segment  1   "25-34"
# device   0   null       the id of events without a value
# device   1   "phone"
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ssd_torchrec.errors import DataError

VALUES_FILE = "values.parquet"
Values = dict[str, pa.Array]  # of each column, in the order of its ids: (n,) large strings
_SCHEMA = pa.schema([("column", pa.large_string()), ("id", pa.int64()), ("value", pa.large_string())])


def save_values(values: Values, folder: Path) -> None:
    """Write FOLDER/values.parquet."""
    parts = [
        pa.table([pa.array([name] * len(of), pa.large_string()), np.arange(len(of)), of], schema=_SCHEMA)
        for name, of in values.items()
    ]
    pq.write_table(pa.concat_tables(parts), folder / VALUES_FILE)


def load_values(folder: Path) -> Values:
    """Read what `save_values` wrote.

    Raises:
        DataError: the file is missing, cut short or another.
    """
    file = folder / VALUES_FILE
    try:
        table = pq.read_table(file, schema=_SCHEMA)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{file}: must say what ids mean, but {error}; prepare the data set again") from error
    columns, value = table["column"].combine_chunks(), table["value"].combine_chunks()
    starts = np.flatnonzero(table["id"].to_numpy() == 0)
    stops = [*starts[1:], len(table)]
    return {columns[int(a)].as_py(): value[int(a) : int(b)] for a, b in zip(starts, stops, strict=True)}


def values_hash(values: Values) -> str:
    """sha256 over names and values in order."""
    digest = hashlib.sha256()
    for name, of in values.items():
        digest.update(json.dumps([name, of.to_pylist()]).encode())
    return digest.hexdigest()
