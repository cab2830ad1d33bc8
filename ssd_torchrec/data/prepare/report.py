"""What the command line prints while a log becomes a data set: a line as each step ends, and where to go from there."""

from pathlib import Path

from ssd_torchrec.data.prepare.database import LOG, Step
from ssd_torchrec.data.schema import DatasetMeta

_LINE = "{:<16}{:>14}{:>14}{:>16}{:>10}"


def print_step(step: Step) -> None:
    """The line of a step, as it ends: some logs take minutes."""
    counts = step.counts
    if step.name == LOG:
        print(_LINE.format("", "users", "items", "interactions", "seconds"))
    numbers = (f"{number:,}" for number in (counts.users, counts.items, counts.events))
    print(_LINE.format(step.name, *numbers, f"{step.elapsed_s:.1f}"), flush=True)


def print_outcome(meta: DatasetMeta, output: Path) -> None:
    """Where the data set lies, and what one does next."""
    size = sum(file.stat().st_size for file in output.iterdir())
    lengths = f"{meta.lengths['min']:.0f} to {meta.lengths['max']:.0f} events a user, median {meta.lengths['p50']:.0f}"
    print(f"\n{output}: {meta.name}, {size / 2**20:.1f} MiB, {lengths}")
    print(f"look at it:  ssd-torchrec inspect {output}")
    told = f" --data.event-columns {' '.join(meta.event_columns)}" if meta.event_columns else ""
    print(f"train on it: ssd-torchrec train tim4rec-ml-1m-64d --data.path {output}{told}")
