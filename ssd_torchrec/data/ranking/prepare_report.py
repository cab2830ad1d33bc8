"""What the command line prints of a ranking data set that was prepared."""

from pathlib import Path

from ssd_torchrec.data.ranking.prepare import Prepared
from ssd_torchrec.data.ranking.schema import PARTS

_LINE = "{:<16}{:>14}{:>14}{:>16}{:>18}"


def print_prepared(prepared: Prepared, output: Path) -> None:
    """A line a part, what it is made of, and where it lies."""
    meta = prepared.meta
    print("\n" + _LINE.format("", "impressions", "positive", "empty history", "unknown candidate"))
    for part in PARTS:
        rows = meta.num_rows[part]
        shares = (meta.num_positives[part], prepared.without_events[part], prepared.unknown[part])
        print(_LINE.format(part, f"{rows:,}", *(f"{share / rows:.1%}" for share in shares)))
    size = sum(file.stat().st_size for file in output.iterdir())
    features = ", ".join(f"{name} {count:,}" for name, count in {**meta.categorical, **meta.histories}.items())
    longest = max(meta.longest.values())
    print(f"\n{output}: {meta.name}, {size / 2**20:.1f} MiB, histories of up to {longest} events")
    print(f"ids: {features}; dense: {', '.join(meta.dense) or 'none'}")
