"""What one step consumes."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from ssd_torchrec.data.rows import Ints, Rows
from ssd_torchrec.data.schema import DatasetMeta
from ssd_torchrec.jagged import JaggedLayout


@dataclass(frozen=True, eq=False)
class Batch(Pipelineable):
    """B rows of history, the candidates to tell their next items from, and which candidate is right.

    #             row 0            row 1   row 2
    # item        [7, 3, 3]        []      [9, 4]       an empty row fills a rank that got none
    # timestamp   [100, 160, 900]  []      [120, 121]   int64 seconds; no table owns this key
    # candidate   [3, 4, 9, 12]    []      []           all in row 0, as the keys of a KJT share B
    # segment     [5]              []      [1]          a context key: one bag a row
    # target      [0, 0, 2]        []      [1, -1]      position in the candidate list; -1 asks for nothing
    # negative    [2, 3, 1]        []      [0, 0]       if the loss wants one a target
    """

    features: KeyedJaggedTensor
    layout: JaggedLayout  # of item and timestamp
    target: Tensor  # (T,) int64
    global_targets: int  # targets of the global batch, over all ranks; at least 1
    negative: Tensor | None = None  # (T,) int64 a wrong candidate for each target; 0 where there is none

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        return replace(
            self,
            features=self.features.to(device, non_blocking=non_blocking),
            layout=self.layout.to(device, non_blocking=non_blocking),
            target=self.target.to(device, non_blocking=non_blocking),
            negative=None if self.negative is None else self.negative.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "Batch":
        return replace(
            self,
            features=self.features.pin_memory(),
            layout=self.layout.pin_memory(),
            target=self.target.pin_memory(),
            negative=None if self.negative is None else self.negative.pin_memory(),
        )

    def record_stream(self, stream: torch.Stream) -> None:
        # torchrec asks for a CUDA stream and passes any on
        self.features.record_stream(stream)  # pyright: ignore[reportArgumentType]
        self.layout.record_stream(stream)
        self.target.record_stream(stream)
        if self.negative is not None:
            self.negative.record_stream(stream)


def collate(
    rows: Rows,
    target_item: Ints,
    meta: DatasetMeta,
    *,
    global_targets: int,
    with_candidates: bool = True,
    negative_item: Ints | None = None,
) -> Batch:
    """Lay rows out as a batch on the host; no rows become one empty row, since no rank may come without any.

    Args:
        rows: B histories.
        target_item: (T,) table row of the item to tell at each event, or -1 where nothing is asked. Rows below
            `meta.first_item` are no candidates: they are not asked for either.
        global_targets: targets of the global batch over all ranks, at least 1.
        with_candidates: whether the key "candidate" lists the whole catalogue or nothing. `target` counts from the
            first item either way.
        negative_item: (T,) table row of a wrong item for each target. The candidates are then these and the targets'
            only, each once, and `target` counts among them.
    """
    lengths = [rows.lengths, rows.lengths]
    values = [rows.item, rows.timestamp]
    num_rows = max(rows.num_rows, 1)
    asked = target_item >= meta.first_item
    target, negative = np.where(asked, target_item - meta.first_item, -1), None
    if negative_item is None:
        candidates = np.arange(meta.first_item, meta.num_table_rows if with_candidates else meta.first_item)
    else:
        candidates = np.union1d(target_item[asked], negative_item[asked])
        candidates = candidates if len(candidates) else np.array([meta.first_item])
        target = np.where(asked, np.searchsorted(candidates, target_item), -1)
        negative = np.where(asked, np.searchsorted(candidates, negative_item), 0)
    lengths.append(np.concatenate([[len(candidates)], np.zeros(num_rows - 1, np.int64)]))
    values.append(candidates)
    for name in meta.context:
        lengths.append(rows.context[name].lengths)
        values.append(rows.context[name].values)
    if not rows.num_rows:
        lengths = [part if len(part) else np.zeros(1, np.int64) for part in lengths]
    features = KeyedJaggedTensor.from_lengths_sync(
        keys=["item", "timestamp", "candidate", *meta.context],
        values=torch.from_numpy(np.concatenate(values)),
        lengths=torch.from_numpy(np.concatenate(lengths)),
    )
    layout = JaggedLayout.from_lengths(torch.from_numpy(lengths[0]))
    wrong = None if negative is None else torch.from_numpy(negative)
    return Batch(features, layout, torch.from_numpy(target), global_targets, wrong)
