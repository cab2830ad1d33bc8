"""Impressions meet the histories that were known to them, and nothing of what came later."""

import errno
import os
import shutil
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pytest

from ssd_torchrec.__main__ import main
from ssd_torchrec.data.draws import uniform
from ssd_torchrec.data.prepare.log import FilesConfig
from ssd_torchrec.data.ranking.folder import RankingPart
from ssd_torchrec.data.ranking.prepare import Prepared, prepare_ranking
from ssd_torchrec.data.ranking.prepare_config import PrepareRankingConfig
from ssd_torchrec.data.ranking.rows import RankingRows
from ssd_torchrec.data.ranking.schema import PARTS, RankingMeta
from ssd_torchrec.data.values import load_values
from ssd_torchrec.data.vocabulary import Vocabulary
from ssd_torchrec.errors import ConfigError, DataError
from tests.data.prepare.logs import write

BEGIN_S = 1_600_000_000
CONFIG = PrepareRankingConfig(dense=("price", "position"), categorical=("device",), num_oov_buckets=3)


@dataclass(frozen=True)
class Drawn:
    """A log and impressions, a dict a line, in the order of their files."""

    events: list[dict[str, Any]]
    impressions: list[dict[str, Any]]


def drawn(seed: int, *, strings: bool = False, num_events: int = 900, num_impressions: int = 400) -> Drawn:
    """Few users, items and seconds, so that times tie; some users have only events or only impressions, new items
    come up late."""
    rng = np.random.default_rng(seed)

    def lines(count: int, first_user: int, last_user: int) -> list[dict[str, Any]]:
        users, seconds = rng.integers(first_user, last_user + 1, count), rng.integers(0, 300, count)
        items = rng.integers(0, 20, count) + seconds // 20
        return [
            {"user_id": f"u{u}" if strings else int(u), "item_id": f"i{i}" if strings else int(i), "timestamp": int(t)}
            for u, i, t in zip(users, items, BEGIN_S + seconds, strict=True)
        ]

    impressions = lines(num_impressions, 0, 14)
    for line in impressions:
        line |= {"label": int(rng.random() < 0.3), "price": float(np.float32(rng.normal()))}
        line |= {"position": int(rng.integers(1, 9)), "device": rng.choice(["phone", "tv", "", "desk"]).item() or None}
    return Drawn(lines(num_events, -3, 11), impressions)


def written(folder: Path, given: Drawn, suffix: str = "parquet") -> tuple[Path, Path]:
    """The files of impressions and events."""
    return table(folder / f"shown.{suffix}", given.impressions), table(folder / f"log.{suffix}", given.events)


def table(file: Path, lines: Sequence[dict[str, Any]]) -> Path:
    if file.suffix == ".jsonl":
        return write(file, list(lines))
    if file.suffix == ".csv":
        csv.write_csv(pa.Table.from_pylist(list(lines)), file)
        return file
    return write(file, pa.Table.from_pylist(list(lines)))


def prepared(folder: Path, given: Drawn, config: PrepareRankingConfig = CONFIG) -> Prepared:
    return prepare_ranking(*written(folder, given), folder / "set", config)


def read(folder: Path, part: Any) -> RankingRows:
    opened = RankingPart(folder, part)
    return RankingRows.concatenate([opened.read(group) for group in range(len(opened.group_sizes))])


def told(rows: RankingRows) -> list[tuple[Any, ...]]:
    """A tuple a row: label, time, dense values, then a list a key."""
    keys = [
        [jagged.values[a:b].tolist() for a, b in zip(jagged.offsets, jagged.offsets[1:], strict=False)]
        for jagged in rows.jagged.values()
    ]
    return list(zip(rows.label.tolist(), rows.timestamp.tolist(), map(tuple, rows.dense.tolist()), *keys, strict=True))


def every_part(folder: Path) -> dict[str, list[tuple[Any, ...]]]:
    return {part: told(read(folder, part)) for part in PARTS}


