from itertools import chain, pairwise

import numpy as np
import pytest
import torch

from ssd_torchrec.data.batch_plan import BatchConfig
from ssd_torchrec.data.batches import EvaluationBatches, Share, TrainingBatches, ending_in_mask
from ssd_torchrec.data.draws import uniform
from ssd_torchrec.data.objective import MASK, ObjectiveConfig
from ssd_torchrec.data.rows import Rows
from ssd_torchrec.data.split import LeaveOneOut, spans_of
from ssd_torchrec.data.statistics import item_counts
from ssd_torchrec.errors import ConfigError
from ssd_torchrec.training.run_folder import from_json
from tests.data.samples import FIRST_ITEM, NUM_ITEMS, dataset, lists, random_rows, rows_of

LENGTHS = [5, 12, 0, 30, 45, 1, 7, 22, 3, 2, 4, 18, 90, 4, 13, 9]
CONFIG = BatchConfig(tokens_per_batch=40, window_events=120, seed=2)
SAMPLED = ObjectiveConfig(targets="sampled", target_share=0.5)
EVERY_PREFIX = ObjectiveConfig(targets="sampled")
MASKED = ObjectiveConfig(targets="masked", mask_share=0.3)
HIDING = ObjectiveConfig(hide_share=0.3)
AGAINST_OTHERS = ObjectiveConfig(loss="bce")
DRAWN = {
    kind: ObjectiveConfig(loss="sampled_softmax", negatives=kind, num_negatives=20)
    for kind in ("uniform", "log_uniform", "popularity", "in_batch")
}
DRAWN["masked"] = ObjectiveConfig(
    loss="sampled_softmax", targets="masked", mask_share=0.3, negatives="in_batch", num_negatives=20
)
OBJECTIVES = {
    "sampled": SAMPLED,
    "every-prefix": EVERY_PREFIX,
    "masked": MASKED,
    "hiding": HIDING,
    "against-others": AGAINST_OTHERS,
    "drawn": DRAWN["uniform"],
}
ROWS = random_rows(LENGTHS)


@pytest.fixture(scope="module")
def histories(tmp_path_factory):
    return dataset(tmp_path_factory.mktemp("data") / "set", ROWS)


def batches_of(histories, objective, world_size=1, epoch=0, config=CONFIG, first=0):
    """Batch after batch, the shares of all ranks."""
    spans = spans_of(histories, LeaveOneOut())
    counts = item_counts(histories, spans).numpy()
    shares = [Share(rank=rank, world_size=world_size) for rank in range(world_size)]
    ranks = [
        TrainingBatches(histories, spans, config, share, objective, counts).epoch(epoch, first) for share in shares
    ]
    return list(zip(*ranks, strict=True))


def rows_in(batch):
    """Of each row with events: timestamps, items seen, items asked for, and the wrong ones, events in turn."""
    ids = batch.features["candidate"].values()
    ids = ids if len(ids) else torch.arange(FIRST_ITEM, FIRST_ITEM + NUM_ITEMS)  # what places count in without any
    asked = np.where(batch.target >= 0, ids[batch.target.clamp_min(0)], -1)
    wrong = np.full_like(asked, -1) if batch.negative is None else ids[batch.negative].numpy()
    values = (batch.features["timestamp"].values().numpy(), batch.features["item"].values().numpy(), asked, wrong)
    for first, stop in pairwise(batch.layout.offsets.tolist()):
        if stop > first:
            yield [part[first:stop].tolist() for part in values]


def all_rows(histories, objective, **options):
    return [row for shares in batches_of(histories, objective, **options) for batch in shares for row in rows_in(batch)]


def item_at(time):
    return int(ROWS.item[np.searchsorted(ROWS.timestamp, time)])


def item_after(time):
    return int(ROWS.item[np.searchsorted(ROWS.timestamp, time) + 1])


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("epoch", [0, 1])
def test_any_number_of_ranks_is_asked_the_same(objective, epoch, histories):
    alone, shared = (batches_of(histories, objective, world_size, epoch) for world_size in (1, 3))
    assert len(alone) == len(shared)
    for (whole,), parts in zip(alone, shared, strict=True):
        assert sorted(rows_in(whole)) == sorted(chain(*map(rows_in, parts)))
        assert {part.global_targets for part in parts} == {max(int((whole.target >= 0).sum()), 1)}


@pytest.mark.parametrize("objective", [SAMPLED, MASKED, HIDING, AGAINST_OTHERS], ids=lambda o: o.targets + o.loss)
def test_each_epoch_draws_anew(objective, histories):
    assert sorted(all_rows(histories, objective)) != sorted(all_rows(histories, objective, epoch=1))


def test_every_prefix_is_asked_about_once_and_a_share_of_them_in_proportion(histories):
    targets = [(times[-1], asked[-1]) for times, _, asked, _ in all_rows(histories, EVERY_PREFIX)]
    expected = [
        (time, item)
        for times, items in zip(lists(ROWS.timestamp, ROWS.offsets), lists(ROWS.item, ROWS.offsets), strict=True)
        for time, item in zip(times[:-3], items[1:-2], strict=True)
    ]
    assert sorted(targets) == sorted(expected)
    sampled = {(times[-1], asked[-1]) for times, _, asked, _ in all_rows(histories, SAMPLED)}
    assert sampled < set(targets)
    assert 0.35 < len(sampled) / len(targets) < 0.65


