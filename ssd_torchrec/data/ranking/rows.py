"""Impressions as flat arrays, and as torchrec's Batch."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torchrec import KeyedJaggedTensor
from torchrec.datasets.utils import Batch

from ssd_torchrec.data.ranking.schema import RankingMeta, times_of
from ssd_torchrec.data.rows import Ints, Jagged, offsets_of
from ssd_torchrec.errors import DataError

FILLER = -1  # label of a row that stands for none

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class RankingRows:
    """R impressions."""

    label: Ints  # (R,) 0 or 1
    timestamp: Ints  # (R,) unix seconds
    dense: Floats  # (R, n)
    jagged: dict[str, Jagged]  # by key: bags of ids, items of histories and their times

    def __len__(self) -> int:
        return len(self.label)

    def take(self, rows: Ints) -> "RankingRows":
        """The rows at these positions, in this order."""
        jagged = {key: values.take(rows) for key, values in self.jagged.items()}
        return RankingRows(self.label[rows], self.timestamp[rows], self.dense[rows], jagged)

    @staticmethod
    def concatenate(parts: list["RankingRows"]) -> "RankingRows":
        """All rows of the parts, in order."""
        return RankingRows(
            label=np.concatenate([part.label for part in parts]),
            timestamp=np.concatenate([part.timestamp for part in parts]),
            dense=np.concatenate([part.dense for part in parts]),
            jagged={key: Jagged.concatenate([part.jagged[key] for part in parts]) for key in parts[0].jagged},
        )

    @staticmethod
    def filler(meta: RankingMeta) -> "RankingRows":
        """One row of nothing but targets, of id 0, for a rank that has none."""
        nothing = Jagged(np.zeros(0, np.int64), offsets_of(np.zeros(1, np.int64)))
        one = np.zeros(1, np.int64)
        jagged = dict.fromkeys(meta.keys, nothing) | dict.fromkeys(meta.targets.values(), Jagged(one, np.arange(2)))
        return RankingRows(one + FILLER, one, np.zeros((1, len(meta.dense)), np.float32), jagged)

    def batch(self) -> Batch:
        """For torchrec's DLRM: (R, n) float32, a KeyedJaggedTensor of int64 ids and times, (R,) labels."""
        values = [torch.from_numpy(of.values) for of in self.jagged.values()]
        lengths = [torch.from_numpy(of.lengths) for of in self.jagged.values()]
        features = KeyedJaggedTensor.from_lengths_sync(list(self.jagged), torch.cat(values), torch.cat(lengths))
        return Batch(torch.from_numpy(self.dense), features, torch.from_numpy(self.label))


def check_rows(rows: RankingRows, meta: RankingMeta, place: str) -> None:
    """Refuse what no model may be given.

    Args:
        place: where the rows come from, for the message.

    Raises:
        DataError: a label that is neither 0 nor 1, a dense value that is not finite, an id outside its table, a row
            without its one target, times that fall within a history or are not before the impression.
    """
    if (wrong := np.flatnonzero((rows.label != 0) & (rows.label != 1))).size:
        raise DataError(f"{place}, row {wrong[0]}: label must be 0 or 1, got {rows.label[wrong[0]]}; correct it")
    if (wrong := np.argwhere(~np.isfinite(rows.dense))).size:
        row, column = wrong[0]
        raise DataError(
            f"{place}, row {row}: {meta.dense[column]} must be finite, got {rows.dense[row, column]}; fill it in"
        )
    for key, count in {**meta.categorical, **meta.histories}.items():
        values = rows.jagged[key].values
        if (wrong := np.flatnonzero((values < 0) | (values >= count))).size:
            row = _row(rows.jagged[key], wrong[0])
            raise DataError(
                f"{place}, row {row}: {key} must be ids 0..{count - 1}, got {values[wrong[0]]}; map it first"
            )
    for history, target in meta.targets.items():
        if (wrong := np.flatnonzero(rows.jagged[target].lengths != 1)).size:
            raise DataError(
                f"{place}, row {wrong[0]}: {target}, the target of {history}, must be one id, got "
                f"{rows.jagged[target].lengths[wrong[0]]}; give each row one, or take it out of targets"
            )
    for name in meta.histories:
        _check_times(rows, name, place)


def _check_times(rows: RankingRows, name: str, place: str) -> None:
    items, times = rows.jagged[name], rows.jagged[times_of(name)]
    if (wrong := np.flatnonzero(items.lengths != times.lengths)).size:
        row = int(wrong[0])
        raise DataError(
            f"{place}, row {row}: each event of {name} must have its time, got {items.lengths[row]} and "
            f"{times.lengths[row]}; write one {times_of(name)} an event"
        )
    begins = np.zeros(len(times.values) + 1, bool)
    begins[times.offsets[:-1]] = True
    if (wrong := np.flatnonzero((np.diff(times.values, prepend=times.values[:1]) < 0) & ~begins[:-1])).size:
        raise DataError(f"{place}, row {_row(times, wrong[0])}: times of {name} must ascend; sort the events by time")
    shown = np.repeat(rows.timestamp, times.lengths)
    if (wrong := np.flatnonzero(times.values >= shown)).size:
        row = _row(times, wrong[0])
        raise DataError(
            f"{place}, row {row}: events of {name} must be before the impression at {rows.timestamp[row]}, got one at "
            f"{times.values[wrong[0]]}: it would tell the model what came later; join histories as of the impression"
        )


def _row(jagged: Jagged, value: int) -> int:
    return int(np.searchsorted(jagged.offsets, value, side="right")) - 1
