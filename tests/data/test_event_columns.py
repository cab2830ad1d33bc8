"""Event columns go with their events from the file to the batch, and tell nothing that is hidden.

Here the item decides the action, so an id that strays to another event shows.
"""

from dataclasses import replace

import numpy as np
import pytest

from ssd_torchrec.data.batch import collate
from ssd_torchrec.data.batch_plan import BatchConfig
from ssd_torchrec.data.batches import EvaluationBatches, Share, TrainingBatches
from ssd_torchrec.data.history_batches import HistoryBatches
from ssd_torchrec.data.objective import MASK, ObjectiveConfig
from ssd_torchrec.data.parquet import open_dataset
from ssd_torchrec.data.split import LeaveOneOut, spans_of
from ssd_torchrec.data.statistics import item_counts
from ssd_torchrec.errors import ConfigError
from tests.data.samples import action_of, dataset, random_rows, with_action, write

LENGTHS = [5, 12, 0, 30, 45, 1, 7, 22, 3, 2, 4, 18, 90, 4, 13, 9]
ROWS = with_action(random_rows(LENGTHS))
CONFIG = BatchConfig(tokens_per_batch=40, window_events=120, seed=2)
OBJECTIVES = {
    "all": ObjectiveConfig(),
    "sampled": ObjectiveConfig(targets="sampled", target_share=0.5),
    "masked": ObjectiveConfig(targets="masked", mask_share=0.3),
    "hiding": ObjectiveConfig(hide_share=0.3),
    "against-others": ObjectiveConfig(loss="bce"),
    "drawn": ObjectiveConfig(loss="sampled_softmax", num_negatives=20),
}
SHARES = [Share(), Share(rank=0, world_size=3), Share(rank=2, world_size=3)]
KEYS = ["item", "timestamp", "candidate", "segment", "action"]


@pytest.fixture(scope="module")
def histories(tmp_path_factory):
    return dataset(tmp_path_factory.mktemp("data") / "set", ROWS)


def training(histories, objective, share=None, config=CONFIG):
    spans = spans_of(histories, LeaveOneOut())
    counts = item_counts(histories, spans).numpy()
    return list(TrainingBatches(histories, spans, config, share, objective, counts).epoch(0))


def check(batches):
    """The actions are those of the items that are seen; returns how many are hidden."""
    hidden = 0
    for batch in batches:
        assert batch.features.keys() == KEYS
        item, action = batch.features["item"], batch.features["action"]
        assert action.lengths().tolist() == item.lengths().tolist()
        assert action.values().tolist() == action_of(item.values().numpy()).tolist()
        hidden += int((item.values() == MASK).sum())
    return hidden


@pytest.mark.parametrize("share", SHARES, ids=["alone", "first-of-three", "last-of-three"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_training_batches_bring_each_event_its_own_and_hidden_ones_none(histories, name, share):
    hidden = check(training(histories, OBJECTIVES[name], share))
    assert (hidden > 0) == (name in ("masked", "hiding"))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_newest_events_keep_theirs(histories, name):
    check(training(histories, OBJECTIVES[name], config=replace(CONFIG, max_length=6)))


@pytest.mark.parametrize("max_length", [0, 6])
@pytest.mark.parametrize("asks_at_mask", [False, True])
@pytest.mark.parametrize("stage", ["valid", "test"])
def test_evaluation_batches_do_too(histories, stage, asks_at_mask, max_length):
    spans, config = spans_of(histories, LeaveOneOut()), replace(CONFIG, max_length=max_length)
    for share in SHARES:
        check(EvaluationBatches(histories, spans, stage, config, share, asks_at_mask=asks_at_mask))


@pytest.mark.parametrize("asks_at_mask", [False, True])
def test_chosen_histories_do_too(histories, asks_at_mask):
    chosen = np.array([1, 2, 7, 12, 15])
    parts = list(HistoryBatches(histories, chosen, CONFIG, asks_at_mask=asks_at_mask))
    assert check(part.batch for part in parts) == 4 * asks_at_mask  # the third row is empty


def test_what_is_asked_for_does_not_come_with_its_columns(tmp_path, histories):
    """Batches stay as they are, whatever stands in the columns of validation and test events."""
    action = ROWS.event_columns["action"].copy()
    for back in (1, 2):
        ends = ROWS.offsets[1:][ROWS.lengths >= back] - back
        action[ends] = 7 - action[ends]
    other = dataset(tmp_path / "other", replace(ROWS, event_columns={"action": action}))
    assert other.fingerprint != histories.fingerprint
    trained = [training(of, ObjectiveConfig()) for of in (histories, other)]
    asked = [list(EvaluationBatches(of, spans_of(of, LeaveOneOut()), "valid", CONFIG)) for of in (histories, other)]
    for one, changed in (trained, asked):
        assert len(one) == len(changed) > 3
        for left, right in zip(one, changed, strict=True):
            assert left.features["action"].values().tolist() == right.features["action"].values().tolist()


def test_those_that_are_not_wanted_are_not_read(histories):
    without = histories.with_event_columns(())
    assert without.read(0).event_columns == {}
    (batch, *_) = training(without, ObjectiveConfig())
    assert batch.features.keys() == KEYS[:-1]
    assert without.fingerprint == histories.fingerprint


def test_columns_stand_in_the_order_of_the_data_set_whatever_the_order_asked_for(tmp_path):
    both = replace(ROWS, event_columns={"action": ROWS.event_columns["action"], "again": 7 - action_of(ROWS.item)})
    write(tmp_path / "set", both)
    histories = open_dataset(tmp_path / "set").with_event_columns(["again", "action"])
    assert [*histories.meta.event_columns] == ["action", "again"]
    features = training(histories, ObjectiveConfig())[0].features
    assert (features["action"].values() + features["again"].values() == 7).all()


def test_a_column_that_is_not_there_is_refused_by_name(histories):
    with pytest.raises(ConfigError, match=r"sample, which has \['action'\], got \['colour'\]; .* --event-columns"):
        histories.with_event_columns(["action", "colour"])


@pytest.mark.parametrize("items", [[], [0], [0, 0]], ids=["no-rows", "an-empty-row", "empty-rows"])
def test_a_batch_without_events_has_the_key_all_the_same(histories, items):
    rows = with_action(random_rows(items))
    batch = collate(rows, np.zeros(0, np.int64), histories.meta, global_targets=1)
    assert batch.features["action"].lengths().tolist() == [0] * max(len(items), 1)
