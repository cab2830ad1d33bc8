"""What a data set says of itself: DIR/meta.json, beside DIR/users-*.parquet with one row a user.

Parquet columns: user_id int64; item list<int64> of table rows; timestamp list<int64> of unix seconds, ascending;
one list<int64> a context column, a bag of ids a user; one list<int64> a further event column, as long as item, whose
id 0 is unknown. Where users have strings for names, raw_user_id holds them and user_id counts the rows from 0.
Table rows: 0 is the mask, 1..num_oov_buckets take unknown ids by hash, then come the items.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from ssd_torchrec.errors import ConfigError, DataError

FORMAT_VERSION = 2
META_FILE = "meta.json"
EVENT_COLUMNS = ("item", "timestamp")
RAW_USER_ID = "raw_user_id"
UNKNOWN = 0  # id in every event column of an event without a value
RESERVED = ("user_id", RAW_USER_ID, *EVENT_COLUMNS, "candidate")

CUTOFFS = (10, 20, 50)  # K of every ranking metric
Scores = dict[str, dict[str, float]]  # {"valid": {"hr@10": ...}, "test": {...}}
RawType = Literal["int64", "string"]


@dataclass(frozen=True, kw_only=True)
class DatasetMeta:
    """What every reader needs to know before the first row."""

    format_version: int = FORMAT_VERSION
    """Grows when old readers would misread a data set."""

    name: str
    """How reports call the data set."""

    num_users: int
    """Rows in all files together."""

    num_events: int
    """Events in all files together."""

    num_items: int
    """Items V of the catalogue, seen or not."""

    num_oov_buckets: int
    """Table rows that unknown ids share by hash; at least 1."""

    item_vocabulary_hash: str
    """Content hash of the vocabulary that gave out the table rows; models and data of different hashes do not mix."""

    raw_user_type: RawType = "int64"
    """What users are called in the log: user_id itself, or the strings of raw_user_id."""

    context: dict[str, int] = field(default_factory=dict)
    """Context columns and the number of values of each: a bag holds ids 0..n-1."""

    event_columns: dict[str, int] = field(default_factory=dict)
    """Further columns that hold one id an event, and the number of ids of each; 0 is for events without a value."""

    values_hash: str = ""
    """Content hash of values.parquet, which says what the ids of both kinds of columns mean; empty if nothing does."""

    lengths: dict[str, float] = field(default_factory=dict)
    """How many events rows have: least, quantiles, greatest and mean; empty without rows."""

    gaps_s: dict[str, float] = field(default_factory=dict)
    """The same of the seconds between neighbours in a row."""

    attainable: Scores | None = None
    """Best scores that generated data permits on its leave-one-out targets; none for real data."""

    attainable_without_time: Scores | None = None
    """The same for whoever does not look at the timestamps."""

    fingerprint: str
    """Content hash of the rows, whatever files and row groups they lie in."""

    def __post_init__(self) -> None:
        for key, least in {"num_users": 0, "num_events": 0, "num_items": 1, "num_oov_buckets": 1}.items():
            if getattr(self, key) < least:
                raise DataError(f"{key} must be at least {least}, got {getattr(self, key)}; prepare the data set again")
        check_names([*self.context, *self.event_columns])
        empty = [name for name, count in {**self.context, **self.event_columns}.items() if count < 1]
        if empty:
            raise DataError(f"columns {empty} must have at least 1 value; leave them out of the data set")

    @property
    def first_item(self) -> int:
        """Table row of the first item; the rows before it are never candidates."""
        return 1 + self.num_oov_buckets

    @property
    def num_table_rows(self) -> int:
        """Rows of the item table: mask, out-of-vocabulary buckets, items."""
        return self.first_item + self.num_items

    def with_event_columns(self, names: Iterable[str]) -> "DatasetMeta":
        """The same, with no event columns but these, in the order of the data set.

        Raises:
            ConfigError: the data set has no such column.
        """
        wanted = set(names)
        if missing := sorted(wanted - self.event_columns.keys()):
            raise ConfigError(
                f"event columns must be of the data set {self.name}, which has {sorted(self.event_columns)}, got "
                f"{missing}; leave them out of data.event_columns, or prepare the data set with --event-columns"
            )
        return replace(self, event_columns={name: n for name, n in self.event_columns.items() if name in wanted})

    @classmethod
    def read(cls, folder: Path | str) -> "DatasetMeta":
        """Read FOLDER/meta.json.

        Raises:
            DataError: there is none, or it is no meta.json that this version understands.
        """
        file = Path(folder) / META_FILE
        if not file.is_file():
            raise DataError(
                f"{folder} must be a data set, but has no {META_FILE}; make one with `ssd-torchrec generate` or "
                "`ssd-torchrec prepare`, or correct the path"
            )
        return cls._from_json(_parsed(file), file)

    def write(self, folder: Path | str) -> None:
        """Write FOLDER/meta.json."""
        (Path(folder) / META_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def _from_json(cls, content: dict[str, Any], file: Path) -> "DatasetMeta":
        version = content.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise DataError(
                f"{file}: format_version must be at most {FORMAT_VERSION}, got {version}; upgrade ssd-torchrec"
            )
        if isinstance(version, int) and version < FORMAT_VERSION:
            raise DataError(
                f"{file}: format_version must be {FORMAT_VERSION}, got {version} of an older ssd-torchrec; prepare the "
                "data set again, or generate it again if `ssd-torchrec generate` made it"
            )
        known = {f.name for f in fields(cls)}
        missing, unknown = sorted(known - set(content)), sorted(set(content) - known)
        if missing or unknown:
            raise DataError(
                f"{file}: must hold exactly {sorted(known)}; missing {missing}, unknown {unknown}; "
                "prepare the data set again with this version"
            )
        for key, value in content.items():
            expected, holds = _TYPES[key]
            if not holds(value):
                raise DataError(f"{file}: {key} must be {expected}, got {value!r}; prepare the data set again")
        try:
            return cls(**content)
        except DataError as error:
            raise DataError(f"{file}: {error}") from error


def is_outdated(folder: Path | str) -> bool:
    """Whether FOLDER holds a data set of an older format, which no reader of this version takes."""
    file = Path(folder) / META_FILE
    version = _parsed(file).get("format_version") if file.is_file() else None
    return isinstance(version, int) and version < FORMAT_VERSION


def check_names(names: list[str]) -> None:
    """Refuse names of further columns that the data set cannot have.

    Raises:
        DataError: one is taken, or there twice.
    """
    every = [*RESERVED, *names]
    taken = sorted({name for name in every if every.count(name) > 1})
    if taken:
        raise DataError(
            f"names of columns must differ from each other and from {list(RESERVED)}, got {taken} twice; "
            "rename them and prepare the data set again"
        )


def _parsed(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: must be JSON, but {error}; prepare the data set again") from error
    if not isinstance(content, dict):
        raise DataError(f"{file}: must be a JSON object, got {type(content).__name__}; prepare the data set again")
    return content


def _is_count(value: object) -> bool:
    return type(value) is int  # a bool is no count


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_scores(value: object) -> bool:
    return value is None or (
        isinstance(value, dict)
        and all(isinstance(metrics, dict) for metrics in value.values())
        and all(isinstance(score, float | int) for metrics in value.values() for score in metrics.values())
    )


def _is_counts(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_count, value.values()))


def _is_summary(value: object) -> bool:
    return isinstance(value, dict) and all(type(number) in (int, float) for number in value.values())


_COUNT = ("a whole number", _is_count)
_TEXT = ("a string", _is_text)
_COUNTS = ("an object of whole numbers", _is_counts)
_SUMMARY = ("an object of numbers", _is_summary)
_SCORES = ("null or an object of objects of numbers", _is_scores)
_TYPES = {
    "format_version": _COUNT,
    "name": _TEXT,
    "num_users": _COUNT,
    "num_events": _COUNT,
    "num_items": _COUNT,
    "num_oov_buckets": _COUNT,
    "item_vocabulary_hash": _TEXT,
    "raw_user_type": ('"int64" or "string"', lambda value: value in get_args(RawType)),
    "context": _COUNTS,
    "event_columns": _COUNTS,
    "values_hash": _TEXT,
    "lengths": _SUMMARY,
    "gaps_s": _SUMMARY,
    "attainable": _SCORES,
    "attainable_without_time": _SCORES,
    "fingerprint": _TEXT,
}
