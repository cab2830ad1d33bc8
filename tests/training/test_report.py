import io
import json
from html.parser import HTMLParser

import pytest
from rich.console import Console

from ssd_torchrec.training.report import METRICS, comparison, print_results, write_report
from ssd_torchrec.training.tracking import MetricsLog


def scores(value: float) -> dict[str, float]:
    return dict.fromkeys(METRICS, value)


@pytest.fixture
def result() -> dict:
    return {
        "model": "tim4rec",
        "data": "generated <law>",
        "seed": 0,
        "epochs": 4,
        "best_epoch": 3,
        "world_size": 2,
        "device": "cpu",
        "valid": scores(0.30),
        "test": scores(0.28),
        "most_popular": {"valid": scores(0.02), "test": scores(0.03)},
        "attainable": {"valid": scores(0.40), "test": scores(0.35)},
        "train_events_per_s": 12345.6,
        "epoch_s": 3.25,
        "peak_memory_gib": 1.5,
        "versions": {"torch": "2.13.0"},
        "git_commit": "abc",
    }


def write_run(folder, result, steps=4):
    (folder / "config.json").write_text(json.dumps({"encoder": {"width": 64}}))
    (folder / "result.json").write_text(json.dumps(result))
    with MetricsLog(folder) as log:
        for step in range(1, steps + 1):
            log.step(step, {"loss_nats": 7.0 - step, "learning_rate": 1e-3})
            log.evaluation(step, "valid", scores(step / 100))


class Page(HTMLParser):
    """Tags, attributes that would load something, and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [f"{tag} {name}" for name, value in attrs if name in ("src", "href") and value]

    def handle_data(self, data):
        self.text += data + "\n"


def test_the_model_stands_beside_the_baseline_and_its_share_of_the_best(result):
    header, rows = comparison(result, "test")
    assert header == ["", "model", "most popular", "best", "model / best"]
    assert [row[0] for row in rows] == [metric.upper() for metric in METRICS]
    assert rows[0] == ["HR@10", "0.2800", "0.0300", "0.3500", "80 %"]


def test_a_run_without_the_time_gate_gets_columns_of_its_own(result):
    header, rows = comparison(result | {"without_time": {"valid": scores(0.2), "test": scores(0.14)}}, "valid")
    assert header == [
        "",
        "model",
        "no gate",
        "most popular",
        "best",
        "model / best",
        "no gate / best",
    ]
    assert rows[1] == ["NDCG@10", "0.3000", "0.2000", "0.0200", "0.4000", "75 %", "50 %"]


def test_real_data_has_no_best_to_be_compared_with(result):
    header, rows = comparison(result | {"attainable": None}, "valid")
    assert header == ["", "model", "most popular"]
    assert rows[0] == ["HR@10", "0.3000", "0.0200"]


def test_a_best_of_zero_has_no_share(result):
    _, rows = comparison(result | {"attainable": {"valid": scores(0.0)}}, "valid")
    assert rows[0][-1] == "-"


@pytest.mark.parametrize(
    "extra", [{}, {"without_time": {"valid": scores(0.2), "test": scores(0.14)}}], ids=["one", "both"]
)
def test_the_table_fits_eighty_columns_with_every_figure_whole(result, extra):
    out = io.StringIO()
    print_results(result | extra, Console(file=out, width=80))
    text = out.getvalue()
    assert "…" not in text
    assert text.count("0.2800") == text.count("0.3000") == len(METRICS)
    assert text.index("Validation") < text.index("0.3000") < text.index("Test") < text.index("0.2800")


def test_a_result_of_one_split_prints_that_split(result):
    del result["valid"]
    out = io.StringIO()
    print_results(result, Console(file=out, width=80))
    assert "Validation" not in out.getvalue()
    assert "Test" in out.getvalue()


def test_the_report_holds_curves_figures_config_and_versions_and_loads_nothing(tmp_path, result):
    write_run(tmp_path, result)
    page = Page(write_report(tmp_path).read_text())
    assert page.tags.count("svg") == 2
    assert page.loads == []
    assert "law" not in page.tags
    for expected in (
        "generated <law>",
        "12,346",
        "3.25",
        '"width": 64',
        "2.13.0",
        "NDCG@50",
        "80 %",
        "loss, nats a target",
    ):
        assert expected in page.text


def test_a_run_that_logged_nothing_still_gets_a_report(tmp_path, result):
    write_run(tmp_path, result, steps=0)
    assert Page(write_report(tmp_path).read_text()).tags.count("svg") == 2
