"""Rows cut into chunks of Q events, so that many short recurrences become batched matrix products.

    rows of 5, 0, 3 and 9 events, Q = 4          rank 0 | rank 1 | rank 2
    chunks, most chunks first:     row 3         [a b c d] [e f g h] [i . . .]
                                   row 0         [j k l m] [n . . .]
                                   row 2         [o p q .]
    in memory, rank by rank:       (3,0) (0,0) (2,0)   (3,1) (0,1)   (3,2)

Rank r+1 continues the first rows of rank r, so state passes from rank to rank by slices, without an index. A slot past
its row's end (.) repeats the row's last event: nothing of another row is read. Backwards, rows are cut from their end.
Source: Dao & Gu 2024, arXiv:2405.21060, section 6, with chunks that never span two rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ssd_torchrec.jagged import JaggedLayout


@dataclass(frozen=True, eq=False)
class ChunkTable:
    """Which event sits in which slot of which chunk; n chunks of Q slots."""

    event_of_slot: Tensor  # (n, Q) int64
    is_padding: Tensor  # (n, Q) bool, slots past the row's end
    slot_of_event: Tensor  # (T,) int64 into the n * Q slots
    row_order: Tensor  # (B,) int64, rows of most chunks first
    place_of_row: Tensor  # (B,) int64, its inverse
    rows_of_rank: list[int]  # rows that have a chunk of this rank; falls from rank to rank, host
    before: Tensor  # (n - rows of rank 0,) int64, the chunk before each chunk of rank 1 and on
    last: Tensor  # (rows of rank 0,) int64, the last chunk of each row, rows of most chunks first
    _of_heads: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def steps(self) -> Iterator[tuple[slice, slice]]:
        """From each rank to the next: the chunks that go on, and those they go on in, row for row."""
        starts = accumulate(self.rows_of_rank, initial=0)
        for start, (rows, onward) in zip(starts, pairwise(self.rows_of_rank), strict=False):
            yield slice(start, start + onward), slice(start + rows, start + rows + onward)

    def cut(self, events: Tensor) -> Tensor:
        """(T, H, ...) events to (n, H, Q, ...) chunks."""
        heads = events.shape[1]
        slots = events.flatten(0, 1).index_select(0, self._indices(heads)[0])
        return slots.view(len(self.event_of_slot), heads, self.event_of_slot.shape[1], *events.shape[2:])

    def join(self, chunks: Tensor) -> Tensor:
        """(n, H, Q, ...) chunks to (T, H, ...) events; padding is dropped."""
        heads = chunks.shape[1]
        events = chunks.flatten(0, 2).index_select(0, self._indices(heads)[1])
        return events.view(len(self.slot_of_event), heads, *chunks.shape[3:])

    def _indices(self, heads: int) -> tuple[Tensor, Tensor]:
        """Event and head of each (chunk, head, slot), and the way back; one pair for each number of heads."""
        if heads not in self._of_heads:
            slots = self.event_of_slot.shape[1]
            head = torch.arange(heads, device=self.slot_of_event.device)
            cut = self.event_of_slot[:, None] * heads + head[:, None]  # (n, H, Q)
            chunk, slot = self.slot_of_event // slots, self.slot_of_event % slots
            join = (chunk[:, None] * heads + head) * slots + slot[:, None]  # (T, H)
            self._of_heads[heads] = cut.flatten(), join.flatten()
        return self._of_heads[heads]


_TABLES: WeakKeyDictionary[JaggedLayout, dict[tuple[int, bool], ChunkTable]] = WeakKeyDictionary()


def chunk_table(layout: JaggedLayout, slots: int, *, reverse: bool = False) -> ChunkTable:
    """The table of this layout, built at first use and kept as long as the layout lives.

    Args:
        slots: events Q of a chunk, at least 1.
        reverse: cut rows from their end, for recurrences that run backwards.

    On CUDA the first use waits for the device once; CPU layouts wait for nothing.
    """
    tables = _TABLES.setdefault(layout, {})
    if (slots, reverse) not in tables:
        tables[slots, reverse] = _build(layout, slots, reverse)
    return tables[slots, reverse]


def _build(layout: JaggedLayout, slots: int, reverse: bool) -> ChunkTable:
    device = layout.offsets.device
    lengths = layout.offsets.diff()
    chunks = (lengths + slots - 1) // slots
    row_order = chunks.argsort(descending=True, stable=True)
    place_of_row = row_order.argsort()
    rows_with = torch.bincount(chunks, minlength=1)  # [c]: rows of c chunks
    rows_of_rank = (layout.num_rows - rows_with.cumsum(0))[:-1].tolist()
    starts = torch.tensor([*accumulate(rows_of_rank, initial=0)], device=device)

    position = lengths[layout.row_of_event] - 1 - layout.position if reverse else layout.position
    slot_of_event = (starts[position // slots] + place_of_row[layout.row_of_event]) * slots + position % slots

    total = sum(rows_of_rank)
    rank = torch.repeat_interleave(starts.diff(), output_size=total)
    place = torch.arange(total, device=device) - starts[rank]
    row = row_order[place]
    within = rank[:, None] * slots + torch.arange(slots, device=device)  # (n, Q) position in the row
    last = lengths[row][:, None] - 1
    clamped = within.minimum(last)
    first = layout.offsets[row][:, None]
    event_of_slot = first + (last - clamped if reverse else clamped)
    first_rank = sum(rows_of_rank[:1])
    before = (starts[rank - 1] + place)[first_rank:]
    final = starts[chunks[row_order[:first_rank]] - 1] + torch.arange(first_rank, device=device)
    return ChunkTable(event_of_slot, within > last, slot_of_event, row_order, place_of_row, rows_of_rank, before, final)