def by_hand(given: Drawn, config: PrepareRankingConfig) -> dict[str, list[tuple[Any, ...]]]:
    """What must come out, by looking at every event for every impression."""
    valid_from, test_from = config.valid_from, config.test_from
    if valid_from is None or test_from is None:
        times = sorted(line["timestamp"] for line in given.impressions)
        test = round(config.test_share * len(times))
        valid_from, test_from = times[-test - round(config.valid_share * len(times))], times[-test]
    parts: dict[str, list[tuple[int, dict[str, Any]]]] = {part: [] for part in PARTS}
    for at, line in sorted(enumerate(given.impressions), key=lambda pair: pair[1]["timestamp"]):
        part = "train" if line["timestamp"] < valid_from else "valid" if line["timestamp"] < test_from else "test"
        if part != "train" or line["label"] or float(uniform(config.seed, at)) < config.negative_share:
            parts[part].append((at, line))
    counts = Counter(event["item_id"] for event in given.events if event["timestamp"] < valid_from)
    vocabulary = Vocabulary(sorted(i for i, n in counts.items() if n >= config.min_count), config.num_oov_buckets)
    devices = sorted({line["device"] for _, line in parts["train"]} - {None})

    def row(line: dict[str, Any]) -> tuple[Any, ...]:
        history = []
        for event in given.events:
            gap_s = line["timestamp"] - event["timestamp"]
            if event["user_id"] == line["user_id"] and gap_s > 0 and gap_s >= config.delay_s:
                history.append((event["timestamp"], event["item_id"]))
        history = sorted(history, key=lambda event: event[0])[-config.max_history :]
        candidate = vocabulary.rows_of([line["item_id"]]).tolist()
        device = [1 + devices.index(line["device"]) if line["device"] in devices else 0]
        items = vocabulary.rows_of([item for _, item in history]).tolist()
        return (
            line["label"],
            line["timestamp"],
            (line["price"], line["position"]),
            candidate,
            device,
            items,
            [time for time, _ in history],
        )

    return {part: [row(line) for _, line in lines] for part, lines in parts.items()}


CASES = {
    "as-it-is": {},
    "strings": {"strings": True},
    "delay": {"delay_s": 25},
    "delay-of-a-second": {"delay_s": 1},
    "few-events": {"max_history": 3},
    "one-event": {"max_history": 1, "delay_s": 10},
    "frequent-items": {"min_count": 30, "strings": True},
    "given-times": {"valid_from": BEGIN_S + 100, "test_from": BEGIN_S + 250},
    "fewer-negatives": {"negative_share": 0.4, "seed": 7},
    "long-parts": {"valid_share": 0.3, "test_share": 0.25},
}


@pytest.mark.parametrize("name", CASES)
def test_every_row_is_that_of_a_join_by_hand(tmp_path, name):
    case = dict(CASES[name])
    given = drawn([*CASES].index(name), strings=case.pop("strings", False))
    config = replace(CONFIG, **case)
    outcome = prepared(tmp_path, given, config)
    expected = by_hand(given, config)
    assert every_part(tmp_path / "set") == expected
    first_item = 1 + config.num_oov_buckets
    for part in PARTS:
        assert outcome.meta.num_rows[part] == len(expected[part]) > 0
        assert outcome.without_events[part] == sum(not row[5] for row in expected[part])
        assert outcome.unknown[part] == sum(row[3][0] < first_item for row in expected[part])
    assert outcome.without_events["train"] > 0
    assert outcome.unknown["test"] > 0
    assert outcome.meta == RankingMeta.read(tmp_path / "set")
    assert outcome.meta.longest["history"] == max(len(row[5]) for rows in expected.values() for row in rows)
    assert outcome.meta.vocabulary == Vocabulary.load(tmp_path / "set").content_hash
    assert outcome.meta.keys == ["candidate", "device", "history", "history_at"]


