import io
from dataclasses import replace

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from ssd_torchrec.__main__ import main
from ssd_torchrec.data.inspect import Inspection, duration, facts, figure, inspect_dataset
from ssd_torchrec.data.rows import Rows
from ssd_torchrec.data.writer import DatasetWriter
from ssd_torchrec.errors import ConfigError, DataError
from tests.data.samples import NUM_SEGMENTS, VOCABULARY, dataset, random_rows, rows_of, write

LENGTHS = [5, 12, 0, 30, 45, 1, 7, 22, 3, 2, 4, 18]


def printed(folder, plot=None) -> str:
    console = Console(file=io.StringIO())
    inspect_dataset(folder, plot, console)
    return console.file.getvalue()


def test_counts_and_spreads_are_those_of_the_rows(tmp_path):
    rows = random_rows(LENGTHS)
    write(tmp_path / "set", rows)
    inspection = Inspection.of(tmp_path / "set")
    gaps = [gap for a, b in zip(rows.offsets, rows.offsets[1:], strict=False) for gap in np.diff(rows.timestamp[a:b])]
    assert (inspection.lengths.count, inspection.lengths.mean) == (len(LENGTHS), np.mean(LENGTHS))
    assert (inspection.gaps_s.count, inspection.gaps_s.mean) == (len(gaps), np.mean(gaps))
    assert inspection.lengths.summary() == inspection.histories.meta.lengths
    assert inspection.gaps_s.summary() == inspection.histories.meta.gaps_s


def test_facts_say_what_is_there(tmp_path):
    histories = dataset(tmp_path / "set", random_rows(LENGTHS))
    said = dict(map(tuple, facts(Inspection.of(tmp_path / "set"))))
    assert said["data set"] == f"sample, format {histories.meta.format_version}"
    assert (said["users"], said["items"], said["events"]) == (
        "12, called by whole numbers",
        "50 and 2 rows for unknown ones",
        "149",
    )
    assert said["density"] == "24.833% events a user and item"
    assert said["context columns"] == "segment of 4 values"
    assert said["event columns"] == "none"
    assert said["leave-one-out"] == "119 training targets, 9 validation and 10 test targets"
    assert said["too short"] == "4 users train nothing, 3 users have no validation target, 2 users have no test target"
    assert said["fingerprint"] == histories.fingerprint


def test_event_columns_are_listed(tmp_path):
    rows = replace(random_rows([3, 2]), event_columns={"device": np.array([0, 1, 2, 1, 1])})
    known = {"context": {"segment": NUM_SEGMENTS}, "event_columns": {"device": 3}}
    with DatasetWriter(tmp_path / "set", name="sample", vocabulary=VOCABULARY, **known) as writer:
        writer.append(rows)
        writer.finish()
    assert ["event columns", "device of 3 ids"] in facts(Inspection.of(tmp_path / "set"))


def test_everything_is_printed_within_the_width(tmp_path):
    write(tmp_path / "set", random_rows(LENGTHS))
    shown = printed(tmp_path / "set")
    for part in ("users-00000.parquet", "meta.json", "vocabulary.parquet", "p99", "events of a user", "█"):
        assert part in shown
    assert max(map(len, shown.splitlines())) <= 100
    assert "best that the data permits" not in shown


def test_best_scores_are_shown_where_they_are_known(tmp_path):
    scores = {"valid": {"hr@10": 0.5}, "test": {"hr@10": 0.25}}
    with DatasetWriter(tmp_path / "set", name="sample", vocabulary=VOCABULARY, context={"segment": 4}) as writer:
        writer.append(random_rows([4]))
        writer.finish(attainable=scores)
    lines = printed(tmp_path / "set").splitlines()
    best = next(at for at, line in enumerate(lines) if "best that the data permits" in line)
    assert lines[best + 2].split() == ["with", "time,", "valid", "with", "time,", "test"]
    assert lines[best + 4].split() == ["HR@10", "0.5000", "0.2500"]


@pytest.mark.parametrize(
    "rows",
    [rows_of([]), rows_of([[], []]), rows_of([[5], [6]]), rows_of([[5, 6]], [[7, 7]]), random_rows(LENGTHS)],
    ids=["no-rows", "only-empty-rows", "no-gaps", "only-gaps-of-0", "many"],
)
def test_every_data_set_has_a_text_and_a_figure(rows: Rows, tmp_path):
    write(tmp_path / "set", rows)
    assert f"{rows.num_events} " in printed(tmp_path / "set", tmp_path / "plot.png")
    assert matplotlib.image.imread(tmp_path / "plot.png").std() > 0


def test_area_of_the_drawn_bars_is_the_number_of_users(tmp_path):
    write(tmp_path / "set", random_rows(LENGTHS))
    lengths, _ = figure(Inspection.of(tmp_path / "set")).axes
    (stairs,) = lengths.patches
    values, edges, _ = stairs.get_data()
    assert (values * np.diff(np.log2(edges))).sum() == pytest.approx(sum(length > 0 for length in LENGTHS))
    assert lengths.get_xlabel().endswith("(and 1 of 0)")


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0 s"), (59, "59 s"), (60, "1 min"), (5400, "1.5 h"), (86_400 * 9.126, "9.13 d"), (31_557_600 * 12, "12 y")],
)
def test_durations_are_told_in_the_unit_that_fits(seconds, shown):
    assert duration(seconds) == shown


@pytest.mark.parametrize("plot", ["plot.xyz", "plot", "none/plot.png"])
def test_a_figure_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path, plot):
    with pytest.raises(ConfigError, match=r"must end in one of \.png, \.svg, \.pdf and lie in a folder that is there"):
        inspect_dataset(tmp_path / "no data set", tmp_path / plot)


def test_what_is_no_data_set_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"meta\.json"):
        inspect_dataset(tmp_path)


def test_the_command_prints_and_draws(tmp_path, capsys):
    write(tmp_path / "set", random_rows(LENGTHS))
    assert main(["inspect", str(tmp_path / "set"), "--plot", str(tmp_path / "plot.svg")]) == 0
    assert "149" in capsys.readouterr().out
    assert (tmp_path / "plot.svg").stat().st_size > 0
