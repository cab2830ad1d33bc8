"""What a data set gave ids to, for another one to go on from: the ids stay, new items and values get the next ones."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from ssd_torchrec.data.parquet import open_dataset
from ssd_torchrec.data.schema import RawType
from ssd_torchrec.data.values import Values
from ssd_torchrec.data.vocabulary import Vocabulary
from ssd_torchrec.errors import ConfigError


@dataclass(frozen=True)
class Known:
    """Items and values that have ids."""

    vocabulary: Vocabulary
    values: Values

    @classmethod
    def of(cls, folder: Path, columns: tuple[str, ...]) -> "Known":
        """Those of a data set.

        Args:
            columns: further columns that the new data set is to have.

        Raises:
            ConfigError: the data set has others, or does not say what their ids mean.
            DataError: there is no data set, or it is damaged.
        """
        histories = open_dataset(folder)
        meta = histories.meta
        had = {*meta.event_columns, *meta.context}
        if had != set(columns):
            raise ConfigError(
                f"the data set that is extended, {folder}, must have the same further columns, {sorted(columns)}, got "
                f"{sorted(had)}; give those as event_columns and user_columns"
            )
        values = histories.values()
        if values.keys() != had:
            raise ConfigError(
                f"{folder} must say what the ids of {sorted(had)} mean, it does not; prepare it from its log"
            )
        return cls(histories.vocabulary(), values)

    @property
    def item_type(self) -> RawType:
        return "int64" if pa.types.is_int64(self.vocabulary.ids.type) else "string"
