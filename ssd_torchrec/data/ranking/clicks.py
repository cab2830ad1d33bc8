"""Generated clicks that hang on the order of a history and on the times between its events.

    wanted   = group(last item) + regime of the gap before it, modulo the groups
    logit    = bias + fit · [group(candidate) = wanted] + liking(segment, group(candidate)) + dense · w
    label    ~ Bernoulli(sigmoid(logit))

Items of a history are drawn without regard to each other, so the bag of them tells next to nothing: who does not know
which came last, and how long after the one before, does not know what is wanted. With `shuffled`, each row has the
history of another one, and nobody knows. The law is known, and so is the best AUC: that of the logits it drew by.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ssd_torchrec.data.ranking.folder import RankingWriter
from ssd_torchrec.data.ranking.rows import Floats, RankingRows
from ssd_torchrec.data.ranking.schema import PARTS, RankingMeta, times_of
from ssd_torchrec.data.rows import Jagged, offsets_of, ranges
from ssd_torchrec.errors import ConfigError

HISTORY, CANDIDATE, SEGMENT = "clicked", "candidate", "segment"
_BEGIN_S, _ROW_S = 1_600_000_000, 60
_GAPS_S = (600, 86_400)  # of the two regimes, give or take a third


@dataclass(frozen=True, kw_only=True)
class ClicksConfig:
    """How much to generate, and by which law."""

    num_rows: int = 60_000
    """Impressions; the last tenth in time is the test part, the tenth before it the validation part."""

    num_groups: int = 8
    """Groups of items."""

    group_size: int = 25
    """Items of a group."""

    num_segments: int = 6
    """Segments of users, each with likings of its own."""

    num_dense: int = 4
    """Dense features."""

    shortest: int = 2
    """Events a history has at least; 2 or more, so that there is a gap before the last."""

    longest: int = 50
    """Events a history has at most; drawn log-uniformly between."""

    fit: float = 3.0
    """What a wanted candidate adds to the logit; half of the candidates are."""

    bias: float = -2.0
    """Logit of a candidate that nobody likes or wants."""

    shuffled: bool = False
    """Give every row the history of another, so that it means nothing."""

    seed: int = 0
    """Decides everything that is drawn."""

    def __post_init__(self) -> None:
        least = {"num_rows": 10, "num_groups": 3, "group_size": 1, "num_segments": 1, "num_dense": 1, "shortest": 2}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ConfigError(f"{name} must be at least {value}, got {getattr(self, name)}; raise it")
        if self.longest < self.shortest:
            raise ConfigError(f"longest must be at least shortest, got {self.longest} and {self.shortest}; raise it")

    @property
    def num_items(self) -> int:
        """Of the catalogue."""
        return self.num_groups * self.group_size


def draw_clicks(config: ClicksConfig) -> tuple[RankingRows, Floats]:
    """Impressions ascending in time, and the (R,) logits that their labels were drawn by. Deterministic."""
    rng = np.random.default_rng(config.seed)
    rows, groups = config.num_rows, config.num_groups
    lengths = np.exp(rng.uniform(np.log(config.shortest), np.log(config.longest + 1), rows)).astype(np.int64)
    offsets = offsets_of(lengths)
    item = rng.integers(0, config.num_items, offsets[-1])
    regime = rng.integers(0, len(_GAPS_S), offsets[-1])
    last = offsets[1:] - 1
    wanted = (item[last] // config.group_size + regime[last]) % groups
    other = (wanted + rng.integers(1, groups, rows)) % groups
    group = np.where(rng.random(rows) < 0.5, wanted, other)
    candidate = group * config.group_size + rng.integers(0, config.group_size, rows)
    segment = rng.integers(0, config.num_segments, rows)
    dense = rng.normal(size=(rows, config.num_dense)).astype(np.float32)
    liking = rng.normal(scale=0.7, size=(config.num_segments, groups))
    weight = rng.normal(scale=0.4, size=config.num_dense)
    logits = config.bias + config.fit * (group == wanted) + liking[segment, group] + dense @ weight
    shown = _BEGIN_S + 365 * 86_400 + _ROW_S * np.arange(rows)
    whose = rng.permutation(rows) if config.shuffled else np.arange(rows)
    back_s = _back(regime, offsets, rng)
    events = ranges(offsets[whose], lengths[whose])
    clicked = Jagged(item[events], offsets_of(lengths[whose]))
    times = Jagged(np.repeat(shown, lengths[whose]) - back_s[events], clicked.offsets)
    each = np.arange(rows + 1)
    jagged = {
        SEGMENT: Jagged(segment, each),
        CANDIDATE: Jagged(candidate, each),
        HISTORY: clicked,
        times_of(HISTORY): times,
    }
    label = (rng.random(rows) < 1 / (1 + np.exp(-logits))).astype(np.int64)
    return RankingRows(label, shown, dense, jagged), logits.astype(np.float32)


def _back(regime: np.ndarray, offsets: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Seconds from each event to the impression: at least a minute, and the gaps between."""
    gaps = (np.array(_GAPS_S)[regime] * rng.uniform(2 / 3, 4 / 3, len(regime))).astype(np.int64)
    until_end = np.cumsum(gaps[::-1])[::-1]  # of this event's gap and all later ones, over all rows
    after_row = np.concatenate([until_end, np.zeros(1, np.int64)])[offsets[1:]]
    return until_end - gaps - np.repeat(after_row, np.diff(offsets)) + 60


def clicks_meta(config: ClicksConfig) -> RankingMeta:
    """What a data set of this law holds, but for what is counted."""
    return RankingMeta(
        name="clicks",
        dense=[f"dense_{n}" for n in range(config.num_dense)],
        categorical={SEGMENT: config.num_segments, CANDIDATE: config.num_items},
        histories={HISTORY: config.num_items},
        targets={HISTORY: CANDIDATE},
        longest={},
        num_rows={},
        num_positives={},
    )


def generate_clicks(config: ClicksConfig, folder: Path) -> RankingMeta:
    """Write a ranking data set of this law, split by time."""
    rows, _ = draw_clicks(config)
    tenth = len(rows) // 10
    cuts = [0, len(rows) - 2 * tenth, len(rows) - tenth, len(rows)]
    with RankingWriter(folder, clicks_meta(config)) as writer:
        for part, begin, stop in zip(PARTS, cuts, cuts[1:], strict=False):
            writer.append(part, rows.take(np.arange(begin, stop)))
        return writer.finish()
