"""The catalogue passing by in chunks, for whoever scores all of it, and what of it each query is not to get.

A (queries, items) score matrix is never whole: queries come in blocks, items in chunks, and one product of the two is
held at a time. Items count from 0 at the first real item; mask and out-of-vocabulary rows are no items.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ssd_torchrec.data.batch import Batch
from ssd_torchrec.models.next_item import NextItemModel

QUERIES_PER_BLOCK = 1024


@dataclass(frozen=True, eq=False)
class Seen:
    """S pairs of a query and an item of its history."""

    query: Tensor  # (S,) int64, ascending
    item: Tensor  # (S,) int64

    @classmethod
    def none(cls, device: torch.device | None = None) -> "Seen":
        return cls(*(torch.empty(0, dtype=torch.int64, device=device) for _ in range(2)))

    @classmethod
    def of(cls, batch: Batch, query_of_row: Tensor, first_item: int) -> "Seen":
        """What the rows of a batch hold.

        Args:
            query_of_row: (B,) int64 ascending but for -1, which stands for a row that asks nothing.
            first_item: table row of item 0.
        """
        query = query_of_row[batch.layout.row_of_event]
        item = batch.features["item"].values() - first_item
        counted = (query >= 0) & (item >= 0)
        return cls(query[counted], item[counted])

    @classmethod
    def joined(cls, parts: Iterable["Seen"]) -> "Seen":
        """Parts whose queries ascend from one to the next."""
        columns = zip(*((part.query, part.item) for part in parts), strict=True)
        return cls(*(torch.cat(column) for column in columns))

    def of_queries(self, first: int, stop: int) -> "SeenInBlock":
        """The pairs of the queries first..stop-1, counted from 0 at `first`."""
        begin, end = _places(self.query, first, stop)
        order = self.item[begin:end].argsort()
        return SeenInBlock(self.query[begin:end][order] - first, self.item[begin:end][order])


@dataclass(frozen=True, eq=False)
class SeenInBlock:
    """The same for a block of queries, sorted by item: each chunk of the catalogue finds its pairs side by side."""

    query: Tensor  # (S,) int64 in the block
    item: Tensor  # (S,) int64, ascending

    def drop_from(self, scores: Tensor, first_item: int, wanted: Tensor | None = None) -> None:
        """Score what has been seen below everything, in place.

        Args:
            scores: (M, C) of the block's queries and the items from `first_item` on.
            wanted: (M,) items that stay, seen or not.
        """
        begin, end = _places(self.item, first_item, first_item + scores.shape[1])
        row, item = self.query[begin:end], self.item[begin:end]
        if wanted is not None:
            dropped = item != wanted[row]
            row, item = row[dropped], item[dropped]
        scores[row, item - first_item] = -torch.inf


def catalogue(model: NextItemModel, device: torch.device, items_per_chunk: int) -> Iterator[Tensor]:
    """Item vectors (C, D) fp32 in order from item 0. Collective when the table is sharded: every rank draws all."""
    first, stop = model.tables.first_item, model.tables.num_item_rows
    for start in range(first, stop, items_per_chunk):
        yield model.item_vectors(torch.arange(start, min(start + items_per_chunk, stop), device=device)).float()


def with_first_item(chunks: Iterable[Tensor], first: int = 0) -> Iterator[tuple[int, Tensor]]:
    """Each chunk with the number of its first item, the first chunk's being `first`."""
    for chunk in chunks:
        yield first, chunk
        first += len(chunk)


def _places(ascending: Tensor, first: int, stop: int) -> tuple[int, int]:
    """Where the values first..stop-1 begin and end."""
    begin, end = torch.searchsorted(ascending, torch.tensor([first, stop], device=ascending.device)).tolist()
    return begin, end
