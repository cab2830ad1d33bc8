import time
from itertools import chain

import numpy as np
import pytest
import torch

from ssd_torchrec.data.batch_plan import BatchConfig
from ssd_torchrec.data.batches import EvaluationBatches, Share, TrainingBatches
from ssd_torchrec.data.rows import Rows
from ssd_torchrec.data.split import LeaveOneOut, SplitByTime, spans_of
from ssd_torchrec.errors import ConfigError
from tests.data.samples import FIRST_ITEM, NUM_SEGMENTS, dataset, lists, random_rows

LENGTHS = [5, 12, 0, 30, 45, 1, 7, 22, 3, 2, 4, 18, 90, 4, 13, 9]
CONFIG = BatchConfig(tokens_per_batch=40, window_events=80, seed=2)
SPLITS = {"leave-one-out": LeaveOneOut(), "by-time": SplitByTime(10**9 + 60_000_000, 10**9 + 100_000_000)}


@pytest.fixture(scope="module")
def histories(tmp_path_factory):
    return dataset(tmp_path_factory.mktemp("data") / "set", random_rows(LENGTHS))


@pytest.fixture(params=SPLITS)
def split(request):
    return SPLITS[request.param]


def batches_of(histories, split, world_size, epoch=0, first=0):
    """Batch after batch, the shares of all ranks."""
    spans = spans_of(histories, split)
    shares = [Share(rank=rank, world_size=world_size) for rank in range(world_size)]
    ranks = [TrainingBatches(histories, spans, CONFIG, share).epoch(epoch, first) for share in shares]
    return list(zip(*ranks, strict=True))


def pairs(batch):
    """(timestamp of input, item asked for) of every target; timestamps differ from event to event."""
    asked = batch.target >= 0
    times = batch.features["timestamp"].values()[asked].tolist()
    return list(zip(times, (batch.target[asked] + FIRST_ITEM).tolist(), strict=True))


def expected_pairs(rows, events):
    return sorted(
        (time, item)
        for times, items, n in zip(
            lists(rows.timestamp, rows.offsets), lists(rows.item, rows.offsets), events.tolist(), strict=True
        )
        for time, item in zip(times[: max(n - 1, 0)], items[1 : max(n, 1)], strict=True)
    )


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("epoch", [0, 1])
def test_every_training_target_appears_exactly_once_an_epoch(histories, split, world_size, epoch):
    seen = [pair for shares in batches_of(histories, split, world_size, epoch) for b in shares for pair in pairs(b)]
    spans = spans_of(histories, split)
    assert sorted(seen) == expected_pairs(random_rows(LENGTHS), spans.training_events)


@pytest.mark.parametrize("world_size", [2, 3])
def test_global_batches_are_the_same_at_any_world_size(histories, split, world_size):
    alone = batches_of(histories, split, 1)
    shared = batches_of(histories, split, world_size)
    assert len(alone) == len(shared)
    for (whole,), parts in zip(alone, shared, strict=True):
        assert sorted(pairs(whole)) == sorted(pair for part in parts for pair in pairs(part))
        assert {part.global_targets for part in parts} == {whole.global_targets} == {len(pairs(whole))}


def test_a_rank_without_a_row_gets_an_empty_one(histories):
    shares = [share for batch in batches_of(histories, LeaveOneOut(), 3) for share in batch]
    assert all(share.layout.num_rows >= 1 for share in shares)
    empty = [share for share in shares if not share.layout.num_events]
    assert empty
    assert all(len(share.target) == 0 and share.global_targets > 0 for share in empty)


def test_a_row_longer_than_the_budget_is_a_batch_of_its_own(histories):
    sizes = [(whole.layout.num_rows, whole.layout.num_events) for (whole,) in batches_of(histories, LeaveOneOut(), 1)]
    assert sorted(size for size in sizes if size[1] > 40) == [(1, 42), (1, 87)]


def test_every_event_of_training_has_a_target_and_its_own_history(histories):
    by_time = dict(zip(random_rows(LENGTHS).timestamp.tolist(), random_rows(LENGTHS).item.tolist(), strict=True))
    for (whole,) in batches_of(histories, LeaveOneOut(), 1):
        assert (whole.target >= 0).all()
        times = whole.features["timestamp"].values().tolist()
        assert [by_time[t] for t in times] == whole.features["item"].values().tolist()
        assert whole.layout.longest == int(whole.layout.offsets.diff().max())


def test_context_bags_go_with_their_rows(histories):
    rows = random_rows(LENGTHS)
    segment_at = {t: u % NUM_SEGMENTS for u, ts in enumerate(lists(rows.timestamp, rows.offsets)) for t in ts}
    for (whole,) in batches_of(histories, LeaveOneOut(), 1):
        times = whole.features["timestamp"].values()
        segments = whole.features["segment"].values()[whole.layout.row_of_event]
        assert segments.tolist() == [segment_at[t] for t in times.tolist()]


