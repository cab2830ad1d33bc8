"""What one step consumes."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchrec import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from ssd_torchrec.data.negatives import SharedNegatives
from ssd_torchrec.data.objective import MASK
from ssd_torchrec.data.rows import Ints, Jagged, Rows, even_offsets
from ssd_torchrec.data.schema import UNKNOWN, DatasetMeta
from ssd_torchrec.jagged import JaggedLayout

IDS_A_ROW = 64
"""Of ids that are laid over rows: enough rows for any GPU, and few lengths beside the ids."""


@dataclass(frozen=True, eq=False)
class Batch(Pipelineable):
    """B rows of history, the candidates to tell their next items from, and which candidate is right.

    #             row 0            row 1   row 2
    # segment     [5]              []      [1]          a context key: one bag a row; an empty row fills a rank without
    # item        [7, 3, 3]        []      [9, 4]
    # timestamp   [100, 160, 900]  []      [120, 121]   int64 seconds; no table owns this key
    # action      [2, 0, 1]        []      [1, 1]       an event column: an id an event, 0 for none
    # target      [0, 0, 2]        []      [1, -1]      position in the candidate list; -1 asks for nothing
    # negative    [2, 3, 1]        []      [0, 0]       if the loss wants one a target
    # candidate   [3, 4, 9, 12]                         of no row
    # log_q       [-1, -2, -1, -3]                      if the candidates were drawn by chance

    Which events are whose says `layout`. Of context keys, row b of `features` is row b here; ids of all other keys are
    laid evenly over its rows, which are more than B where they would else be longer than `IDS_A_ROW`: FBGEMM's kernels
    take the ids of a row one by one.

    Candidates drawn by chance are the `num_shared` that all ranks have, ascending, and then this rank's targets that
    are none of these, ascending.
    """

    features: KeyedJaggedTensor
    layout: JaggedLayout  # of item and timestamp
    target: Tensor  # (T,) int64
    global_targets: int  # targets of the global batch, over all ranks; at least 1
    negative: Tensor | None = None  # (T,) int64 a wrong candidate for each target; 0 where there is none
    log_q: Tensor | None = None  # (C,) fp32 log of the chance that a draw for the batch has the candidate
    num_shared: int = 0  # candidates, the first, that all queries are told from; 0 unless drawn by chance

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        moved = {name: part.to(device, non_blocking=non_blocking) for name, part in self._parts().items()}
        return replace(self, **moved)

    def pin_memory(self) -> "Batch":
        return replace(self, **{name: part.pin_memory() for name, part in self._parts().items()})

    def record_stream(self, stream: torch.Stream) -> None:
        for part in self._parts().values():
            part.record_stream(stream)

    def _parts(self) -> dict[str, Any]:
        """What lies on a device."""
        names = ("features", "layout", "target", "negative", "log_q")
        return {name: part for name in names if (part := getattr(self, name)) is not None}


def collate(
    rows: Rows,
    target_item: Ints,
    meta: DatasetMeta,
    *,
    global_targets: int,
    with_candidates: bool = True,
    negative_item: Ints | None = None,
    shared: SharedNegatives | None = None,
) -> Batch:
    """Lay rows out as a batch on the host; no rows become one empty row, since no rank may come without any.

    The context and event columns are those of `meta`. An event whose item is hidden has unknown ids in every event
    column: they could tell the item.

    Args:
        rows: B histories.
        target_item: (T,) table row of the item to tell at each event, or -1 where nothing is asked. Rows below
            `meta.first_item` are no candidates: they are not asked for either.
        global_targets: targets of the global batch over all ranks, at least 1.
        with_candidates: whether the key "candidate" lists the whole catalogue or nothing. `target` counts from the
            first item either way.
        negative_item: (T,) table row of a wrong item for each target. The candidates are then these and the targets'
            only, each once, and `target` counts among them.
        shared: negatives of the global batch. The candidates are then these, and the targets that are none of them.
    """
    if shared is not None:
        candidates = _drawn(target_item, meta, shared)
    elif negative_item is not None:
        candidates = _in_pairs(target_item, negative_item, meta)
    else:
        candidates = _catalogue(target_item, meta, with_candidates)
    spread = {"item": rows.item, "timestamp": rows.timestamp, "candidate": candidates.item} | {
        name: np.where(rows.item == MASK, UNKNOWN, rows.event_columns[name]) for name in meta.event_columns
    }
    longest = max(map(len, spread.values()))
    height = max(rows.num_rows, -(-longest // IDS_A_ROW), 1)
    jagged = {name: Jagged(ids, even_offsets(len(ids), height)) for name, ids in spread.items()}
    jagged |= {name: rows.context[name].padded(height) for name in meta.context}
    keys = ["item", "timestamp", "candidate", *meta.context, *meta.event_columns]
    features = KeyedJaggedTensor.from_lengths_sync(
        keys=keys,
        values=torch.from_numpy(np.concatenate([jagged[key].values for key in keys])),
        lengths=torch.from_numpy(np.concatenate([jagged[key].lengths for key in keys])),
    )
    layout = JaggedLayout.from_lengths(torch.from_numpy(rows.lengths if rows.num_rows else np.zeros(1, np.int64)))
    target, negative, log_q = (
        None if part is None else torch.from_numpy(part)
        for part in (candidates.target, candidates.negative, candidates.log_q)
    )
    assert target is not None
    return Batch(features, layout, target, global_targets, negative, log_q, candidates.num_shared)


class _Candidates(NamedTuple):
    """What targets are told from, and where they are among it."""

    item: Ints  # (C,) table rows
    target: Ints  # (T,)
    negative: Ints | None = None  # (T,)
    log_q: NDArray[np.float32] | None = None  # (C,)
    num_shared: int = 0


def _catalogue(target_item: Ints, meta: DatasetMeta, listed: bool) -> _Candidates:
    item = np.arange(meta.first_item, meta.num_table_rows if listed else meta.first_item)
    return _Candidates(item, np.where(target_item >= meta.first_item, target_item - meta.first_item, -1))


def _in_pairs(target_item: Ints, negative_item: Ints, meta: DatasetMeta) -> _Candidates:
    asked = target_item >= meta.first_item
    item = np.union1d(target_item[asked], negative_item[asked])
    item = item if len(item) else np.array([meta.first_item])
    target = np.where(asked, np.searchsorted(item, target_item), -1)
    return _Candidates(item, target, np.where(asked, np.searchsorted(item, negative_item), 0))


def _drawn(target_item: Ints, meta: DatasetMeta, shared: SharedNegatives) -> _Candidates:
    asked, first = target_item >= meta.first_item, shared.item + meta.first_item
    then = np.setdiff1d(target_item[asked], first)
    place = np.where(
        np.isin(target_item, first),
        np.searchsorted(first, target_item),
        len(first) + np.searchsorted(then, target_item),
    )
    item = np.concatenate([first, then])
    log_q = shared.log_q(item - meta.first_item)
    return _Candidates(item, np.where(asked, place, -1), log_q=log_q, num_shared=len(first))