SAME = {
    "csv": {"suffix": "csv"},
    "json-lines": {"suffix": "jsonl"},
    "one-thread": {"threads": 1},
    "many-threads": {"threads": 8},
    "little-memory": {"threads": 1, "memory_limit": "64MiB"},
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_files_give_the_same_rows_whatever_the_format_and_the_machine(tmp_path, name):
    given, options = drawn(2), dict(SAME[name])
    files = written(tmp_path, given, options.pop("suffix", "parquet"))
    config = replace(CONFIG, negative_share=0.5)
    columns = {"user": "user_id", "item": "item_id", "timestamp": "timestamp"}
    elsewhere = replace(config, temporary=str(tmp_path / "spilled"), log=FilesConfig(**columns), **columns, **options)
    prepare_ranking(*files, tmp_path / "set", elsewhere)
    assert every_part(tmp_path / "set") == by_hand(given, config)
    assert list((tmp_path / "spilled").iterdir()) == []


def test_a_log_in_several_files_is_read_in_the_order_of_their_names(tmp_path):
    given = drawn(3)
    for name, lines in {"shown": given.impressions, "log": given.events}.items():
        for number in (2, 0, 1):  # not the order in which they are written
            table(tmp_path / name / f"part-{number}.parquet", lines[number * 150 : (number + 1) * 150 or None])
    config = replace(CONFIG, negative_share=0.5, max_history=4)
    few = Drawn(given.events[:450], given.impressions[:450])
    prepare_ranking(tmp_path / "shown", tmp_path / "log", tmp_path / "set", config)
    assert every_part(tmp_path / "set") == by_hand(few, config)


def line(user: int, item: int, second: int, **more: Any) -> dict[str, Any]:
    return {"user_id": user, "item_id": item, "timestamp": BEGIN_S + second, **more}


PLANTED = Drawn(
    events=[line(1, 10, 5), line(1, 11, 9), line(1, 12, 10), line(1, 13, 11), line(2, 10, 10), line(1, 99, 60)],
    impressions=[
        line(1, 13, 10, label=1, device="tv"),
        line(2, 10, 10, label=0, device=None),
        line(3, 10, 11, label=0, device="phone"),
        line(1, 11, 50, label=1, device="tv"),
        line(1, 99, 70, label=0, device="watch"),
    ],
)
PLAIN = PrepareRankingConfig(categorical=("device",), valid_from=BEGIN_S + 50, test_from=BEGIN_S + 70)


def test_events_of_the_very_second_and_later_ones_are_not_let_in(tmp_path):
    prepared(tmp_path, PLANTED, PLAIN)
    row = Vocabulary.load(tmp_path / "set").rows_of
    parts = every_part(tmp_path / "set")
    assert [history for *_, history, _ in parts["train"]] == [row([10, 11]).tolist(), [], []]
    assert [times for *_, times in parts["train"]] == [[BEGIN_S + 5, BEGIN_S + 9], [], []]
    assert parts["valid"][0][-2] == row([10, 11, 12, 13]).tolist()
    prepared(tmp_path, PLANTED, replace(PLAIN, delay_s=5))
    assert [times for *_, times in every_part(tmp_path / "set")["train"]] == [[BEGIN_S + 5], [], []]


def test_what_comes_up_after_validation_begins_has_no_id_of_its_own(tmp_path):
    meta = prepared(tmp_path, PLANTED, PLAIN).meta
    vocabulary = Vocabulary.load(tmp_path / "set")
    assert vocabulary.ids.to_pylist() == [10, 11, 12, 13]
    assert meta.categorical == {"candidate": 17 + 4, "device": 3}
    assert meta.histories == {"history": 17 + 4}
    assert load_values(tmp_path / "set")["device"].to_pylist() == [None, "phone", "tv"]
    parts = every_part(tmp_path / "set")
    assert [device for *_, device, _, _ in parts["train"]] == [[2], [0], [1]]
    (test,) = parts["test"]
    assert test[3] == test[5][-1:] == vocabulary.buckets_of([99]).tolist()
    assert test[4] == [0]


def test_validation_does_not_count_from_its_first_second_on(tmp_path):
    config = replace(PLAIN, valid_from=BEGIN_S + 11, test_from=BEGIN_S + 60)
    prepared(tmp_path, PLANTED, config)
    assert Vocabulary.load(tmp_path / "set").ids.to_pylist() == [10, 11, 12]
    assert load_values(tmp_path / "set")["device"].to_pylist() == [None, "tv"]


@pytest.mark.parametrize("tied", [0, 8, 12])
def test_impressions_of_one_second_stay_in_one_part(tmp_path, tied):
    seconds = [second - second % 4 if second < tied else second for second in range(20)]
    shown = [line(1, 1, 100 + second, label=0) for second in reversed(seconds)]
    config = PrepareRankingConfig(valid_share=0.5, test_share=0.15)
    meta = prepared(tmp_path, Drawn([line(1, 1, 0)], shown), config).meta
    parts = [[row[1] - BEGIN_S - 100 for row in rows] for rows in every_part(tmp_path / "set").values()]
    valid_from = seconds[7]
    assert parts == [
        seconds[: bisect_left(seconds, valid_from)],
        seconds[bisect_left(seconds, valid_from) : 17],
        seconds[17:],
    ]
    assert sum(meta.num_rows.values()) == 20


def test_fewer_negatives_leave_positives_and_the_other_parts_whole(tmp_path):
    given = drawn(4, num_impressions=2000)
    prepared(tmp_path, given)
    whole = every_part(tmp_path / "set")
    kept = {}
    for seed in (0, 1):
        meta = prepared(tmp_path, given, replace(CONFIG, negative_share=0.25, seed=seed)).meta
        parts = every_part(tmp_path / "set")
        assert (meta.negative_share, parts["valid"], parts["test"]) == (0.25, whole["valid"], whole["test"])
        assert [row for row in parts["train"] if row[0]] == [row for row in whole["train"] if row[0]]
        kept[seed] = [row for row in parts["train"] if not row[0]]
        negatives = [row for row in whole["train"] if not row[0]]
        assert abs(len(kept[seed]) - 0.25 * len(negatives)) < 4 * (len(negatives) * 0.25 * 0.75) ** 0.5
        assert set(map(repr, kept[seed])) <= set(map(repr, negatives))
    assert kept[0] != kept[1]


def test_dense_values_are_filled_in_where_that_is_asked(tmp_path):
    holes = [None, "", "nan", "1.5", "-2e3"]
    lines = [line(1, 1, 10 + at, label="true", price=holes[at % 5]) for at in range(20)]
    table(tmp_path / "log.csv", [line(1, 1, 0)])
    table(tmp_path / "shown.jsonl", lines)
    config = PrepareRankingConfig(
        dense=("price",), fill_dense=-1, user="user_id", item="item_id", timestamp="timestamp"
    )
    prepare_ranking(tmp_path / "shown.jsonl", tmp_path / "log.csv", tmp_path / "set", config)
    assert read(tmp_path / "set", "train").dense[:5, 0].tolist() == [-1, -1, -1, 1.5, -2000]


def test_a_set_needs_neither_dense_nor_further_categorical_columns(tmp_path):
    config = PrepareRankingConfig(history="bought", name="shop")
    meta = prepared(tmp_path, drawn(5), config).meta
    assert meta.targets == {"bought": "candidate"}
    assert (meta.name, meta.dense, list(meta.categorical), list(meta.histories)) == (
        "shop",
        [],
        ["candidate"],
        ["bought"],
    )
    rows = read(tmp_path / "set", "test")
    assert rows.take(np.arange(len(rows))).batch().sparse_features.keys() == ["candidate", "bought", "bought_at"]
    assert sorted(file.name for file in (tmp_path / "set").iterdir()) == [
        "ranking.json", "test.parquet", "train.parquet", "valid.parquet", "vocabulary.parquet",
    ]  # fmt: skip


def test_long_histories_come_in_smaller_blocks(tmp_path, monkeypatch):
    given = drawn(6)
    monkeypatch.setattr("ssd_torchrec.data.ranking.joined._EVENTS_AT_ONCE", 500)
    prepared(tmp_path, given)
    assert len(RankingPart(tmp_path / "set", "train").group_sizes) > 10
    assert every_part(tmp_path / "set") == by_hand(given, CONFIG)


USUAL = {"user_id": [1] * 20, "item_id": [1] * 20, "timestamp": [BEGIN_S + 1 + n for n in range(20)]}
USUAL |= {"label": [0, 1] * 10, "price": [0.5] * 20, "device": ["tv"] * 20}
LOG = {"user_id": [1, 2], "item_id": [1, 2], "timestamp": [BEGIN_S] * 2}
REFUSING = PrepareRankingConfig(dense=("price",), categorical=("device",))


def third(value: Any) -> list[Any]:
    return [USUAL["timestamp"][n] if value == "time" else value if n == 3 else 1 for n in range(20)]


SHOWN = r"shown.parquet, row group 1, row 1: "
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    "label": ({"label": third(2)}, {}, {}, SHOWN + r"label must be 0 or 1, got '2'; correct it, or name another"),
    "no-label": ({"label": third(None)}, {}, {}, SHOWN + r"label must be 0 or 1, got nothing"),
    "nan-label": ({"label": third(float("nan"))}, {}, {}, r"label must be 0 or 1, got 'nan'"),
    "half-a-label": ({"label": third(0.5)}, {}, {}, r"label must be 0 or 1, got '0.5'"),
    "no-column": ({"label": None}, {}, {}, r"shown.parquet: must have a column label, got user_id, item_id, .*"),
    "missing": ({"price": third(None)}, {}, {}, SHOWN + r"price must not be missing, got nothing; fill it in, or"),
    "nan": ({"price": third(float("nan"))}, {}, {}, SHOWN + r"price must not be missing, got 'nan'"),
    "infinite": ({"price": third(float("inf"))}, {}, {}, SHOWN + r"price must be a finite number of .*'inf'"),
    "too-large": ({"price": third(1e300)}, {}, {"fill_dense": 0}, SHOWN + r"price must be a finite number of float32"),
    "word": ({"price": ["a", *"1234567890123456789"]}, {}, {}, r"row group 0, row 0: price must be a finite"),
    "bag": ({"device": [["a"]] * 20}, {}, {}, r"shown.parquet: device must hold one value a row, got list"),
    "dense-bag": ({"price": [["a"]] * 20}, {}, {}, r"shown.parquet: price must be numbers, got list"),
    "users": ({"user_id": ["a"] * 20}, {}, {}, r"row 0: user_id must be whole numbers as in the log, got 'a'"),
    "items": ({}, {"item_id": ["1", "2"]}, {}, r"shown.parquet, .* item_id must be strings as in the log, got '1'"),
    "time": ({"timestamp": third(7)}, {}, {}, r"timestamp must fall into 1980..2100"),
    "log": ({}, {"timestamp": [BEGIN_S, None]}, {}, r"log.parquet, row group 0, row 1: timestamp must not be null"),
    "no-test": ({}, {}, {"valid_from": BEGIN_S + 9, "test_from": BEGIN_S + 99}, r"shown.parquet: each part must hold"),
    "one-second": ({"timestamp": [BEGIN_S + 9] * 20}, {}, {}, r"each part must hold .* {'train': 0, .*'test': 20}"),
    "late-log": ({}, {"timestamp": [BEGIN_S + 50] * 2}, {}, r"log.parquet: some item must have 1 events .*, none has"),
    "rare": ({}, {}, {"min_count": 2}, r"log.parquet: some item must have 2 events before validation begins"),
    "no-value": ({"device": [None] * 16 + ["tv"] * 4}, {}, {}, r"shown.parquet: device must hold a value for some"),
}  # fmt: skip


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """The set of what is not refused."""
    folder = tmp_path_factory.mktemp("usual")
    files = [write(folder / f"{name}.parquet", pa.table(columns)) for name, columns in {"a": USUAL, "b": LOG}.items()]
    prepare_ranking(*files, folder / "set", REFUSING)
    return folder / "set"


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_joined_is_refused_and_leaves_the_old_set(tmp_path, usual, name):
    shown, log, options, message = REFUSED[name]
    files = [tmp_path / "files" / "shown.parquet", tmp_path / "files" / "log.parquet"]
    shutil.copytree(usual, tmp_path / "set")
    for file, columns in zip(files, (USUAL | shown, LOG | log), strict=True):
        write(file, pa.table({name: values for name, values in columns.items() if values is not None}))
    with pytest.raises(DataError, match=message):
        prepare_ranking(*files, tmp_path / "set", replace(REFUSING, **options))
    assert every_part(tmp_path / "set") == every_part(usual)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["files", "set"]


IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "history": ({"max_history": 0}, "max_history must be at least 1, got 0"),
    "delay": ({"delay_s": -1}, "delay_s must be at least 0, got -1"),
    "buckets": ({"num_oov_buckets": 0}, "num_oov_buckets must be at least 1, got 0"),
    "share": ({"negative_share": 0.0}, "negative_share must be above 0 and at most 1, got 0.0"),
    "parts": ({"valid_share": 0.5, "test_share": 0.5}, "valid_share and test_share must be above 0 and leave"),
    "no-part": ({"test_share": 0.0}, "valid_share and test_share must be above 0"),
    "one-time": ({"valid_from": 5}, "valid_from must be before test_from, got 5 and None; give both or neither"),
    "turned": ({"valid_from": 5, "test_from": 5}, "valid_from must be before test_from"),
    "both": ({"valid_from": 5, "test_from": 6, "test_share": 0.2}, "valid_share and test_share must be left out where"),
    "taken": ({"dense": ("candidate",)}, r"must differ from each other and from .*, got \['candidate'\] twice"),
    "twice": ({"dense": ("price",), "categorical": ("price",)}, r"got \['price'\] twice"),
    "times": ({"categorical": ("history_at",)}, r"got \['history_at'\] twice"),
    "fill": ({"dense": (), "fill_dense": 0.0}, "fill_dense must be a finite number for the columns of --dense"),
    "nothing": ({"fill_dense": float("nan")}, "fill_dense must be a finite number"),
    "memory": ({"memory_limit": "2 gigs"}, "memory_limit must be a number and its unit, got '2 gigs'"),
    "threads": ({"threads": -2}, "threads must be at least 0, got -2"),
    "columns": ({"columns": ("a", "a")}, r"columns must differ from each other"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_settings_that_cannot_be_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **change)


