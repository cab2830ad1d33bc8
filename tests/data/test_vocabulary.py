import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssd_torchrec.data.vocabulary import VOCABULARY_FILE, Vocabulary, stable_hash
from ssd_torchrec.errors import ConfigError, DataError
from tests.data.samples import FEW

IDS = {"numbers": [7, -3, 2**62, 0], "words": ["b", "", "straße", "a" * 300]}
UNKNOWN = {"numbers": [8, -(2**63), 1], "words": ["c", "ß", "aa"]}


@pytest.fixture(params=IDS)
def kind(request) -> str:
    return request.param


def test_known_ids_take_the_rows_after_mask_and_buckets(kind):
    vocabulary = Vocabulary(IDS[kind], num_oov_buckets=5)
    assert vocabulary.rows_of(IDS[kind]).tolist() == [6, 7, 8, 9]
    assert vocabulary.rows_of(IDS[kind][::-1]).tolist() == [9, 8, 7, 6]


def test_unknown_ids_take_buckets_and_always_the_same(kind):
    vocabulary = Vocabulary(IDS[kind], num_oov_buckets=3)
    rows = vocabulary.rows_of(UNKNOWN[kind] * 2)
    assert set(rows.tolist()) <= {1, 2, 3}
    assert rows[:3].tolist() == rows[3:].tolist()


def test_unknown_ids_spread_over_the_buckets():
    rows = Vocabulary([0], num_oov_buckets=8).rows_of(np.arange(1, 8001))
    assert np.bincount(rows, minlength=9)[1:].min() > 800
    words = Vocabulary(["0"], num_oov_buckets=8).rows_of([f"item-{i}" for i in range(8000)])
    assert np.bincount(words, minlength=9)[1:].min() > 800


def test_the_hash_never_changes():
    """Rows of trained tables hang on these numbers, computed by big integers outside; the first begins splitmix64."""
    numbers = pa.array([0, 1, -1])
    assert stable_hash(numbers).tolist() == [16294208416658607535, 10451216379200822465, 16490336266968443936]
    words = pa.array(["", "a", "straße"], pa.large_string())
    assert stable_hash(words).tolist() == [16294208416658607535, 2106293278287090, 9365580646657667099]


def test_a_word_hashes_alike_wherever_it_stands():
    words = pa.array(["x", "straße", "", "straße"], pa.large_string())
    assert stable_hash(words)[1] == stable_hash(words)[3] == stable_hash(words[3:])[0]


@FEW
@given(st.lists(st.text(max_size=6), min_size=1, unique=True), st.lists(st.text(max_size=6)))
def test_words_are_found_exactly_when_they_are_there(ids, asked):
    rows = Vocabulary(ids, num_oov_buckets=2).rows_of(asked)
    assert [int(row) - 3 for row in rows if row >= 3] == [ids.index(word) for word in asked if word in ids]
    assert [row >= 3 for row in rows] == [word in ids for word in asked]


def test_rows_give_their_ids_back_and_reserved_rows_none(kind):
    vocabulary = Vocabulary(IDS[kind], num_oov_buckets=2)
    assert vocabulary.ids_of(np.arange(7)).to_pylist() == [None, None, None, *IDS[kind]]


@pytest.mark.parametrize("row", [-1, 7])
def test_rows_outside_the_table_are_refused(row):
    with pytest.raises(DataError, match=r"table rows must lie in 0\.\.6"):
        Vocabulary(IDS["numbers"], num_oov_buckets=2).ids_of(np.array([3, row]))


def test_no_ids_have_no_rows(kind):
    assert Vocabulary(IDS[kind], num_oov_buckets=1).rows_of([]).tolist() == []


def test_arrow_and_numpy_say_the_same():
    vocabulary = Vocabulary(pa.chunked_array([["a", "b"], ["c"]]), num_oov_buckets=1)
    assert vocabulary.rows_of(np.array(["c", "a"])).tolist() == [4, 2]
    assert vocabulary.rows_of(pa.array(["x", "c", "a"])[1:]).tolist() == [4, 2]
    assert Vocabulary(np.array([5, 6], np.int32), num_oov_buckets=1).rows_of(np.array([6])).tolist() == [3]


def test_what_is_saved_is_loaded_again(kind, tmp_path):
    vocabulary = Vocabulary(IDS[kind], num_oov_buckets=2)
    vocabulary.save(tmp_path)
    again = Vocabulary.load(tmp_path)
    assert again.content_hash == vocabulary.content_hash
    assert again.rows_of(IDS[kind]).tolist() == vocabulary.rows_of(IDS[kind]).tolist()


OTHERS = {
    "order": (["b", "a"], 2),
    "buckets": (["a", "b"], 3),
    "spelling": (["a", "B"], 2),
    "cut": (["ab", ""], 2),
    "type": ([1, 2], 2),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_the_content_hash_sees_what_changes_rows(other):
    assert Vocabulary(*other).content_hash != Vocabulary(["a", "b"], 2).content_hash


def test_a_broken_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"vocabulary\.parquet: must be a vocabulary"):
        Vocabulary.load(tmp_path)
    (tmp_path / VOCABULARY_FILE).write_bytes(b"PAR1 and nothing more")
    with pytest.raises(DataError, match=r"vocabulary\.parquet: must be a vocabulary"):
        Vocabulary.load(tmp_path)


NO_IDS = {
    "none": [],
    "twice": ["a", "b", "a"],
    "null": ["a", None],
    "fractions": [1.5],
    "unsigned": np.zeros(1, np.uint64),
}


@pytest.mark.parametrize("ids", NO_IDS.values(), ids=NO_IDS)
def test_what_is_no_vocabulary_is_refused(ids):
    with pytest.raises(DataError, match="must"):
        Vocabulary(ids, num_oov_buckets=1)


def test_ids_of_another_type_are_refused():
    with pytest.raises(DataError, match="raw ids must be int64 as in the vocabulary, got large_string; cast"):
        Vocabulary([1, 2], num_oov_buckets=1).rows_of(["1"])


def test_unknown_ids_need_a_bucket():
    with pytest.raises(ConfigError, match="num_oov_buckets must be at least 1, got 0"):
        Vocabulary([1], num_oov_buckets=0)