@pytest.mark.parametrize("world_size", [1, 2])
def test_going_on_from_any_batch_gives_the_rest_of_the_epoch(histories, world_size):
    whole = batches_of(histories, LeaveOneOut(), 2, epoch=1)
    for first in range(len(whole) + 1):
        rest = batches_of(histories, LeaveOneOut(), world_size, epoch=1, first=first)
        assert len(rest) == len(whole) - first
        for one, other in zip(whole[first:], rest, strict=True):
            assert sorted(p for b in one for p in pairs(b)) == sorted(p for b in other for p in pairs(b))


def test_windows_before_the_position_are_not_read(histories, monkeypatch):
    spans = spans_of(histories, LeaveOneOut())
    batches = TrainingBatches(histories, spans, CONFIG)
    last = list(batches._windows(0))[-1]
    read = []
    original = type(histories).read
    monkeypatch.setattr(type(histories), "read", lambda self, group: read.append(group) or original(self, group))
    assert len(list(batches.epoch(0, batches.count(0) - len(last.batches)))) == len(last.batches)
    assert read == last.row_groups.tolist()


def test_a_position_past_the_epoch_is_refused(histories):
    batches = TrainingBatches(histories, spans_of(histories, LeaveOneOut()), CONFIG)
    with pytest.raises(ConfigError, match=r"epoch 0 must have 999 batches to go on from, got \d+; resume with"):
        batches.epoch(0, 999)


def test_unknown_items_are_histories_but_not_counted_as_targets(tmp_path):
    rows = random_rows([6, 8])
    item = rows.item.copy()
    item[[2, 9]] = 1  # third event of the first row, fourth of the second: targets both
    histories = dataset(tmp_path / "set", Rows(rows.user_id, item, rows.timestamp, rows.offsets, rows.context))
    (whole,) = TrainingBatches(histories, spans_of(histories, LeaveOneOut()), CONFIG).epoch(0)
    assert whole.layout.num_events == 3 + 5
    assert int((whole.target >= 0).sum()) == whole.global_targets == 6


def test_an_epoch_of_unknown_targets_still_divides_by_something(tmp_path):
    rows = random_rows([6])
    histories = dataset(
        tmp_path / "set", Rows(rows.user_id, rows.item * 0 + 1, rows.timestamp, rows.offsets, rows.context)
    )
    (whole,) = TrainingBatches(histories, spans_of(histories, LeaveOneOut()), CONFIG).epoch(0)
    assert whole.target.tolist() == [-1, -1, -1]
    assert whole.global_targets == 1


def test_no_training_rows_make_no_batches(tmp_path):
    histories = dataset(tmp_path / "set", random_rows([3, 2, 0]))
    batches = TrainingBatches(histories, spans_of(histories, LeaveOneOut()), CONFIG)
    assert (batches.count(0), list(batches.epoch(0))) == (0, [])


@pytest.mark.parametrize("stage", ["valid", "test"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_history_is_asked_once_at_its_last_event(histories, split, stage, world_size):
    spans, rows = spans_of(histories, split), random_rows(LENGTHS)
    shares = [Share(rank=rank, world_size=world_size) for rank in range(world_size)]
    ranks = [list(EvaluationBatches(histories, spans, stage, CONFIG, share)) for share in shares]
    assert len({len(rank) for rank in ranks}) == 1
    asked = []
    for batch in chain.from_iterable(ranks):
        last = batch.layout.last_event[batch.layout.last_event >= 0]
        assert set(torch.nonzero(batch.target >= 0)[:, 0].tolist()) == set(last.tolist())
        asked += pairs(batch)
        assert batch.features["candidate"].values().numel() == 0
    expected = []
    for begin, target in zip(rows.offsets[:-1].tolist(), spans.target(stage).tolist(), strict=True):
        if target >= 0:
            expected.append((int(rows.timestamp[begin + target - 1]), int(rows.item[begin + target])))
    assert sorted(asked) == sorted(expected)


def test_evaluation_comes_in_the_same_order_every_time(histories):
    batches = EvaluationBatches(histories, spans_of(histories, LeaveOneOut()), "test", CONFIG)
    one, other = ([pairs(batch) for batch in batches] for _ in range(2))
    assert one == other
    assert len(batches) == len(one)


@pytest.mark.parametrize(("rank", "world_size"), [(2, 2), (-1, 1), (0, 0)])
def test_a_rank_outside_the_world_is_refused(rank, world_size):
    with pytest.raises(ConfigError, match="rank must lie in"):
        Share(rank=rank, world_size=world_size)


def test_batches_come_faster_than_anything_trains(tmp_path):
    """A tenth of what one idle core does; about five million events a second were seen."""
    lengths = np.random.default_rng(0).integers(10, 60, size=3000)
    histories = dataset(tmp_path / "set", random_rows(lengths), events_per_row_group=2**18, events_per_file=2**24)
    batches = TrainingBatches(histories, spans_of(histories, LeaveOneOut()), BatchConfig(tokens_per_batch=8192))
    started = time.process_time()
    events = sum(batch.layout.num_events for batch in batches.epoch(0))
    assert events / (time.process_time() - started) > 200_000
