import numpy as np
import pytest
import torch

from ssd_torchrec.data.batch import IDS_A_ROW, collate
from ssd_torchrec.data.negatives import NegativeSampler, SharedNegatives
from ssd_torchrec.data.schema import DatasetMeta
from tests.data.samples import FIRST_ITEM, NUM_ITEMS, rows_of

META = DatasetMeta(
    name="sample",
    num_users=1,
    num_events=1,
    num_items=NUM_ITEMS,
    num_oov_buckets=FIRST_ITEM - 1,
    item_vocabulary_hash="",
    context={"segment": 4},
    fingerprint="",
)


def batch_of(items, target_item, **options):
    return collate(rows_of(items), np.array(target_item, np.int64), META, global_targets=9, **options)


def test_a_batch_holds_histories_candidates_and_bags_of_equally_many_rows():
    batch = batch_of([[7, 3, 3], [9, 4]], [3, 3, 8, 4, -1])
    assert batch.features.keys() == ["item", "timestamp", "candidate", "segment"]
    assert batch.features["item"].values().tolist() == [7, 3, 3, 9, 4]
    assert batch.features["item"].lengths().tolist() == batch.features["timestamp"].lengths().tolist() == [2, 3]
    assert batch.features["timestamp"].values().tolist() == [1000, 4600, 8200, 1000, 4600]
    assert batch.features["candidate"].lengths().tolist() == [NUM_ITEMS // 2, NUM_ITEMS - NUM_ITEMS // 2]
    assert batch.features["candidate"].values().tolist() == list(range(FIRST_ITEM, FIRST_ITEM + NUM_ITEMS))
    assert batch.features["segment"].values().tolist() == [0, 1]
    assert batch.layout.offsets.tolist() == [0, 3, 5]
    assert batch.global_targets == 9


def test_ids_beyond_those_of_a_row_get_rows_of_their_own():
    batch = batch_of([[7] * IDS_A_ROW, [], [9] * (IDS_A_ROW + 2)], [-1] * (2 * IDS_A_ROW + 2))
    assert batch.layout.offsets.tolist() == [0, IDS_A_ROW, IDS_A_ROW, 2 * IDS_A_ROW + 2]
    assert batch.features["item"].lengths().tolist() == [43, 43, 44]
    batch = batch_of([[7] * (3 * IDS_A_ROW + 1)], [-1] * (3 * IDS_A_ROW + 1))
    assert batch.layout.offsets.tolist() == [0, 3 * IDS_A_ROW + 1]
    assert batch.features["item"].lengths().tolist() == [48, 48, 48, 49]
    assert batch.features["candidate"].values().tolist() == list(range(FIRST_ITEM, FIRST_ITEM + NUM_ITEMS))
    assert batch.features["segment"].values().tolist() == [0]
    assert batch.features["segment"].lengths().tolist() == [1, 0, 0, 0]


def test_targets_are_places_among_the_candidates():
    batch = batch_of([[7, 3, 3]], [3, 52, -1])
    assert batch.target.tolist() == [0, 49, -1]
    candidates = batch.features["candidate"].values()
    assert candidates[batch.target[:2]].tolist() == [3, 52]


def test_out_of_vocabulary_rows_are_inputs_but_not_asked_for():
    batch = batch_of([[1, 7, 2]], [7, 2, 1])
    assert batch.features["item"].values().tolist() == [1, 7, 2]
    assert batch.target.tolist() == [4, -1, -1]


def test_candidates_can_be_left_out_without_moving_targets():
    batch = batch_of([[7, 3]], [3, 8], with_candidates=False)
    assert batch.features["candidate"].lengths().tolist() == [0]
    assert batch.target.tolist() == [0, 5]


@pytest.mark.parametrize("items", [[], [[]], [[], []]], ids=["no-rows", "an-empty-row", "empty-rows"])
def test_a_batch_without_events_has_a_row_all_the_same(items):
    batch = batch_of(items, [])
    assert batch.layout.num_rows == max(len(items), 1)
    assert batch.layout.num_events == len(batch.target) == 0
    assert batch.features["candidate"].values().tolist() == list(range(FIRST_ITEM, FIRST_ITEM + NUM_ITEMS))
    assert batch.features["segment"].lengths().tolist() == ([1] * len(items) or [0])


def test_timestamps_keep_every_second():
    second = 2**53 + 1
    rows = rows_of([[7]], [[second]])
    batch = collate(rows, np.array([-1]), META, global_targets=1)
    assert batch.features["timestamp"].values().tolist() == [second]


def test_drawn_candidates_are_followed_by_the_other_targets():
    sampler = NegativeSampler("uniform", 4, np.ones(NUM_ITEMS, np.int64))
    shared = SharedNegatives(sampler, np.array([0, 4, 6]), 4)  # rows 3, 7 and 9
    batch = batch_of([[7, 3, 3, 9, 4, 4]], [9, 52, 3, -1, 8, 52], shared=shared)
    assert batch.features["candidate"].values().tolist() == [3, 7, 9, 8, 52]
    assert batch.target.tolist() == [2, 4, 0, -1, 3, 4]
    assert batch.num_shared == 3
    assert batch.log_q.tolist() == pytest.approx([np.log(1 - (1 - 1 / NUM_ITEMS) ** 4)] * 5)


def test_moving_a_batch_moves_all_of_it():
    sampler = NegativeSampler("uniform", 4, np.ones(NUM_ITEMS, np.int64))
    for drawn in ({"negative_item": np.array([9, 9])}, {"shared": sampler.shared(0)}):
        batch = batch_of([[7, 3]], [3, 8], **drawn)
        moved = batch.to(torch.device("meta"))
        for name, part in vars(moved).items():
            assert type(part) is type(getattr(batch, name))
        parts = [moved.features.values(), moved.target, moved.layout.offsets, moved.negative, moved.log_q]
        assert {part.device.type for part in parts if part is not None} == {"meta"}
        assert (moved.global_targets, moved.num_shared) == (9, batch.num_shared)
