"""A ranking data set comes back as it was written, and is refused where a model could not be given it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ssd_torchrec.data.ranking.clicks import ClicksConfig, clicks_meta, draw_clicks, generate_clicks
from ssd_torchrec.data.ranking.folder import RankingPart, RankingWriter
from ssd_torchrec.data.ranking.rows import RankingRows
from ssd_torchrec.data.ranking.schema import META_FILE, PARTS, RankingMeta
from ssd_torchrec.data.rows import Jagged
from ssd_torchrec.errors import DataError

CONFIG = ClicksConfig(num_rows=300)


def read(folder: Path, part: str) -> RankingRows:
    opened = RankingPart(folder, part)
    return RankingRows.concatenate([opened.read(group) for group in range(len(opened.group_sizes))])


def assert_same(got: RankingRows, expected: RankingRows) -> None:
    for name in ("label", "timestamp", "dense"):
        assert np.array_equal(getattr(got, name), getattr(expected, name)), name
    assert list(got.jagged) == list(expected.jagged)
    for key, jagged in expected.jagged.items():
        assert np.array_equal(got.jagged[key].values, jagged.values), key
        assert np.array_equal(got.jagged[key].offsets, jagged.offsets), key


@pytest.fixture
def folder(tmp_path) -> Path:
    generate_clicks(CONFIG, tmp_path / "clicks")
    return tmp_path / "clicks"


def test_what_was_written_comes_back_in_three_parts(folder):
    rows, _ = draw_clicks(CONFIG)
    assert_same(RankingRows.concatenate([read(folder, part) for part in PARTS]), rows)
    meta = RankingMeta.read(folder)
    assert meta.num_rows == {"train": 240, "valid": 30, "test": 30}
    assert sum(meta.num_positives.values()) == rows.label.sum()
    assert meta.longest == {"clicked": max(rows.jagged["clicked"].lengths)}
    assert meta.targets == {"clicked": "candidate"}
    assert sorted(path.name for path in folder.parent.iterdir()) == ["clicks"]


def test_a_set_of_before_there_were_targets_is_read_as_one_without(folder):
    file = folder / META_FILE
    content = json.loads(file.read_text())
    del content["targets"]
    file.write_text(json.dumps(content))
    assert RankingMeta.read(folder) == replace(RankingPart(folder, "train").meta, targets={})
    del content["histories"]
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"must be of format 1, got 1 with"):
        RankingMeta.read(folder)


@pytest.mark.parametrize("rows_per_group", [7, 100])
def test_row_groups_are_read_one_by_one(rows_per_group, tmp_path):
    rows, _ = draw_clicks(CONFIG)
    with RankingWriter(tmp_path / "set", clicks_meta(CONFIG), rows_per_group=rows_per_group) as writer:
        writer.append("train", rows.take(np.arange(120)))
        writer.append("train", rows.take(np.arange(120, 300)))
        writer.finish()
    part = RankingPart(tmp_path / "set", "train")
    assert len(part.group_sizes) > 300 // rows_per_group
    assert_same(read(tmp_path / "set", "train"), rows)


def test_a_row_becomes_a_torchrec_batch_with_times_exact_to_the_second():
    rows, _ = draw_clicks(CONFIG)
    few = rows.take(np.array([5, 2]))
    batch = few.batch()
    assert batch.dense_features.dtype == torch.float32
    assert batch.labels.tolist() == few.label.tolist()
    assert batch.sparse_features.keys() == clicks_meta(CONFIG).keys == ["segment", "candidate", "clicked", "clicked_at"]
    for key, jagged in few.jagged.items():
        of = batch.sparse_features[key]
        assert (of.values().tolist(), of.lengths().tolist()) == (jagged.values.tolist(), jagged.lengths.tolist())
    assert batch.sparse_features["clicked_at"].values().dtype == torch.int64


def test_a_set_is_replaced_whole_or_not_at_all(folder):
    before = read(folder, "train")
    rows, _ = draw_clicks(replace(CONFIG, seed=1))
    with pytest.raises(KeyError), RankingWriter(folder, clicks_meta(CONFIG)) as writer:
        write_and_fail(writer, rows)
    assert_same(read(folder, "train"), before)
    generate_clicks(replace(CONFIG, seed=1), folder)
    assert not np.array_equal(read(folder, "train").label, before.label)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["clicks"]


def write_and_fail(writer: RankingWriter, rows: RankingRows) -> None:
    writer.append("train", rows)
    raise KeyError


def test_another_folder_is_not_written_over(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match=r"mine must be a ranking data set to be replaced"):
        generate_clicks(CONFIG, tmp_path / "mine")


def changed(rows: RankingRows, key: str, value: int, at: int) -> RankingRows:
    values = rows.jagged[key].values.copy()
    values[at] = value
    return replace(rows, jagged=rows.jagged | {key: Jagged(values, rows.jagged[key].offsets)})


def with_label(rows: RankingRows) -> RankingRows:
    return replace(rows, label=np.where(np.arange(len(rows)) == 3, 2, rows.label))


def with_nan(rows: RankingRows) -> RankingRows:
    dense = rows.dense.copy()
    dense[4, 1] = np.nan
    return replace(rows, dense=dense)


def falling(rows: RankingRows) -> RankingRows:
    first = int(rows.jagged["clicked_at"].offsets[6])
    return changed(rows, "clicked_at", int(rows.jagged["clicked_at"].values[first]) - 1, first + 1)


def at_the_impression(rows: RankingRows) -> RankingRows:
    last = int(rows.jagged["clicked_at"].offsets[7]) - 1
    return changed(rows, "clicked_at", int(rows.timestamp[6]), last)


def without_a_time(rows: RankingRows) -> RankingRows:
    times = rows.jagged["clicked_at"]
    offsets = np.concatenate([times.offsets[:-1], times.offsets[-1:] - 1])
    return replace(rows, jagged=rows.jagged | {"clicked_at": Jagged(times.values[:-1], offsets)})


def with_two_shown(rows: RankingRows) -> RankingRows:
    """One in no row, two in the next."""
    shown = rows.jagged["candidate"]
    offsets = shown.offsets.copy()
    offsets[3] -= 1
    return replace(rows, jagged=rows.jagged | {"candidate": Jagged(shown.values, offsets)})


REFUSED = {
    "target": (with_two_shown, r"row 2: candidate, the target of clicked, must be one id, got 0; give each row one"),
    "label": (with_label, r"row 3: label must be 0 or 1, got 2"),
    "dense": (with_nan, r"row 4: dense_1 must be finite, got nan"),
    "bag": (lambda rows: changed(rows, "segment", 6, 8), r"row 8: segment must be ids 0..5, got 6"),
    "item": (lambda rows: changed(rows, "clicked", -1, 0), r"row 0: clicked must be ids 0..199, got -1"),
    "falling": (falling, r"row 6: times of clicked must ascend"),
    "leak": (
        at_the_impression,
        r"row 6: events of clicked must be before the impression at \d+, .* join",
    ),
    "times": (without_a_time, r"row 299: each event of clicked must have its time, got"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rows_that_no_model_may_see_are_neither_written_nor_read(name, tmp_path, monkeypatch):
    spoil, message = REFUSED[name]
    rows = spoil(draw_clicks(CONFIG)[0])
    with pytest.raises(DataError, match=message), RankingWriter(tmp_path / "set", clicks_meta(CONFIG)) as writer:
        writer.append("train", rows)
    assert not (tmp_path / "set").exists()
    with monkeypatch.context() as patch:
        patch.setattr("ssd_torchrec.data.ranking.folder.check_rows", lambda *_: None)
        with RankingWriter(tmp_path / "set", clicks_meta(CONFIG)) as writer:
            writer.append("train", rows)
            writer.finish()
    with pytest.raises(DataError, match=message):
        RankingPart(tmp_path / "set", "train").read(0)


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"has no ranking.json; make one with `ssd-torchrec prepare-ranking`"):
        RankingPart(tmp_path, "train")


DAMAGES = {
    "version": ({"format_version": 9}, r"must be of format 1, got 9"),
    "rows": ({"num_rows": {"train": 7, "valid": 30, "test": 30}}, r"must have 7 rows as ranking.json says, got 240"),
    "columns": ({"categorical": {"segment": 6}, "targets": {}}, r"must have the columns of ranking.json"),
    "twice": ({"dense": ["segment"]}, r"got \['segment'\] twice"),
    "share": ({"negative_share": 0}, r"negative_share must be above 0"),
    "empty": ({"categorical": {"segment": 0, "candidate": 200}}, r"segment must draw from at least 1 id"),
    "none": ({"histories": {}}, r"must have at least one history"),
    "target-of-no-history": ({"targets": {"read": "candidate"}}, r"\(clicked\), got candidate by read; correct"),
    "no-such-target": ({"targets": {"clicked": "item"}}, r"features \(segment, candidate\) .*, got item by clicked"),
    "target-of-other-ids": (
        {"targets": {"clicked": "segment"}},
        r"segment, the target of clicked, must draw from its 200 ids, got 6; number both by one vocabulary",
    ),
    "target-of-two": (
        {"histories": {"clicked": 200, "read": 200}, "targets": {"clicked": "candidate", "read": "candidate"}},
        r"candidate must be the target of one history, got it of several",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_description_that_does_not_fit_is_refused(name, folder):
    change, message = DAMAGES[name]
    file = folder / META_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(DataError, match=message):
        RankingPart(folder, "train")


def test_files_that_were_cut_or_hold_nulls_are_refused(folder):
    file = folder / "train.parquet"
    table = pq.read_table(file)
    at = table.schema.get_field_index("label")
    holes = table.set_column(at, table.schema.field(at), pa.array([None, *table["label"].to_pylist()[1:]], pa.int64()))
    pq.write_table(holes, file)
    with pytest.raises(DataError, match=r"row group 0: label must hold no null"):
        RankingPart(folder, "train").read(0)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match=r"train.parquet must be Parquet"):
        RankingPart(folder, "train")
