from dataclasses import replace

import numpy as np
import pytest

from ssd_torchrec.data.generate import generate
from ssd_torchrec.data.parquet import open_dataset
from ssd_torchrec.data.synthetic import Law, SyntheticConfig, sample_users
from ssd_torchrec.errors import ConfigError, DataError
from tests.data.samples import lists

SMALL = SyntheticConfig(num_users=300, num_classes=5, num_segments=3, seed=3)


@pytest.fixture(scope="module")
def law():
    return Law.draw(SMALL)


@pytest.fixture(scope="module")
def sample(law):
    return next(sample_users(law))


def test_the_same_seed_gives_the_same_data_and_another_one_other_data(tmp_path):
    prints = [
        generate(config, tmp_path / str(i)).fingerprint
        for i, config in enumerate((SMALL, SMALL, replace(SMALL, seed=4)))
    ]
    assert prints[0] == prints[1] != prints[2]


def test_what_is_written_is_what_was_drawn(tmp_path, sample):
    meta = generate(SMALL, tmp_path / "set")
    rows = open_dataset(tmp_path / "set").read(0)
    assert (meta.num_users, meta.num_items, meta.context) == (300, 200, {"segment": 3})
    drawn = [items[:n].tolist() for items, n in zip(sample.item + meta.first_item, sample.lengths, strict=True)]
    assert lists(rows.item, rows.offsets) == drawn
    assert set(meta.attainable) == set(meta.attainable_without_time) == {"valid", "test"}


def test_each_class_and_regime_wants_a_group_of_its_own(law):
    assert sorted(law.interest.flatten()) == list(range(SMALL.num_groups))


def test_another_seed_is_another_law(law):
    assert (Law.draw(replace(SMALL, seed=4)).interest != law.interest).any()


def test_every_segment_has_all_items_in_an_order_of_its_own(law):
    assert (np.sort(law.favourites, axis=1) == np.arange(SMALL.num_items)).all()
    assert (law.favourites[0] != law.favourites[1]).any()
    assert np.allclose(law.in_segment.sum(axis=1), 1)


def test_a_gap_tells_its_regime(sample):
    gaps = np.diff(sample.timestamp, axis=1)
    centres = np.log(SMALL.gap_centres_s)
    nearest = np.abs(np.log(gaps)[..., None] - centres).argmin(axis=-1)
    assert (nearest == sample.regime[:, 1:]).all()
    assert (sample.regime[:, 0] == 0).all()


def test_lengths_lie_within_their_bounds_and_differ(sample):
    assert sample.lengths.min() >= SMALL.shortest
    assert sample.lengths.max() <= SMALL.longest
    assert len(set(sample.lengths.tolist())) > 10


def test_a_user_is_in_one_or_two_different_segments(sample):
    bags = lists(sample.segments.values, sample.segments.offsets)
    assert {len(bag) for bag in bags} == {1, 2}
    assert all(len(set(bag)) == len(bag) for bag in bags)


def test_most_items_come_from_what_the_last_event_wants(law, sample):
    groups = law.interest[law.class_of_item[sample.item], sample.regime]
    there = np.arange(1, sample.item.shape[1]) < sample.lengths[:, None]
    follows = (sample.item[:, 1:] // SMALL.group_size == groups[:, :-1])[there].mean()
    assert SMALL.weight_last < follows < SMALL.weight_last + 0.1


def test_users_are_drawn_in_blocks_that_do_not_repeat(monkeypatch, law):
    monkeypatch.setattr("ssd_torchrec.data.synthetic._USERS_AT_ONCE", 150)
    blocks = list(sample_users(law))
    assert [len(block.lengths) for block in blocks] == [150, 150]
    assert [block.first_user for block in blocks] == [0, 150]
    assert (blocks[0].item[:, :10] != blocks[1].item[:, :10]).any()


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("ten years of work")
    with pytest.raises(DataError, match="must be a data set to be replaced"):
        generate(SMALL, tmp_path)
    assert (tmp_path / "thesis.txt").exists()


REFUSED = {
    "no-users": ({"num_users": 0}, "num_users must be at least 1"),
    "no-classes": ({"num_classes": 0}, "num_classes must be at least 1"),
    "too-short": ({"shortest": 2}, "3 <= shortest <= longest"),
    "longest-below-shortest": ({"longest": 5}, "3 <= shortest <= longest"),
    "weights-above-one": ({"weight_last": 0.9, "weight_previous": 0.2}, "at most 1 together"),
    "negative-weight": ({"weight_previous": -0.1}, "at most 1 together"),
    "no-regimes": ({"gap_centres_s": ()}, "gap_centres_s must begin at"),
    "gaps-below-a-second": ({"gap_centres_s": (1.0, 10_000.0)}, "gap_centres_s must begin at"),
    "overlapping-regimes": ({"gap_centres_s": (300.0, 600.0)}, "regimes must not overlap"),
    "falling-regimes": ({"gap_centres_s": (10_800.0, 300.0)}, "regimes must not overlap"),
    "negative-exponent": ({"group_exponent": -1.0}, "group_exponent must be at least 0"),
    "no-median": ({"median_length": 0.0}, "median_length must be above 0"),
    "negative-seed": ({"seed": -1}, "seed must be at least 0"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_a_law_that_cannot_be_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(SMALL, **change)
