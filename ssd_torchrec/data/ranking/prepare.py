"""From impressions and a log of events to a ranking data set: every history as it was known at its impression.

Table rows and ids are counted on what lies before validation. Out of core, in a database of its own and two files of
events, which are removed at the end.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import duckdb
import numpy as np

from ssd_torchrec.data.prepare.core import Counts, code_events
from ssd_torchrec.data.prepare.database import LOG, Clock, Step, database, explained, sigterm_unwinds
from ssd_torchrec.data.prepare.log import LogConfig
from ssd_torchrec.data.prepare.stage import stage
from ssd_torchrec.data.ranking.as_of import count_items, cut_parts, join_as_of, number_values
from ssd_torchrec.data.ranking.folder import ROWS_PER_GROUP, RankingWriter
from ssd_torchrec.data.ranking.impressions import stage_impressions
from ssd_torchrec.data.ranking.joined import JoinedImpressions
from ssd_torchrec.data.ranking.prepare_config import CANDIDATE, PrepareRankingConfig
from ssd_torchrec.data.ranking.schema import PARTS, RankingMeta
from ssd_torchrec.data.scratch import replace_folder, scratch_folder
from ssd_torchrec.data.values import Values, save_values
from ssd_torchrec.data.vocabulary import Vocabulary


@dataclass(frozen=True)
class Prepared:
    """What was written."""

    meta: RankingMeta
    unknown: Counter[str]  # by part, impressions of an item without a table row of its own
    without_events: Counter[str]  # by part, impressions whose history is empty


def prepare_ranking(
    impressions: Path | str,
    events: Path | str,
    output: Path | str,
    config: PrepareRankingConfig,
    *,
    on_step: Callable[[Step], None] = lambda step: None,
) -> Prepared:
    """Write the ranking data set of impressions; the same files and configuration give the same rows.

    Args:
        impressions: file or folder, of a format that `FilesConfig` knows.
        events: log of events, likewise; its users and items are called as among the impressions.
        output: where the data set goes; one that is there is replaced when the new one is complete.
        on_step: told of the log, of the impressions, and of the events of users who have impressions.

    Raises:
        DataError: the impressions or the log are not what they must be, a part holds no impression, no item has enough
            events, a categorical column has no value, or `output` holds something else or cannot be written.
        ConfigError: `memory_limit` is too small.

    However it ends, what it wrote outside `output` is removed; after a kill, by the next one with the same `output` and
    `temporary`.
    """
    impressions, events, output = Path(impressions), Path(events), Path(output).absolute()
    described = _described(config.name or impressions.resolve().name.split(".")[0] or "impressions", config)
    RankingWriter(output, described)  # refuses a target that is none, before any work
    beside = config.beside(output)
    clock = Clock(on_step)
    with (
        sigterm_unwinds(),
        explained(output, beside.parent, config),
        scratch_folder(beside, "spill") as folder,
        closing(database(folder, config)) as connection,
    ):
        log = stage(connection, events, LogConfig(**vars(config.log)))
        clock.lap(LOG, _count(connection, "events", "user_id", "item"))
        stage_impressions(connection, impressions, config, log)
        clock.lap("impressions", _count(connection, "impressions", "user_id", "item"))
        connection.execute("SET preserve_insertion_order = false")  # positions tell the order; it would take memory
        code_events(connection, ())
        cuts = cut_parts(connection, impressions, config)
        vocabulary = count_items(connection, events, config, cuts)
        join_as_of(connection, config, cuts, vocabulary)
        values = number_values(connection, impressions, config, cuts)
        joined = JoinedImpressions(connection, folder, config, cuts)
        clock.lap("histories", _count(connection, "told", "u", "i"))
        prepared = _write(joined, output, _numbered(described, vocabulary, values), vocabulary, values)
    return prepared


def _described(name: str, config: PrepareRankingConfig) -> RankingMeta:
    """What is known before anything is counted."""
    return RankingMeta(
        name=name,
        dense=[*config.dense],
        categorical=dict.fromkeys((CANDIDATE, *config.categorical), 1),
        histories={config.history: 1},
        targets={config.history: CANDIDATE},
        longest={},
        num_rows={},
        num_positives={},
        negative_share=config.negative_share,
    )


def _numbered(meta: RankingMeta, vocabulary: Vocabulary, values: Values) -> RankingMeta:
    table_rows = vocabulary.first_item + len(vocabulary)
    return replace(
        meta,
        categorical={CANDIDATE: table_rows, **{name: len(of) for name, of in values.items()}},
        histories=dict.fromkeys(meta.histories, table_rows),
        vocabulary=vocabulary.content_hash,
    )


def _count(connection: duckdb.DuckDBPyConnection, table: str, user: str, item: str) -> Counts:
    counts = f"SELECT count(DISTINCT {user}), count(DISTINCT {item}), count(*) FROM {table}"
    return Counts(*connection.execute(counts).fetchall()[0])


def _write(
    joined: JoinedImpressions, output: Path, meta: RankingMeta, vocabulary: Vocabulary, values: Values
) -> Prepared:
    """All parts and what their ids mean, in a folder that takes the target's place when it is whole."""
    (history,) = meta.histories
    unknown, without_events = Counter[str](), Counter[str]()
    with scratch_folder(output, "partial") as folder:
        whole = folder / output.name
        with RankingWriter(whole, meta) as writer:
            for part in PARTS:
                for rows in joined.blocks(part, ROWS_PER_GROUP):
                    writer.append(part, rows)
                    unknown[part] += int(np.sum(rows.jagged[CANDIDATE].values < vocabulary.first_item))
                    without_events[part] += int(np.sum(rows.jagged[history].lengths == 0))
            meta = writer.finish()
        vocabulary.save(whole)
        if values:
            save_values(values, whole)
        replace_folder(output, whole)
    return Prepared(meta, unknown, without_events)
