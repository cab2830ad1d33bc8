"""Global batches that depend on seed and epoch alone, of which every rank gets as many rows, once an epoch."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ssd_torchrec.data.batches import Share
from ssd_torchrec.data.ranking import batches as batches_module
from ssd_torchrec.data.ranking.batches import RankingBatches
from ssd_torchrec.data.ranking.clicks import ClicksConfig, clicks_meta, draw_clicks
from ssd_torchrec.data.ranking.folder import RankingPart, RankingWriter
from ssd_torchrec.errors import ConfigError

ROWS, PER_BATCH = 500, 24


@pytest.fixture(scope="module")
def part(tmp_path_factory) -> RankingPart:
    """Rows that their first dense feature numbers."""
    folder = tmp_path_factory.mktemp("ranking") / "set"
    config = ClicksConfig(num_rows=ROWS)
    rows, _ = draw_clicks(config)
    rows.dense[:, 0] = np.arange(ROWS)
    with RankingWriter(folder, clicks_meta(config), rows_per_group=30) as writer:
        writer.append("train", rows)
        writer.append("valid", rows.take(np.arange(30)))
        writer.append("test", rows.take(np.arange(50)))
        writer.finish()
    return RankingPart(folder, "train")


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(batches_module, "GROUPS_PER_WINDOW", 4)


def numbers(batches: Iterator) -> list[list[int]]:
    return [batch.dense_features[:, 0].long().tolist() for batch in batches]


def shared(part: RankingPart, world_size: int, epoch: int = 0, first: int = 0, seed: int = 0) -> list[list[int]]:
    """The global batches, put together of the ranks' shares."""
    shares = [
        numbers(RankingBatches(part, PER_BATCH, Share(rank=rank, world_size=world_size), seed).epoch(epoch, first))
        for rank in range(world_size)
    ]
    for of_ranks in zip(*shares, strict=True):
        assert {len(rows) for rows in of_ranks} == {PER_BATCH // world_size}
    return [sorted(row for rows in of_ranks for row in rows) for of_ranks in zip(*shares, strict=True)]


def test_an_epoch_holds_each_row_at_most_once_and_all_that_fill_batches(part):
    seen = [row for rows in shared(part, 1) for row in rows]
    assert len(seen) == len(set(seen)) == ROWS // PER_BATCH * PER_BATCH
    assert RankingBatches(part, PER_BATCH).count() == ROWS // PER_BATCH


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_global_batches_are_the_same_at_any_world_size(world_size, part):
    assert shared(part, world_size) == shared(part, 1)


def test_order_depends_on_seed_and_epoch_and_mixes_row_groups(part):
    orders = [shared(part, 1), shared(part, 1, epoch=1), shared(part, 1, seed=1)]
    assert orders[0] == shared(part, 1)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert len({row // 30 for row in orders[0][0]}) > 1


def test_each_epoch_shuffles_a_single_row_group_anew(part):
    alone = RankingBatches(RankingPart(Path(part._path).parent, "valid"), 30)
    assert numbers(alone.epoch(0)) != numbers(alone.epoch(1))


@pytest.mark.parametrize("first", [0, 1, 5, 6, 19, 20])
def test_an_epoch_goes_on_where_it_was_left(first, part):
    assert shared(part, 2, epoch=3, first=first) == shared(part, 1, epoch=3)[first:]


def test_windows_before_the_first_batch_are_not_read(part, monkeypatch):
    groups = []
    read = part.read
    monkeypatch.setattr(part, "read", lambda group: groups.append(group) or read(group))
    list(RankingBatches(part, PER_BATCH).epoch(0, first=18))
    assert 0 < len(groups) <= 8


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_in_order_every_row_comes_once_and_ranks_without_any_get_a_filler(world_size, part, tmp_path):
    shares = [
        list(RankingBatches(part, PER_BATCH, Share(rank=rank, world_size=world_size)).in_order())
        for rank in range(world_size)
    ]
    assert {len(batches) for batches in shares} == {-(-ROWS // PER_BATCH)}
    real = [
        (int(number), int(label))
        for batches in shares
        for batch in batches
        for number, label in zip(batch.dense_features[:, 0], batch.labels, strict=True)
        if label >= 0
    ]
    assert sorted(number for number, _ in real) == list(range(ROWS))


def test_a_rank_without_a_row_gets_one_of_no_label(part):
    few = RankingPart(Path(part._path).parent, "test")
    last = [list(RankingBatches(few, 49, Share(rank=rank, world_size=7)).in_order())[-1] for rank in range(7)]
    assert [batch.labels.tolist() for batch in last[1:]] == [[-1]] * 6
    assert len(last[0].labels) == 1
    assert last[0].labels.item() >= 0
    assert last[1].sparse_features.keys() == ["segment", "candidate", "clicked", "clicked_at"]
    assert last[1].sparse_features.lengths().tolist() == [0, 1, 0, 0]  # a model asks about one item in every row
    assert last[1].sparse_features.values().tolist() == [0]


@pytest.mark.parametrize("rows", [25, 0, -24])
def test_batches_that_ranks_cannot_share_evenly_are_refused(rows, part):
    with pytest.raises(ConfigError, match=r"rows_per_batch must be a multiple of the 2 ranks"):
        RankingBatches(part, rows, Share(rank=0, world_size=2))


def test_too_few_rows_and_too_late_a_start_are_refused(part):
    with pytest.raises(ConfigError, match=r"there must be 501 rows for a batch, got 500"):
        RankingBatches(part, 501).epoch(0)
    with pytest.raises(ConfigError, match=r"must have 21 batches to go on from, got 20"):
        RankingBatches(part, PER_BATCH).epoch(0, first=21)
