"""What is in a data set: counts, lengths and gaps of its histories, columns, files; as text, and as a figure."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.bar import Bar as Cells
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ssd_torchrec.data.distribution import Bar, Distribution, gaps_of
from ssd_torchrec.data.parquet import UserHistories, open_dataset
from ssd_torchrec.data.schema import META_FILE
from ssd_torchrec.data.split import LeaveOneOut, spans_of
from ssd_torchrec.errors import ConfigError

PLAIN_WIDTH = 100  # where output is collected: nothing wraps there
BAR_CELLS = 40
PLOT_BARS_PER_OCTAVE = 4
PLOTS = (".png", ".svg", ".pdf")
UNITS_S = {"y": 31_557_600, "d": 86_400, "h": 3_600, "min": 60, "s": 1}
NAMES = {"int64": "whole numbers", "string": "strings"}
TICKS_S = {"1 s": 1, "1 min": 60, "1 h": 3_600, "1 d": 86_400, "1 mo": 2_629_800, "1 y": 31_557_600}


@dataclass(frozen=True, eq=False)
class Inspection:
    """A data set, and how its histories are spread."""

    histories: UserHistories
    lengths: Distribution  # events of each user
    gaps_s: Distribution  # seconds between neighbours of a history

    @classmethod
    def of(cls, folder: Path) -> "Inspection":
        """Open a data set and count, a row group in memory at a time.

        Raises:
            DataError: it is none, or not what it must be.
        """
        histories, lengths, gaps_s = open_dataset(folder), Distribution(), Distribution()
        for rows in histories:
            lengths.add(rows.lengths)
            gaps_s.add(gaps_of(rows.timestamp, rows.offsets))
        return cls(histories, lengths, gaps_s)


def inspect_dataset(folder: Path, plot: Path | None = None, console: Console | None = None) -> Inspection:
    """Print what is in a data set, and draw its lengths and gaps to a file if one is named.

    Raises:
        ConfigError: `plot` is of an unknown kind, or its folder is not there; before anything is read.
        DataError: the data set is none, or not what it must be.
    """
    if plot is not None and (plot.suffix not in PLOTS or not plot.absolute().parent.is_dir()):
        raise ConfigError(f"{plot} must end in one of {', '.join(PLOTS)} and lie in a folder that is there; rename it")
    inspection = Inspection.of(folder)
    console = console or Console()
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    for table in tables(inspection):
        console.print(table)
    if plot is not None:
        figure(inspection).savefig(plot, dpi=150)
        console.print(f"{plot} shows lengths and gaps")
    return inspection


def tables(inspection: Inspection) -> list[Table]:
    """What is printed: facts, quantiles, bars of lengths and of gaps, best scores where they are known, files."""
    lengths, gaps_s = inspection.lengths, inspection.gaps_s
    shown = [
        _table("", [["", "left"], ["", "left"]], facts(inspection)),
        _table("", _columns("", *lengths.summary()), _quantiles(lengths, gaps_s)),
        _bars("events of a user", lengths.bars(2), seconds=False, of="users"),
        _bars("time from one event of a user to the next", gaps_s.bars(), seconds=True, of="gaps"),
        _best(inspection),
        _table("", _columns("file", "rows", "row groups", "bytes"), _files(inspection.histories)),
    ]
    return [table for table in shown if table.row_count]


def facts(inspection: Inspection) -> list[list[str]]:
    """Names and values of what is true of the whole data set."""
    meta = inspection.histories.meta
    cells = meta.num_users * meta.num_items
    split = spans_of(inspection.histories, LeaveOneOut()).counts()
    left_out = {
        "train nothing": split.rows_without_training,
        "have no validation target": split.rows_without_valid,
        "have no test target": split.rows_without_test,
    }
    rows = {
        "data set": f"{meta.name}, format {meta.format_version}",
        "users": f"{meta.num_users:,}, called by {NAMES[meta.raw_user_type]}",
        "items": f"{meta.num_items:,} and {meta.num_oov_buckets:,} rows for unknown ones",
        "events": f"{meta.num_events:,}",
        "density": f"{meta.num_events / max(cells, 1):.3%} events a user and item",
        "context columns": ", ".join(f"{name} of {count:,} values" for name, count in meta.context.items()) or "none",
        "event columns": ", ".join(f"{name} of {count:,} ids" for name, count in meta.event_columns.items()) or "none",
        "leave-one-out": f"{split.training_targets:,} training targets, {split.rows - split.rows_without_valid:,} "
        f"validation and {split.rows - split.rows_without_test:,} test targets",
        "too short": ", ".join(f"{count:,} users {what}" for what, count in left_out.items() if count) or "no user",
        "fingerprint": meta.fingerprint,
        "item vocabulary": meta.item_vocabulary_hash,
    }
    return [[name, value] for name, value in rows.items()]


def _quantiles(lengths: Distribution, gaps_s: Distribution) -> list[list[str]]:
    rows = {
        "events": [f"{value:,.4g}" for value in lengths.summary().values()],
        "gap": [duration(value) for value in gaps_s.summary().values()],
    }
    return [[name, *values] for name, values in rows.items() if values]


def duration(seconds: float) -> str:
    """A time to three digits in the largest unit of which there is one: "45 s", "2.5 h", "1.2 y"."""
    unit = next((unit for unit, size in UNITS_S.items() if seconds >= size), "s")
    return f"{seconds / UNITS_S[unit]:.3g} {unit}"


def figure(inspection: Inspection) -> Figure:
    """Histograms of lengths and gaps, side by side, on logarithmic axes."""
    drawn = Figure(figsize=(10, 3.6), layout="constrained")
    lengths, gaps = drawn.subplots(1, 2)
    meta = inspection.histories.meta
    drawn.suptitle(f"{meta.name}: {meta.num_users:,} users, {meta.num_items:,} items, {meta.num_events:,} events")
    _histogram(lengths, inspection.lengths, "events of a user", "users")
    _histogram(gaps, inspection.gaps_s, "time from one event of a user to the next", "gaps")
    least, greatest = gaps.get_xlim()
    ticks = {name: at for name, at in TICKS_S.items() if least <= at <= greatest}
    gaps.set_xticks(list(ticks.values()), list(ticks))
    gaps.set_xticks([], minor=True)
    return drawn


def _histogram(axes: Axes, distribution: Distribution, title: str, of: str) -> None:
    bars = distribution.bars(PLOT_BARS_PER_OCTAVE)
    zeros = sum(bar.count for bar in bars if not bar.greatest)
    bars = [bar for bar in bars if bar.greatest]
    if bars:
        axes.set_xscale("log")
        edges = [bar.least for bar in bars] + [bars[-1].greatest + 1]
        per_doubling = np.array([bar.count for bar in bars]) / np.diff(np.log2(edges))  # ranges are not equally wide
        axes.stairs(per_doubling, edges, fill=True)
    axes.set(xlabel=title + (f" (and {zeros:,} of 0)" if zeros else ""), ylabel=f"{of} per doubling")


def _bars(title: str, bars: Sequence[Bar], *, seconds: bool, of: str) -> Table:
    most = max((bar.count for bar in bars), default=1)
    total = max(sum(bar.count for bar in bars), 1)
    table = _table(title, [*_columns("from", "to", of, "share"), ["", "left"]], [])
    for bar in bars:
        ends = [duration(end) if seconds else f"{end:,}" for end in (bar.least, bar.greatest)]
        table.add_row(*ends, f"{bar.count:,}", f"{bar.count / total:.1%}", Cells(most, 0, bar.count, width=BAR_CELLS))
    return table


def _best(inspection: Inspection) -> Table:
    meta = inspection.histories.meta
    known = {"with time": meta.attainable, "without time": meta.attainable_without_time}
    scores = {f"{name}, {split}": of[split] for name, of in known.items() if of for split in of}
    metrics = next(iter(scores.values()), {})
    rows = [[metric.upper(), *(f"{score[metric]:.4f}" for score in scores.values())] for metric in metrics]
    return _table("best that the data permits", _columns("", *scores), rows)


def _files(histories: UserHistories) -> list[list[str]]:
    rows = []
    for file in sorted(histories.folder.iterdir()):
        if file.name == META_FILE or file.suffix == ".parquet":
            parquet = pq.read_metadata(file) if file.suffix == ".parquet" else None
            counts = [f"{parquet.num_rows:,}", f"{parquet.num_row_groups:,}"] if parquet else ["", ""]
            rows.append([file.name, *counts, f"{file.stat().st_size:,}"])
    return rows


def _columns(first: str, *others: str) -> list[list[str]]:
    return [[first, "left"], *([name, "right"] for name in others)]


def _table(title: str, columns: list[list[str]], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title or None, box=SIMPLE, title_justify="left", pad_edge=False)
    table.show_header = any(name for name, _ in columns)
    for name, justify in columns:
        table.add_column(name, justify="left" if justify == "left" else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
