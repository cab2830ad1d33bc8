"""How a raw log lies on disk, as options of `ssd-torchrec prepare`.

    # format   files                          header  usual columns
    # csv      .csv                           a line  user_id, item_id, timestamp
    # tsv      .tsv, .txt                     a line  user_id, item_id, timestamp
    # parquet  .parquet, .pq                  -       user_id, item_id, timestamp
    # dat      .dat, as of MovieLens          none    user_id, item_id, rating, timestamp
    # inter    .inter, .user, as of RecBole   a line  user_id, item_id, timestamp
    # jsonl    .jsonl, .ndjson, .json         -       reviewerID, asin, unixReviewTime, as of Amazon

All but Parquet may be compressed with gzip. Text is UTF-8.
"""

import re
from dataclasses import dataclass
from typing import Literal

from ssd_torchrec.errors import ConfigError

Format = Literal["csv", "tsv", "parquet", "dat", "inter", "jsonl"]
TimeUnit = Literal["s", "ms", "us", "iso"]

DELIMITERS: dict[Format, str] = {"csv": ",", "tsv": "\t", "dat": "::", "inter": "\t"}
MOVIELENS_RATINGS = ("user_id", "item_id", "rating", "timestamp")
MOVIELENS_USERS = ("user_id", "gender", "age", "occupation", "zip_code")
_CONDITION = re.compile(r"\s*(.+?)\s*(>=|<=|!=|=|>|<)\s*(.*?)\s*", re.DOTALL)


@dataclass(frozen=True)
class Columns:
    """What the columns of a log are called."""

    user: str
    item: str
    timestamp: str


@dataclass(frozen=True)
class Condition:
    """What a line must meet to be kept: two numbers are compared as such, anything else as text."""

    column: str
    operator: str
    value: str


@dataclass(frozen=True, kw_only=True)
class FilesConfig:
    """How files of users, items and times are read."""

    format: Literal["auto", "csv", "tsv", "parquet", "dat", "inter", "jsonl"] = "auto"
    """What the files hold; auto: by their names."""

    files: str = ""
    """Names of the log's files, if it is given as a folder, such as log_*.csv; empty: all files of the format in it.
    Files follow each other in the order of their names."""

    user: str = ""
    """Column of the users; empty: user_id, in JSON lines reviewerID."""

    item: str = ""
    """Column of the items; empty: item_id, in JSON lines asin."""

    timestamp: str = ""
    """Column of the times; empty: timestamp, in JSON lines unixReviewTime."""

    time_unit: TimeUnit = "s"
    """Unit of the times since 1970; iso: text such as 2016-03-09 or 2016-03-09 13:05:00, taken as UTC. Times of
    Parquet that have a type of their own need none."""

    columns: tuple[str, ...] = ()
    """Columns of the log's files in order, if they have no header line."""

    delimiter: str = ""
    """What stands between the cells of the log's lines; empty: as usual for the format."""

    keep: tuple[str, ...] = ()
    """Conditions, such as rating>=4 or is_click=1, that a line must meet; others are left out."""

    def __post_init__(self) -> None:
        if len(self.delimiter.encode()) > 4 or "\n" in self.delimiter:
            raise ConfigError(
                f"delimiter must be at most 4 bytes without a line break, got {self.delimiter!r}; convert the log"
            )
        _check_differ("columns", self.columns)
        _ = self.conditions

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """`keep`, taken apart.

        Raises:
            ConfigError: one is not COLUMN OPERATOR VALUE.
        """
        return tuple(map(_condition, self.keep))

    def names(self, kind: Format) -> Columns:
        """The columns of a log of this format."""
        usual = ("reviewerID", "asin", "unixReviewTime") if kind == "jsonl" else ("user_id", "item_id", "timestamp")
        return Columns(self.user or usual[0], self.item or usual[1], self.timestamp or usual[2])


@dataclass(frozen=True, kw_only=True)
class LogConfig(FilesConfig):
    """How a log is read."""

    event_columns: tuple[str, ...] = ()
    """Further columns that hold one value an event, taken as categories."""

    user_columns: tuple[str, ...] = ()
    """Further columns that tell something of users: of the table of users if there is one, else of the log, where a
    user has the distinct values that occur."""

    users: str = ""
    """File or folder of a table of users, with the same column of users as the log; empty: none."""

    columns_of_users: tuple[str, ...] = ()
    """Columns of the table of users in order, if it has no header line."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_differ("columns_of_users", self.columns_of_users)


def _check_differ(option: str, names: tuple[str, ...]) -> None:
    if len(set(names)) < len(names):
        raise ConfigError(f"{option} must differ from each other, got {list(names)}; rename some")


def _condition(text: str) -> Condition:
    parts = _CONDITION.fullmatch(text)
    if not parts:
        raise ConfigError(f"keep must be a column, one of >= <= != = > <, and a value, got {text!r}; write rating>=4")
    column, operator, value = parts.groups()
    if operator in (">=", "<=", ">", "<") and not _is_number(value):
        raise ConfigError(f"keep must compare by {operator} with a number, got {text!r}; write rating>=4")
    return Condition(column, operator, value)


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?", text) is not None
