"""From a raw log to a data set: read, k-core, order, write; by an engine that needs no memory of the log's size.

duckdb works out of core in a database of its own, which is removed at the end; spark on the cluster of its session.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from ssd_torchrec.data.prepare.assemble import TIME, Extras, Left, Order, assemble
from ssd_torchrec.data.prepare.core import Counts, code_events, k_core
from ssd_torchrec.data.prepare.database import LOG, Clock, DatabaseConfig, Step, database, explained, sigterm_unwinds
from ssd_torchrec.data.prepare.known import Known
from ssd_torchrec.data.prepare.log import LogConfig
from ssd_torchrec.data.prepare.spark import SparkCore
from ssd_torchrec.data.prepare.spark_log import read_log
from ssd_torchrec.data.prepare.spark_session import spark_session
from ssd_torchrec.data.prepare.stage import stage
from ssd_torchrec.data.schema import DatasetMeta, RawType, check_names
from ssd_torchrec.data.scratch import scratch_folder
from ssd_torchrec.data.writer import DatasetWriter, check_target
from ssd_torchrec.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(DatabaseConfig):
    """How a log becomes a data set."""

    log: LogConfig = field(default_factory=LogConfig)
    """How the log is read."""

    name: str = ""
    """How reports call the data set; empty: as the log's file or folder."""

    k_core: int = 5
    """Least interactions of a user and of an item: others leave, again and again until none does; 0 keeps all."""

    order: Order = "int64"
    """Events of a user by time, those of one time as in the log. float32-stable takes times for equal whose numbers
    in the log are so in float32 (up to two minutes apart), as RecBole does and the papers' figures with it; where such
    an order lets times fall, an event takes the time of the one before."""

    num_oov_buckets: int = 16
    """Table rows that items unknown to this data set share by hash; with `extends`, those that it has."""

    extends: str = ""
    """Data set whose items and values of further columns keep their ids here, in this log or not; new ones get the ids
    after them, and `ssd-torchrec grow` gives its checkpoints their rows. Empty: all ids are given out anew."""

    engine: Literal["duckdb", "spark"] = "duckdb"
    """What works on the log; both make the same data set. duckdb: this machine, out of core. spark: the cluster of
    spark-submit or of the session that is there, else this machine; for Parquet, as paths or URLs that Spark knows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in {"k_core": 0, "num_oov_buckets": 1}.items():
            if getattr(self, name) < least:
                raise ConfigError(
                    f"{name} must be at least {least}, got {getattr(self, name)}; leave it at its default"
                )
        for of_duckdb in fields(DatabaseConfig) if self.engine == "spark" else ():
            if getattr(self, of_duckdb.name) != of_duckdb.default:
                raise ConfigError(
                    f"{of_duckdb.name} is for the engine duckdb, Spark has settings of its own; leave it out"
                )


def prepare(
    log: Path | str, output: Path | str, config: PrepareConfig, *, on_step: Callable[[Step], None] = lambda step: None
) -> DatasetMeta:
    """Write the data set of a log; the same log and configuration give the same fingerprint.

    Args:
        log: file or folder, of a format that `LogConfig` knows; for the engine spark of Parquet, a URL as well.
        output: where the data set goes; one that is there is replaced when the new one is complete.
        on_step: told of the log, of each round of the k-core and of the data set.

    Raises:
        DataError: the log is not what it must be, the k-core is empty, `output` holds something that is no data set, or
            there cannot be written; what is to be extended is no data set.
        ConfigError: `memory_limit` is too small for this log; what is to be extended has other further columns; Spark
            is missing or gives up.

    However it ends, what it wrote outside `output` is removed; after a kill, by the next prepare with the same `output`
    and `temporary`.
    """
    output = Path(output).absolute()
    check_target(output)
    extras = Extras(event=config.log.event_columns, user=config.log.user_columns, of_users_table=bool(config.log.users))
    check_names(list(extras.names))
    known = Known.of(Path(config.extends), extras.names) if config.extends else None
    beside = config.beside(output)
    clock = Clock(on_step)
    asked = _Asked(config, extras, known, clock)
    engine = _on_spark(str(log), asked) if config.engine == "spark" else _on_duckdb(Path(log), beside, asked)
    with sigterm_unwinds(), explained(output, beside.parent, config), engine as left:
        return _written(left, output, config.name or Path(log).resolve().name.split(".")[0] or "log", clock)


@dataclass(frozen=True)
class _Asked:
    config: PrepareConfig
    extras: Extras
    known: Known | None
    clock: Clock

    @property
    def float32_time(self) -> bool:
        return self.config.order == "float32-stable"

    @property
    def item_type(self) -> RawType | None:
        return self.known.item_type if self.known else None

    @property
    def num_oov_buckets(self) -> int:
        return self.known.vocabulary.num_oov_buckets if self.known else self.config.num_oov_buckets

    def tell(self, rounds: Iterator[Counts]) -> None:
        for number, counts in enumerate(rounds):
            self.clock.lap(f"{self.config.k_core}-core, round {number}" if number else LOG, counts)


@contextmanager
def _on_duckdb(log: Path, beside: Path, asked: _Asked) -> Iterator[Left]:
    config, extras = asked.config, asked.extras
    with scratch_folder(beside, "spill") as folder, closing(database(folder, config)) as connection:
        stage(connection, log, config.log, float32_time=asked.float32_time, item_type=asked.item_type)
        connection.execute("SET preserve_insertion_order = false")  # position tells the order; it would take memory
        code_events(connection, extras.of_log, time=sorted({"timestamp", TIME[config.order]}))
        asked.tell(k_core(connection, config.k_core))
        yield assemble(connection, extras, config.order, asked.num_oov_buckets, asked.known)


@contextmanager
def _on_spark(log: str, asked: _Asked) -> Iterator[Left]:
    config = asked.config
    with spark_session() as session, ExitStack() as held:
        found = read_log(session, log, config.log, float32_time=asked.float32_time, item_type=asked.item_type)
        core = SparkCore(session, found, held)
        asked.tell(core.rounds(config.k_core))
        yield core.assemble(asked.extras, config.order, asked.num_oov_buckets, asked.known)


def _written(left: Left, output: Path, name: str, clock: Clock) -> DatasetMeta:
    with DatasetWriter(
        output,
        name=name,
        vocabulary=left.vocabulary,
        context=left.context,
        event_columns=left.event_columns,
        values=left.values,
        raw_user_type="string" if left.raw_user_is_string else "int64",
    ) as writer:
        for rows, raw_user_ids in left.blocks():
            writer.append(rows, raw_user_ids)
        meta = writer.finish()
    clock.lap("data set", Counts(meta.num_users, meta.num_items, meta.num_events))
    return meta
