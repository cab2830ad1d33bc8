import gc
import weakref

import pytest
import torch

from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.ops.chunks import chunk_table

LENGTHS = [5, 0, 3, 9]


def test_chunks_lie_as_drawn():
    table = chunk_table(JaggedLayout.from_lengths(LENGTHS), 4)
    assert table.rows_of_rank == [3, 2, 1]
    assert table.row_order.tolist() == [3, 0, 2, 1]
    assert [*table.steps()] == [(slice(0, 2), slice(3, 5)), (slice(3, 4), slice(5, 6))]
    assert table.before.tolist() == [0, 1, 3]  # of chunks 3, 4 and 5
    assert table.last.tolist() == [5, 4, 2]  # of rows 3, 0 and 2
    assert table.event_of_slot[0].tolist() == [8, 9, 10, 11]
    assert table.event_of_slot[2].tolist() == [5, 6, 7, 7]  # the padding repeats the row's last event
    assert table.event_of_slot[5].tolist() == [16, 16, 16, 16]
    assert table.is_padding[5].tolist() == [False, True, True, True]


def test_backwards_rows_are_cut_from_their_end():
    table = chunk_table(JaggedLayout.from_lengths(LENGTHS), 4, reverse=True)
    assert table.event_of_slot[0].tolist() == [16, 15, 14, 13]
    assert table.event_of_slot[4].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("lengths", [LENGTHS, [0, 0], []], ids=str)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("slots", [1, 4, 16])
def test_join_undoes_cut(slots, reverse, lengths):
    table = chunk_table(JaggedLayout.from_lengths(lengths), slots, reverse=reverse)
    events = torch.arange(sum(lengths) * 6).view(-1, 3, 2)
    chunks = table.cut(events)
    assert chunks.shape == (sum(table.rows_of_rank), 3, slots, 2)
    assert torch.equal(table.join(chunks), events)


def test_a_table_is_built_once_and_goes_with_its_layout():
    layout = JaggedLayout.from_lengths(LENGTHS)
    table = chunk_table(layout, 4)
    assert chunk_table(layout, 4) is table
    assert chunk_table(layout, 8) is not table
    gone = weakref.ref(table)
    del layout, table
    gc.collect()
    assert gone() is None
