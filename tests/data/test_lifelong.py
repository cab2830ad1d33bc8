from dataclasses import replace

import numpy as np
import pytest

from ssd_torchrec.data.generate import generate
from ssd_torchrec.data.lifelong import LifelongConfig, lifelong_rows
from ssd_torchrec.data.parquet import open_dataset
from ssd_torchrec.errors import ConfigError
from tests.data.samples import lists

SMALL = LifelongConfig(
    num_users=30, shortest=120, longest=600, distance=50, num_questions=3, num_tokens=7, num_filler=40, seed=5
)
FIRST = 3
TOKENS = SMALL.num_kinds * SMALL.num_tokens
QUESTION = 2 * TOKENS
FILLER = QUESTION + SMALL.num_questions


def rows():
    (users,) = lifelong_rows(SMALL, FIRST)
    return [np.array(items) - FIRST for items in lists(users.item, users.offsets)]


def test_lengths_are_as_asked_and_times_ascend():
    lengths = [len(items) for items in rows()]
    assert min(lengths) >= SMALL.shortest
    assert max(lengths) <= SMALL.longest
    assert len(set(lengths)) > 20
    (users,) = lifelong_rows(SMALL, FIRST)
    assert all((np.diff(times) >= 0).all() for times in lists(users.timestamp, users.offsets))


def asked_in(items):
    """(question's place, place of the last token of the kind of the first answer, of the second), in order."""
    found = []
    for asked in np.flatnonzero((items >= QUESTION) & (items < FILLER)):
        kinds = 2 * (items[asked] - QUESTION) + np.arange(2)
        found.append((asked, *(np.flatnonzero(items[:asked] // SMALL.num_tokens == kind)[-1] for kind in kinds)))
    return found


def test_answers_hang_on_the_last_token_of_their_kind_alone():
    answer_of = {}
    for items in rows():
        for asked, *tokens in asked_in(items):
            for after, token in enumerate(tokens):
                answer = items[asked + 1 + after]
                assert (answer - TOKENS) // SMALL.num_tokens == items[token] // SMALL.num_tokens
                assert answer_of.setdefault(items[token], answer) == answer
    assert len(answer_of) == len(set(answer_of.values())) == TOKENS


def test_the_last_answers_are_beyond_the_distance_and_most_others_near():
    back = [[asked - token for asked, token, _ in asked_in(items)] for items in rows()]
    assert min(row[-1] for row in back) > SMALL.distance
    assert max(row[-1] for row in back) <= 2 * SMALL.distance + 5 * SMALL.num_questions
    others = np.concatenate([row[: -SMALL.num_questions] for row in back])
    assert np.median(others) < 20 < SMALL.distance < others.max()


def test_each_question_is_the_last_somewhere():
    assert {items[-3] - QUESTION for items in rows()} == set(range(SMALL.num_questions))


def test_blocks_hold_a_token_and_an_answer_of_each_kind():
    for items in rows():
        questions = ((items >= QUESTION) & (items < FILLER)).sum()
        assert (items < TOKENS).sum() == ((items >= TOKENS) & (items < QUESTION)).sum() == 2 * questions
        assert items.max() < SMALL.num_items


def test_what_is_written_is_what_was_drawn_and_the_same_each_time(tmp_path):
    meta = generate(SMALL, tmp_path / "set")
    (group,) = open_dataset(tmp_path / "set")
    assert lists(group.item, group.offsets) == [(items + meta.first_item).tolist() for items in rows()]
    assert meta.fingerprint == generate(SMALL, tmp_path / "again").fingerprint
    assert meta.fingerprint != generate(replace(SMALL, seed=6), tmp_path / "other").fingerprint
    assert meta.attainable["test"]["hr@10"] == meta.attainable["valid"]["ndcg@50"] == 1.0


@pytest.mark.parametrize(
    "wrong",
    [{"num_tokens": 0}, {"seed": -1}, {"filler_exponent": -0.1}, {"tail": 0.0}, {"shortest": 1004}, {"longest": 1999}],
    ids=str,
)
def test_laws_that_cannot_be_are_refused(wrong):
    with pytest.raises(ConfigError, match="must"):
        LifelongConfig(**wrong)