def test_another_folder_is_refused_before_the_files_are_read(tmp_path):
    (tmp_path / "letters").mkdir()
    with pytest.raises(DataError, match=r"letters must be a ranking data set to be replaced"):
        prepare_ranking(tmp_path / "none.csv", tmp_path / "none.csv", tmp_path / "letters", CONFIG)
    with pytest.raises(DataError, match=r"none.csv must be a file or folder, there is none"):
        prepare_ranking(tmp_path / "none.csv", tmp_path / "none.csv", tmp_path / "set", CONFIG)


def test_a_disk_that_fills_while_rows_are_written_leaves_the_old_set(tmp_path, monkeypatch):
    files = written(tmp_path, drawn(7))
    prepare_ranking(*files, tmp_path / "set", CONFIG)
    kept = every_part(tmp_path / "set")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for place in ("pyarrow.parquet.ParquetWriter.write_table", "ssd_torchrec.data.ranking.prepare.save_values"):
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            with pytest.raises(DataError, match=r"must take what prepare writes, but .*No space left on device"):
                prepare_ranking(*files, tmp_path / "set", replace(CONFIG, max_history=2))
        assert every_part(tmp_path / "set") == kept
        assert sorted(path.name for path in tmp_path.iterdir()) == ["log.parquet", "set", "shown.parquet"]


