"""The generated law is as it says: only order and times of a history tell what is wanted."""

from dataclasses import replace

import numpy as np
import pytest

from ssd_torchrec.data.ranking.clicks import ClicksConfig, clicks_meta, draw_clicks
from ssd_torchrec.data.ranking.rows import check_rows
from ssd_torchrec.errors import ConfigError

CONFIG = ClicksConfig(num_rows=20_000)


def wanted(rows, config: ClicksConfig) -> np.ndarray:
    """What each row's history says, from items and times alone."""
    clicked, times = rows.jagged["clicked"], rows.jagged["clicked_at"]
    last = clicked.offsets[1:] - 1
    gap_s = times.values[last] - times.values[last - 1]
    return (clicked.values[last] // config.group_size + (gap_s > 10_000)) % config.num_groups


def clicks_by_fit(config: ClicksConfig) -> tuple[float, float]:
    """Share of clicks on candidates that the history wants, and on others."""
    rows, _ = draw_clicks(config)
    fits = rows.jagged["candidate"].values // config.group_size == wanted(rows, config)
    return rows.label[fits].mean(), rows.label[~fits].mean()


def test_the_last_item_and_the_gap_before_it_tell_what_is_clicked():
    fit, other = clicks_by_fit(CONFIG)
    assert fit > 0.6
    assert other < 0.2


def test_shuffled_histories_tell_nothing():
    fit, other = clicks_by_fit(replace(CONFIG, shuffled=True))
    assert abs(fit - other) < 0.03


def test_the_bag_of_items_tells_next_to_nothing():
    """Without order, each of a long history's items is as likely the last."""
    config = replace(CONFIG, shortest=40)
    rows, _ = draw_clicks(config)
    clicked = rows.jagged["clicked"]
    each = np.split(clicked.values, clicked.offsets[1:-1])
    shuffled = np.concatenate([np.random.default_rng(n).permutation(row) for n, row in enumerate(each)])
    last = shuffled[clicked.offsets[1:] - 1] // config.group_size
    group = rows.jagged["candidate"].values // config.group_size
    fits = (group == last) | (group == (last + 1) % config.num_groups)
    assert abs(rows.label[fits].mean() - rows.label[~fits].mean()) < 0.05


def test_rows_are_what_a_ranking_data_set_holds_and_the_same_for_a_seed():
    rows, logits = draw_clicks(CONFIG)
    check_rows(rows, clicks_meta(CONFIG), "clicks")
    again, _ = draw_clicks(CONFIG)
    assert np.array_equal(rows.jagged["clicked_at"].values, again.jagged["clicked_at"].values)
    assert np.array_equal(rows.label, again.label)
    assert (draw_clicks(replace(CONFIG, seed=1))[0].label != rows.label).any()
    assert rows.label.mean() == pytest.approx((1 / (1 + np.exp(-logits))).mean(), abs=0.02)
    assert (np.diff(rows.timestamp) > 0).all()


@pytest.mark.parametrize("change", [{"num_rows": 9}, {"shortest": 1}, {"num_groups": 2}, {"shortest": 9, "longest": 8}])
def test_a_law_that_makes_no_sense_is_refused(change):
    with pytest.raises(ConfigError, match=r"must be at least"):
        replace(CONFIG, **change)
