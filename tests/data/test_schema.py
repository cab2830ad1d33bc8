import json
from dataclasses import asdict, replace

import pytest

from ssd_torchrec.data.schema import META_FILE, DatasetMeta, is_outdated
from ssd_torchrec.errors import DataError

META = DatasetMeta(
    name="shop",
    num_users=3,
    num_events=20,
    num_items=7,
    num_oov_buckets=2,
    item_vocabulary_hash="ab",
    raw_user_type="string",
    context={"segment": 4},
    event_columns={"price": 9},
    values_hash="ef",
    lengths={"min": 1.0, "mean": 6.5},
    gaps_s={"min": 0.0},
    attainable={"valid": {"hr@10": 0.5}},
    fingerprint="cd",
)


def test_what_is_written_is_read_again(tmp_path):
    META.write(tmp_path)
    assert DatasetMeta.read(tmp_path) == META


def test_table_rows_are_mask_then_buckets_then_items():
    assert META.first_item == 3
    assert META.num_table_rows == 10


def test_a_newer_format_is_refused_before_anything_else(tmp_path):
    (tmp_path / META_FILE).write_text(json.dumps({"format_version": 3, "colour": "red"}))
    with pytest.raises(DataError, match=r"meta\.json: format_version must be at most 2, got 3; upgrade"):
        DatasetMeta.read(tmp_path)
    assert not is_outdated(tmp_path)


def test_an_older_format_is_refused_with_the_way_out(tmp_path):
    (tmp_path / META_FILE).write_text(json.dumps({"format_version": 1, "event_columns": []}))
    with pytest.raises(
        DataError, match=r"must be 2, got 1 of an older ssd-torchrec; prepare the data set again, or gen"
    ):
        DatasetMeta.read(tmp_path)
    assert is_outdated(tmp_path)
    META.write(tmp_path)
    assert not is_outdated(tmp_path)
    assert not is_outdated(tmp_path / "nowhere")


@pytest.mark.parametrize("key", sorted(asdict(META)))
def test_a_missing_key_is_named(tmp_path, key):
    content = asdict(META)
    del content[key]
    (tmp_path / META_FILE).write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"missing \['{key}'\].*prepare the data set again"):
        DatasetMeta.read(tmp_path)


def test_an_unknown_key_is_named(tmp_path):
    (tmp_path / META_FILE).write_text(json.dumps({**asdict(META), "colour": "red"}))
    with pytest.raises(DataError, match=r"unknown \['colour'\]"):
        DatasetMeta.read(tmp_path)


WRONG = {
    "format_version": "1",
    "name": 3,
    "num_users": 2.5,
    "num_events": None,
    "num_items": True,
    "num_oov_buckets": "2",
    "item_vocabulary_hash": None,
    "raw_user_type": "int32",
    "context": {"segment": "many"},
    "event_columns": ["price"],
    "values_hash": None,
    "lengths": {"min": "short"},
    "gaps_s": {"min": True},
    "attainable": {"valid": {"hr@10": "high"}},
    "attainable_without_time": [1],
    "fingerprint": 5,
}


@pytest.mark.parametrize("key", WRONG)
def test_a_value_of_another_type_is_named(tmp_path, key):
    (tmp_path / META_FILE).write_text(json.dumps({**asdict(META), key: WRONG[key]}))
    with pytest.raises(DataError, match=rf"meta\.json: {key} must be .*, got "):
        DatasetMeta.read(tmp_path)


CONTRADICTIONS = {
    "no-items": {"num_items": 0},
    "no-buckets": {"num_oov_buckets": 0},
    "fewer-than-no-users": {"num_users": -1},
    "context-without-values": {"context": {"segment": 0}},
    "event-column-without-values": {"event_columns": {"price": 0}},
    "reserved-context": {"context": {"candidate": 4}},
    "reserved-event-column": {"event_columns": {"item": 3}},
    "column-of-both-kinds": {"event_columns": {"segment": 3}},
}


@pytest.mark.parametrize("change", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_what_contradicts_itself_is_refused(tmp_path, change):
    with pytest.raises(DataError, match="must"):
        replace(META, **change)
    (tmp_path / META_FILE).write_text(json.dumps({**asdict(META), **change}))
    with pytest.raises(DataError, match=r"meta\.json: "):
        DatasetMeta.read(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", ""], ids=["cut-short", "a-list", "empty"])
def test_what_is_no_json_object_is_refused(tmp_path, text):
    (tmp_path / META_FILE).write_text(text)
    with pytest.raises(DataError, match=r"meta\.json: must be"):
        DatasetMeta.read(tmp_path)


def test_a_folder_without_meta_is_no_data_set(tmp_path):
    with pytest.raises(DataError, match=r"must be a data set, but has no meta\.json; make one with"):
        DatasetMeta.read(tmp_path / "nowhere")
