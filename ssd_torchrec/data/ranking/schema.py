"""A ranking data set: impressions with a label, their features, and the histories of their users as of then.

DIR/ranking.json     what is below
DIR/train.parquet    one row an impression; valid.parquet and test.parquet likewise
    label            int64, 0 or 1
    timestamp        int64 unix seconds of the impression
    dense            float32, one column each, by name
    categorical      list<int64>, a bag of ids each, by name
    history          list<int64> ids by name, and NAME_at list<int64> unix seconds: ascending, all before the impression
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ssd_torchrec.errors import DataError

META_FILE = "ranking.json"
FORMAT_VERSION = 1
Part = Literal["train", "valid", "test"]
PARTS: tuple[Part, ...] = ("train", "valid", "test")
RESERVED = ("label", "timestamp")


@dataclass(frozen=True, kw_only=True)
class RankingMeta:
    """The content of ranking.json."""

    format_version: int = FORMAT_VERSION
    """Version of this layout."""

    name: str
    """How reports call it."""

    dense: list[str]
    """Dense features in order."""

    categorical: dict[str, int]
    """By feature the ids it draws from, 0 to one less: rows of its table."""

    histories: dict[str, int]
    """By history the ids that its items draw from: rows of its table."""

    longest: dict[str, int]
    """By history the most events that a row has."""

    num_rows: dict[str, int]
    """Impressions of each part."""

    num_positives: dict[str, int]
    """Those of label 1."""

    negative_share: float = 1.0
    """Share of the training part's negatives that was kept; the other parts have all."""

    vocabulary: str = ""
    """Content hash of the vocabulary of items, if one gave out their ids."""

    targets: dict[str, str] = field(default_factory=dict)
    """By history, of those that have one, the categorical feature that holds the item shown: one id a row, of the ids
    that the history's items draw from."""

    def __post_init__(self) -> None:
        names = [*RESERVED, *self.dense, *self.categorical, *self.histories, *map(times_of, self.histories)]
        if taken := sorted({name for name in names if names.count(name) > 1}):
            raise DataError(
                f"features must have names of their own, other than {list(RESERVED)}, got {taken} twice; rename them"
            )
        if not self.histories:
            raise DataError("a ranking data set must have at least one history, got none; name its events")
        if not 0 < self.negative_share <= 1:
            raise DataError(f"negative_share must be above 0 and at most 1, got {self.negative_share}")
        for feature, rows in {**self.categorical, **self.histories}.items():
            if rows < 1:
                raise DataError(f"{feature} must draw from at least 1 id, got {rows}; leave it out")
        self._check_targets()

    def _check_targets(self) -> None:
        shown = list(self.targets.values())
        for history, target in self.targets.items():
            if history not in self.histories or target not in self.categorical:
                raise DataError(
                    f"targets must be categorical features ({', '.join(self.categorical)}) by history "
                    f"({', '.join(self.histories)}), got {target} by {history}; correct the names"
                )
            if self.categorical[target] != self.histories[history]:
                raise DataError(
                    f"{target}, the target of {history}, must draw from its {self.histories[history]} ids, got "
                    f"{self.categorical[target]}; number both by one vocabulary"
                )
            if shown.count(target) > 1:
                raise DataError(f"{target} must be the target of one history, got it of several; name one of them")

    @property
    def keys(self) -> list[str]:
        """Keys of a batch's KeyedJaggedTensor in order."""
        return [*self.categorical, *(key for name in self.histories for key in (name, times_of(name)))]

    @classmethod
    def read(cls, folder: Path) -> "RankingMeta":
        """Read FOLDER/ranking.json.

        Raises:
            DataError: there is none, or it is none that this version understands.
        """
        file = folder / META_FILE
        if not file.is_file():
            raise DataError(
                f"{folder} must be a ranking data set, but has no {META_FILE}; make one with `ssd-torchrec "
                "prepare-ranking`, or correct the path"
            )
        try:
            content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            version = content["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file}: must describe a ranking data set, but {error}; prepare it again") from error
        known = {field.name for field in fields(cls)}
        if version != FORMAT_VERSION or content.keys() | {"targets"} != known:  # without them it was written before
            raise DataError(
                f"{file}: must be of format {FORMAT_VERSION}, got {version} with {sorted(content)}; prepare it again "
                "with this version"
            )
        return cls(**content)

    def write(self, folder: Path) -> None:
        """Write FOLDER/ranking.json."""
        (folder / META_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def times_of(history: str) -> str:
    """The column, and key, of a history's times."""
    return f"{history}_at"