def test_a_sampled_history_is_whole_and_asks_once_at_its_end(histories):
    for times, seen, asked, _ in all_rows(histories, SAMPLED):
        assert times[0] in ROWS.timestamp[ROWS.offsets[:-1][np.array(LENGTHS) > 0]]
        assert seen == [item_at(time) for time in times]
        assert asked == [-1] * (len(times) - 1) + [item_after(times[-1])]


def test_masked_items_are_asked_for_where_they_were_and_not_shown(histories):
    rows = all_rows(histories, MASKED)
    for times, seen, asked, _ in rows:
        for time, item, target in zip(times, seen, asked, strict=True):
            assert (item, target) == (MASK, item_at(time)) if target >= 0 else (item_at(time), -1)
        assert max(asked) >= FIRST_ITEM  # each row hides one at least
    hidden = np.mean([target >= 0 for _, _, asked, _ in rows if len(asked) > 20 for target in asked])
    assert 0.2 < hidden < 0.4
    assert sum(len(times) for times, *_ in rows) == sum(n - 2 for n in LENGTHS if n > 3)


def test_hiding_changes_what_is_seen_and_not_what_is_asked(histories):
    rows = all_rows(histories, HIDING)
    for times, seen, asked, _ in rows:
        assert all(item in (MASK, item_at(time)) for time, item in zip(times, seen, strict=True))
        assert asked == [item_after(time) for time in times]
    hidden = np.mean([item == MASK for _, seen, _, _ in rows for item in seen])
    assert 0.2 < hidden < 0.4


def test_wrong_items_are_none_of_the_row_in_training_and_any_other(histories):
    wrong_of = {}
    for epoch in range(20):
        for times, _, _, wrong in all_rows(histories, AGAINST_OTHERS, epoch=epoch):
            wrong_of.setdefault(times[0], set()).update(wrong)
    for first, wrong in wrong_of.items():
        row = int(np.searchsorted(ROWS.offsets, np.searchsorted(ROWS.timestamp, first), side="right")) - 1
        trained = set(ROWS.item[ROWS.offsets[row] : ROWS.offsets[row + 1] - 2].tolist())
        if len(trained) < NUM_ITEMS:
            assert not wrong & trained
    most = max(wrong_of.values(), key=len)
    assert min(most) >= FIRST_ITEM
    assert len(most) > NUM_ITEMS / 2


def test_candidates_against_others_are_the_targets_and_the_wrong_items(histories):
    for (batch,) in batches_of(histories, AGAINST_OTHERS):
        ids = batch.features["candidate"].values().tolist()
        rows = list(rows_in(batch))
        assert ids == sorted({item for _, _, asked, wrong in rows for item in asked + wrong})


def shared_in(batch):
    """Table rows that all queries are told from, and the log of the chance of each."""
    ids = batch.features["candidate"].values()[: batch.num_shared]
    return list(zip(ids.tolist(), batch.log_q[: batch.num_shared].tolist(), strict=True))


@pytest.mark.parametrize("objective", DRAWN.values(), ids=DRAWN)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_any_number_of_ranks_has_the_same_negatives_and_targets(objective, world_size, histories):
    alone, shared = (batches_of(histories, objective, size) for size in (1, world_size))
    for (whole,), parts in zip(alone, shared, strict=True):
        assert sorted(rows_in(whole)) == sorted(chain(*map(rows_in, parts)))
        assert all(shared_in(part) == shared_in(whole) for part in parts)
        assert {part.global_targets for part in parts} == {int((whole.target >= 0).sum())}


@pytest.mark.parametrize("objective", DRAWN.values(), ids=DRAWN)
def test_drawn_candidates_are_the_shared_ones_and_then_the_ranks_other_targets(objective, histories):
    for batch in chain(*batches_of(histories, objective, 3)):
        ids, shared = batch.features["candidate"].values().tolist(), [item for item, _ in shared_in(batch)]
        asked = {item for _, _, row, _ in rows_in(batch) for item in row} - {-1}
        assert len(shared) > 0
        assert shared == sorted(set(shared))
        assert ids == shared + sorted(asked - set(shared))
        assert (len(batch.log_q), batch.log_q.dtype) == (len(ids), torch.float32)
        assert batch.log_q.isfinite().all()


@pytest.mark.parametrize("objective", [DRAWN["in_batch"], DRAWN["masked"]], ids=lambda o: o.targets)
def test_in_a_batch_the_negatives_are_the_targets_of_all_its_ranks(objective, histories):
    counts = item_counts(histories, spans_of(histories, LeaveOneOut())).numpy()
    for parts in batches_of(histories, objective, 3):
        asked = [item for part in parts for _, _, row, _ in rows_in(part) for item in row if item >= 0]
        for part in parts:
            items, log_q = zip(*shared_in(part), strict=True)
            assert list(items) == sorted(set(asked))
            missed = (1 - counts[np.array(items) - FIRST_ITEM] / counts.sum()) ** len(asked)
            assert list(log_q) == pytest.approx(np.log(1 - missed), abs=1e-6)


