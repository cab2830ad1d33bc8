"""How impressions and the log of their users' events become a ranking data set."""

from dataclasses import dataclass, field
from math import isfinite

from ssd_torchrec.data.prepare.database import DatabaseConfig
from ssd_torchrec.data.prepare.log import FilesConfig
from ssd_torchrec.data.ranking.schema import RESERVED, times_of
from ssd_torchrec.errors import ConfigError

CANDIDATE = "candidate"  # the feature that holds the item of an impression


@dataclass(frozen=True, kw_only=True)
class ImpressionsConfig(FilesConfig):
    """How the impressions are read: an item that was shown to a user a line."""

    label: str = "label"
    """Column that says whether the item was taken: 0 or 1, false or true."""

    dense: tuple[str, ...] = ()
    """Further columns that hold a number."""

    categorical: tuple[str, ...] = ()
    """Further columns that hold a category. Ids count the values of the training part in ascending order from 1; id 0
    is for no value and for one that is not among them."""

    fill_dense: float | None = None
    """What a dense column holds where it is null, empty or NaN; without it, such lines are refused."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fill_dense is not None and not (self.dense and isfinite(self.fill_dense)):
            raise ConfigError(
                f"fill_dense must be a finite number for the columns of --dense, got {self.fill_dense} for "
                f"{list(self.dense)}; leave it out or name the columns"
            )


@dataclass(frozen=True, kw_only=True)
class PrepareRankingConfig(ImpressionsConfig, DatabaseConfig):
    """The impressions, the log, and what is made of them."""

    log: FilesConfig = field(default_factory=FilesConfig)
    """How the log of events is read."""

    name: str = ""
    """How reports call the data set; empty: as the impressions' file or folder."""

    history: str = "history"
    """How the histories are called; their times are called so with _at."""

    max_history: int = 200
    """Events of a history at most, the newest."""

    delay_s: int = 0
    """Seconds between an event and the impressions that know of it, at least: how long events take to reach the model
    that serves. 0: events before the impression, not those of the same second."""

    num_oov_buckets: int = 16
    """Table rows that unknown items share by hash."""

    min_count: int = 1
    """Events before validation begins that an item needs for a table row of its own."""

    valid_share: float = 0.1
    """Share of the impressions that is the validation part: the newest before the test part. Impressions of one second
    stay together, in the later part."""

    test_share: float = 0.1
    """Share of the impressions that is the test part, the newest."""

    valid_from: int | None = None
    """Unix seconds at which validation begins, instead of the shares."""

    test_from: int | None = None
    """Unix seconds at which the test part begins, instead of the shares."""

    negative_share: float = 1.0
    """Share of the training part's impressions of label 0 that is kept; training corrects for it."""

    seed: int = 0
    """Decides which of them are kept, with their place among the impressions."""

    def __post_init__(self) -> None:
        ImpressionsConfig.__post_init__(self)
        DatabaseConfig.__post_init__(self)
        for name, least in {"max_history": 1, "delay_s": 0, "num_oov_buckets": 1, "min_count": 1}.items():
            if getattr(self, name) < least:
                raise ConfigError(
                    f"{name} must be at least {least}, got {getattr(self, name)}; leave it at its default"
                )
        if not 0 < self.negative_share <= 1:
            raise ConfigError(f"negative_share must be above 0 and at most 1, got {self.negative_share}; 1 keeps all")
        self._check_parts()
        names = [*RESERVED, self.history, times_of(self.history), CANDIDATE, *self.dense, *self.categorical]
        if taken := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(
                f"the history, dense and categorical columns must differ from each other and from "
                f"{[*RESERVED, CANDIDATE]}, got {taken} twice; rename them"
            )

    def _check_parts(self) -> None:
        shares, begins = (self.valid_share, self.test_share), (self.valid_from, self.test_from)
        if begins == (None, None):
            if min(shares) <= 0 or sum(shares) >= 1:
                raise ConfigError(
                    f"valid_share and test_share must be above 0 and leave something to train on, got {shares[0]} and "
                    f"{shares[1]}; give 0.1 and 0.1"
                )
            return
        if self.valid_from is None or self.test_from is None or self.valid_from >= self.test_from:
            raise ConfigError(
                f"valid_from must be before test_from, got {self.valid_from} and {self.test_from}; give both or neither"
            )
        if shares != (PrepareRankingConfig.valid_share, PrepareRankingConfig.test_share):
            raise ConfigError("valid_share and test_share must be left out where valid_from and test_from are given")