def test_memory_that_does_not_suffice_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"memory_limit must suffice for this log, 1MiB did not"):
        prepared(tmp_path, drawn(0), replace(CONFIG, memory_limit="1MiB"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.parquet", "shown.parquet"]


def test_the_command_tells_what_it_made(tmp_path, capsys):
    given = drawn(8)
    renamed = [{"who" if name == "user_id" else name: value for name, value in event.items()} for event in given.events]
    shown, log = table(tmp_path / "shown.csv", given.impressions), table(tmp_path / "log.csv", renamed)
    words = ["prepare-ranking", str(shown), "--events", str(log), "--output", str(tmp_path / "set")]
    words += ["--log.user", "who", "--dense", "price", "position", "--categorical", "device", "--num-oov-buckets", "3"]
    assert main(words) == 0
    lines = [words.split() for words in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["users", "items", "interactions", "seconds"]
    assert [words[0] for words in lines[1:4]] == ["log", "impressions", "histories"]
    assert [words[0] for words in lines[6:9]] == [*PARTS]
    assert lines[6][1] == f"{RankingMeta.read(tmp_path / 'set').num_rows['train']}"
    assert every_part(tmp_path / "set") == by_hand(given, CONFIG)
    assert main([*words, "--label", "taken"]) == 2
    assert "shown.csv: must have a column taken" in capsys.readouterr().err
