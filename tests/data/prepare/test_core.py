import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssd_torchrec.data.prepare.core import Counts, code_events, k_core
from ssd_torchrec.errors import DataError
from tests.data.prepare.events import core_by_hand, database, events_table
from tests.data.samples import FEW

PAIRS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=70)


def core(pairs, k, as_name=lambda number: number):
    connection = database(events_table([as_name(u) for u, _ in pairs], [as_name(i) for _, i in pairs]))
    code_events(connection, [])
    rounds = list(k_core(connection, k))
    left = connection.execute(
        "SELECT raw_users.raw, raw_items.raw FROM pairs JOIN raw_users USING (u) JOIN raw_items USING (i)"
    ).fetchall()
    return sorted(left), rounds


@FEW
@given(PAIRS, st.integers(0, 4))
def test_the_core_is_what_is_left_whatever_goes_first(pairs, k):
    expected = sorted(core_by_hand(pairs, k))
    if not expected:
        with pytest.raises(DataError, match=rf"the {k}-core of a log must hold something"):
            core(pairs, k)
        return
    left, rounds = core(pairs, k)
    assert left == expected
    assert rounds[0] == Counts(len({u for u, _ in pairs}), len({i for _, i in pairs}), len(pairs))
    assert rounds[-1] == Counts(len({u for u, _ in left}), len({i for _, i in left}), len(left))


def test_one_departure_makes_others_weak():
    chain = [(n, m) for n in range(6) for m in (n, n + 1)] + [(9, 8), (9, 9), (8, 8), (8, 9)]
    left, rounds = core(chain, 2)
    assert left == [(8, 8), (8, 9), (9, 8), (9, 9)]
    assert [counts.events for counts in rounds] == [16, 14, 12, 10, 8, 6, 4]


@pytest.mark.parametrize("k", [0, 1])
def test_without_a_core_all_stay(k):
    left, rounds = core([(1, 1), (2, 1)], k)
    assert left == [(1, 1), (2, 1)]
    assert rounds == [Counts(2, 1, 2)]


def test_repetitions_count():
    assert core([(1, 1)] * 3, 3)[0] == [(1, 1)] * 3


def test_numbers_follow_names_in_ascending_order():
    names = ["Ärger", "a", "B", "10", "9", "é"]
    connection = database(events_table(names, names))
    code_events(connection, [])
    for table, number in (("raw_users", "u"), ("raw_items", "i")):
        assert connection.execute(f"SELECT raw, {number} FROM {table} ORDER BY 2").fetchall() == [
            (name, place) for place, name in enumerate(sorted(names))
        ]


def test_an_empty_core_names_its_rounds():
    with pytest.raises(
        DataError,
        match=r"3-core .* nothing of 2 users, 2 items, 4 interactions; round 1: 1 users, 1 items, 2 interactions; "
        r"round 2: 0 users, 0 items, 0 interactions; give a smaller --k-core",
    ):
        core([(1, 1), (1, 1), (1, 2), (2, 1)], 3)
