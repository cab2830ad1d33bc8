import numpy as np
import pytest

from ssd_torchrec.data.batch_plan import BatchConfig
from ssd_torchrec.data.batches import Share
from ssd_torchrec.data.history_batches import HistoryBatches
from ssd_torchrec.data.parquet import UserHistories
from ssd_torchrec.data.rows import Rows
from tests.data.samples import dataset, lists, random_rows

LENGTHS = [5, 12, 0, 30, 45, 1, 7, 22, 3, 2, 4, 18, 90, 4, 13, 9]
CONFIG = BatchConfig(tokens_per_batch=40, window_events=80)
CHOICES = {"all": list(range(16)), "few": [1, 2, 7, 15], "one": [4], "empty-row": [2], "none": []}


@pytest.fixture(scope="module")
def histories(tmp_path_factory):
    return dataset(tmp_path_factory.mktemp("data") / "set", random_rows(LENGTHS))


@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize("rows", CHOICES.values(), ids=CHOICES)
def test_each_chosen_user_comes_once_with_the_whole_history(histories, rows, world_size):
    every = Rows.concatenate(list(histories))
    expected = {at: lists(every.item, every.offsets)[row] for at, row in enumerate(rows) if LENGTHS[row]}
    ranks = [
        list(HistoryBatches(histories, np.array(rows, np.int64), CONFIG, Share(rank=rank, world_size=world_size)))
        for rank in range(world_size)
    ]
    found = {}
    for parts in zip(*ranks, strict=True):  # all ranks have equally many
        assert len({part.num_rows for part in parts}) == 1
        assert sum(len(part.chosen) for part in parts) == parts[0].num_rows
        for part in parts:
            offsets = part.batch.layout.offsets.numpy()
            items = lists(part.batch.features["item"].values().numpy(), offsets)
            assert len(items) == max(len(part.chosen), 1)
            assert not set(part.chosen.tolist()) & found.keys()
            found |= dict(zip(part.chosen.tolist(), items, strict=False))
            assert sum(map(len, items)) <= max(CONFIG.tokens_per_batch, max(LENGTHS))
    assert found == expected


def test_row_groups_without_a_chosen_user_are_not_read(histories, monkeypatch):
    read, groups = UserHistories.read, []
    monkeypatch.setattr(UserHistories, "read", lambda self, group: groups.append(group) or read(self, group))
    list(HistoryBatches(histories, np.array([1, 15]), CONFIG))
    bounds = histories.row_group_offsets
    assert groups == [int(np.searchsorted(bounds, row, side="right")) - 1 for row in (1, 15)]
    assert len(groups) < histories.num_row_groups
