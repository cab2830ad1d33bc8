"""A run at a glance: the table at its end, and report.html with the curves.

Both show what a run wrote (config.json, metrics.jsonl, result.json) and measure nothing, so a report can be made again
at any time. The page holds everything it needs: pictures are inline SVG, nothing is loaded.
"""

import html
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ssd_torchrec.data.schema import CUTOFFS
from ssd_torchrec.training.metrics import SELECTION_METRIC
from ssd_torchrec.training.tracking import read_metrics

METRICS = [f"{metric}@{k}" for k in CUTOFFS for metric in ("hr", "ndcg", "mrr")]
PLAIN_WIDTH = 100  # where output is collected: all columns fit, and no terminal wraps them
SPLITS = {"valid": "Validation", "test": "Test"}
JUDGES = {
    "no gate": "without_time",
    "most popular": "most_popular",
    "best blind": "attainable_without_time",
    "best": "attainable",
}
FACTS = {
    "model": "model",
    "data": "data",
    "seed": "seed",
    "epochs": "epochs",
    "best_epoch": "best epoch",
    "world_size": "processes",
    "device": "device",
    "train_events_per_s": "training events/s",
    "train_rows_per_s": "training rows/s",
    "epoch_s": "seconds an epoch",
    "peak_memory_gib": "peak memory, GiB",
    "git_commit": "commit",
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .2rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
svg { max-width: 100%; height: auto; }
pre { background: #f6f6f6; padding: 1rem; overflow: auto; }
"""


def comparison(result: Mapping[str, Any], split: str) -> tuple[list[str], list[list[str]]]:
    """One split's figures beside what they are to be judged by: column names, and a row of text for each metric.

    Args:
        result: the content of result.json. The model's figures stand under the split's name; "without_time",
            "most_popular", "attainable_without_time" and "attainable" are shown where they are known, the last one also
            as a share.
        split: "valid" or "test".

    Metrics are hit rate, NDCG and MRR at each cutoff, or whatever figures another kind of model has.
    """
    scores = {"model": result[split]}
    for name, key in JUDGES.items():
        if (known := result.get(key)) and split in known:
            scores[name] = known[split]
    best = scores.get("best")
    judged = [name for name in ("model", "no gate") if best and name in scores]
    header = ["", *scores, *(f"{name} / best" for name in judged)]
    rows = []
    for metric in METRICS if METRICS[0] in result[split] else result[split]:
        figures = [f"{score[metric]:.4f}" for score in scores.values()]
        shares = [_share(scores[name][metric], best[metric]) for name in judged] if best else []
        rows.append([metric.upper(), *figures, *shares])
    return header, rows


def print_results(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Print a table for validation and one for test, see `comparison`."""
    console = console or Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    for split, title in SPLITS.items():
        if split in result:
            header, rows = comparison(result, split)
            table = Table(title=title, box=SIMPLE, title_justify="left", pad_edge=False)
            for name in header:
                table.add_column(name, justify="right" if name else "left")
            for row in rows:
                table.add_row(*row, end_section=row[0].startswith("MRR"))
            console.print(table)


def write_report(folder: Path) -> Path:
    """Write folder/report.html from the run's config.json, metrics.jsonl and result.json; returns its path."""
    config, result = (json.loads((folder / name).read_text()) for name in ("config.json", "result.json"))
    lines = read_metrics(folder)
    title = html.escape(f"{result['model']} on {result['data']}: {folder.name}")
    facts = [[shown, _plain(result[key])] for key, shown in FACTS.items() if key in result]
    parts = [f"<h1>{title}</h1>", _table(["run", folder.name], facts)]
    for split, name in SPLITS.items():
        parts += [f"<h2>{name}</h2>", _table(*comparison(result, split))]
    parts += ["<h2>Training</h2>", _training_curve([line for line in lines if line["kind"] == "step"])]
    validations = [line for line in lines if line["kind"] == "evaluation" and line["split"] == "valid"]
    parts += ["<h2>Validation by step</h2>", _validation_curve(validations, result)]
    parts += ["<h2>Config</h2>", f"<pre>{html.escape(json.dumps(config, indent=2))}</pre>"]
    versions = [[package, _plain(version)] for package, version in result["versions"].items()]
    parts += ["<h2>Versions</h2>", _table(["package", "version"], versions)]
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    path = folder / "report.html"
    body = "\n".join(parts)
    path.write_text(f'<!doctype html><html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n')
    return path


def _share(score: float, best: float) -> str:
    return f"{100 * score / best:.0f} %" if best else "-"


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return str(value)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f"<table><tr>{head}</tr>\n{body}</table>"


def _series(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    known = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return [step for step, _ in known], [value for _, value in known]


def _training_curve(steps: Sequence[Mapping[str, Any]]) -> str:
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    loss = figure.add_subplot(xlabel="step", ylabel="loss, nats a target")
    loss.plot(*_series(steps, "loss_nats"), color="C0", linewidth=1)
    rate = loss.twinx()
    rate.set_ylabel("learning rate", color="C1")
    rate.plot(*_series(steps, "learning_rate"), color="C1", linewidth=1, linestyle="--")
    rate.set_ylim(bottom=0)
    return _svg(figure)


def _validation_curve(validations: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> str:
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    selection = result.get("selection", SELECTION_METRIC)
    axes = figure.add_subplot(xlabel="step", ylabel=selection.upper())
    axes.plot(*_series(validations, selection), marker="o", markersize=3, label="model")
    for name, style in {"best": "--", "most popular": ":"}.items():
        if known := result.get(JUDGES[name]):
            axes.axhline(known["valid"][selection], color="grey", linestyle=style, label=name)
    axes.set_ylim(bottom=0)
    axes.legend()
    return _svg(figure)


def _svg(figure: Figure) -> str:
    picture = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text stays text: small, and found by the browser's search
        figure.savefig(picture, format="svg", metadata={"Date": None})
    text = picture.getvalue()
    return text[text.index("<svg") :]