@pytest.mark.parametrize("kind", ["uniform", "popularity"])
def test_each_batch_and_each_epoch_draws_negatives_anew(kind, histories):
    epochs = [[shared_in(b) for (b,) in batches_of(histories, DRAWN[kind], epoch=epoch)] for epoch in (0, 1)]
    drawn = [str(negatives) for epoch in epochs for negatives in epoch]
    assert len(drawn) > 10
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("kind", ["log_uniform", "in_batch"])
def test_going_on_from_any_batch_draws_the_same_negatives(kind, histories):
    whole = batches_of(histories, DRAWN[kind], epoch=1)
    for first in range(len(whole) + 1):
        rest = batches_of(histories, DRAWN[kind], epoch=1, first=first)
        assert [shared_in(batch) for (batch,) in rest] == [shared_in(batch) for (batch,) in whole[first:]]


def test_a_batch_of_unknown_targets_still_has_a_negative(tmp_path):
    rows = random_rows([6, 30])  # each a batch
    item = np.where(np.arange(36) < 6, 1, rows.item)
    known_later = Rows(rows.user_id, item, rows.timestamp, rows.offsets, rows.context)
    config = BatchConfig(tokens_per_batch=5)
    batches = batches_of(dataset(tmp_path / "set", known_later), DRAWN["in_batch"], 2, config=config)
    unknown = [part for parts in batches for part in parts if parts[0].global_targets == 1]
    assert len(unknown) == 2
    for part in unknown:
        assert (part.target == -1).all()
        assert (part.num_shared, len(part.features["candidate"].values())) == (1, 1)
        assert part.log_q.isfinite().all()


def test_drawing_without_counts_is_refused(histories):
    with pytest.raises(ConfigError, match=r"counts of items must be given .* item_counts"):
        TrainingBatches(histories, spans_of(histories, LeaveOneOut()), CONFIG, objective=DRAWN["uniform"])


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_a_longest_length_keeps_the_newest_events(objective, histories):
    config = BatchConfig(tokens_per_batch=40, window_events=120, max_length=6)
    lengths = [len(times) for times, *_ in all_rows(histories, objective, config=config)]
    assert max(lengths) == 6
    evaluation = EvaluationBatches(histories, spans_of(histories, LeaveOneOut()), "test", config)
    for batch in evaluation:
        for times, seen, *_ in rows_in(batch):
            row = int(np.searchsorted(ROWS.offsets, np.searchsorted(ROWS.timestamp, times[-1]), side="right")) - 1
            assert seen == ROWS.item[ROWS.offsets[row] : ROWS.offsets[row + 1] - 1][-6:].tolist()


def test_where_masks_are_asked_at_histories_end_in_one(histories):
    spans = spans_of(histories, LeaveOneOut())
    plain, masked = (
        [
            row
            for batch in EvaluationBatches(histories, spans, "test", CONFIG, asks_at_mask=mask)
            for row in rows_in(batch)
        ]
        for mask in (False, True)
    )
    assert len(plain) == len(masked) > 5
    for (times, seen, _, _), (more_times, more_seen, _, _) in zip(plain, masked, strict=True):
        assert more_times == [*times, times[-1]]
        assert more_seen == [*seen, MASK]


def test_a_mask_goes_to_the_end_of_no_rows_too():
    assert ending_in_mask(rows_of([])).num_rows == 0


def test_numbers_hang_on_their_words_alone():
    together = uniform(3, np.arange(1000), 7)
    assert together[5] == uniform(3, np.array([5]), 7)[0]
    assert 0 <= together.min() < together.max() < 1
    assert abs(together.mean() - 0.5) < 0.03
    assert abs(np.corrcoef(together, uniform(4, np.arange(1000), 7))[0, 1]) < 0.1
    assert abs(np.corrcoef(together[1:], together[:-1])[0, 1]) < 0.1


@pytest.mark.parametrize(
    "wrong",
    [
        {"targets": "some"},
        {"loss": "hinge"},
        {"target_share": 0.0},
        {"target_share": 0.5},
        {"targets": "masked"},
        {"mask_share": 0.2},
        {"hide_share": 1.0},
        {"targets": "masked", "mask_share": 0.2, "hide_share": 0.1},
        {"loss": "sampled_softmax", "negatives": "hard"},
        {"loss": "sampled_softmax", "num_negatives": 0},
        {"num_negatives": 128},
        {"loss": "bce", "negatives": "popularity"},
    ],
    ids=str,
)
def test_objectives_that_contradict_themselves_are_refused(wrong):
    with pytest.raises(ConfigError, match="objective"):
        ObjectiveConfig(**wrong)


def test_objectives_written_before_negatives_were_drawn_for_the_batch_are_read():
    written = {"targets": "all", "target_share": 1.0, "mask_share": 0.0, "hide_share": 0.0, "loss": "softmax"}
    assert from_json(ObjectiveConfig, written) == ObjectiveConfig()
