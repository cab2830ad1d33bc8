import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssd_torchrec.data.distribution import Bar, Distribution, gaps_of
from ssd_torchrec.errors import ConfigError, DataError
from tests.data.samples import FEW, jagged

SHARES = [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0]
SMALL = st.lists(st.integers(0, 255), min_size=1, max_size=60)
ANY = st.lists(st.integers(0, 2**63 - 1) | st.integers(0, 5000), min_size=1, max_size=60)


def spread(*parts: list[int]) -> Distribution:
    distribution = Distribution()
    for part in parts:
        distribution.add(np.array(part, np.int64))
    return distribution


def exact(values: list[int], share: float) -> int:
    return sorted(values)[max(int(np.ceil(share * len(values))), 1) - 1]


@FEW
@given(SMALL)
def test_quantiles_of_small_values_are_exact(values):
    assert [spread(values).quantile(share) for share in SHARES] == [exact(values, share) for share in SHARES]


@FEW
@given(ANY)
def test_quantiles_are_off_by_less_than_a_128th(values):
    distribution = spread(values)
    for share in SHARES:
        expected = exact(values, share)
        assert abs(distribution.quantile(share) - expected) <= expected / 128
    assert distribution.count == len(values)
    assert distribution.mean == sum(values) / len(values)


@FEW
@given(ANY, st.randoms())
def test_order_and_parts_do_not_matter(values, random):
    shuffled = random.sample(values, len(values))
    cut = random.randrange(len(values) + 1)
    pieces = spread(shuffled[:cut], [], shuffled[cut:])
    assert pieces.summary() == spread(values).summary()
    assert pieces.bars(4) == spread(values).bars(4)


@FEW
@given(ANY, st.sampled_from([1, 2, 8, 64]))
def test_bars_count_what_lies_in_them_and_leave_nothing_out(values, per_octave):
    bars = spread(values).bars(per_octave)
    assert [bar.count for bar in bars] == [sum(b.least <= value <= b.greatest for value in values) for b in bars]
    assert sum(bar.count for bar in bars) == len(values)
    assert bars[0].count > 0
    assert bars[-1].count > 0
    assert [bar.least for bar in bars[1:]] == [bar.greatest + 1 for bar in bars[:-1]]


def test_bars_double_and_zero_stands_alone():
    assert spread([0, 1, 3, 3, 9]).bars() == [Bar(0, 0, 1), Bar(1, 1, 1), Bar(2, 3, 2), Bar(4, 7, 0), Bar(8, 15, 1)]
    assert [(bar.least, bar.greatest) for bar in spread([4, 15]).bars(2)] == [(4, 5), (6, 7), (8, 11), (12, 15)]


def test_summary_names_what_meta_json_holds():
    assert spread(list(range(101))).summary() == {
        "min": 0,
        "p10": 10,
        "p25": 25,
        "p50": 50,
        "p75": 75,
        "p90": 90,
        "p99": 99,
        "max": 100,
        "mean": 50,
    }


def test_nothing_has_no_summary_and_no_bars():
    nothing = spread([])
    assert (nothing.count, nothing.summary(), nothing.bars()) == (0, {}, [])
    assert np.isnan([nothing.mean, nothing.quantile(0.5)]).all()


@pytest.mark.parametrize(
    ("values", "match"),
    [(np.array([3, -1]), "at least 0, got -1"), (np.array([0.5]), "got float64"), (np.array([True]), "got bool")],
    ids=["negative", "fraction", "bool"],
)
def test_values_that_are_no_counts_are_refused(values, match):
    with pytest.raises(DataError, match=match):
        Distribution().add(values)


def test_shares_and_cuts_outside_their_range_are_refused():
    with pytest.raises(ConfigError, match=r"0\.\.1, got 99"):
        spread([1]).quantile(99)
    with pytest.raises(ConfigError, match="got 3"):
        spread([1]).bars(3)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [([[5, 6, 9], [2, 4]], [1, 3, 2]), ([[], [7], [], [1, 1]], [0]), ([[4]], []), ([], [])],
    ids=["two-rows", "empty-rows", "one-event", "no-rows"],
)
def test_gaps_never_reach_over_a_row(rows, expected):
    timestamps = jagged(rows)
    assert gaps_of(timestamps.values, timestamps.offsets).tolist() == expected
