"""The tables of a file of rows."""

from collections.abc import Callable, Iterable

import torch
import triton

from benchmarks.ops_on_gpu.clock import HELD_MS
from benchmarks.ops_on_gpu.rows import Row, Rows

PASSES = {"forward": "forward", "both_ways": "forward and backward"}


def tables(rows: Rows, gpu: str) -> str:
    measured = [row for row in rows if "contender" in row and "what" not in row]
    checks = [row for row in rows if "what" in row]
    copied = rows["copy"]["bytes_per_s"] if "copy" in rows else float("nan")
    parts = [
        f"# Operators on {gpu}\n",
        "Printed by `python -m benchmarks.ops`, from the rows of the file beside it.",
        f"torch {torch.__version__}, triton {triton.__version__}. A large copy within the device moves "
        f"{copied / 2**30:,.0f} GiB/s, read and written together.\n",
        "Times are medians of the device's time, from a call's first kernel to its last, the cache cold: ours in ms, "
        "the others' as multiples of ours. GiB/s counts the bytes that any kernel must at least read and write; "
        "behind it the share of the copy's. Every contender was held against the definition in fp64 first, at the end; "
        "those that are wrong or fail are named below their table. Of the chunks of mamba-ssm the better ones stand.",
        "Peers tuned themselves on the most events of their table, over their own configurations but for those whose "
        "tile a smaller one covers; that is not in their times, nor is packing. What they flip to go backwards is. "
        f"*host*: its launches took over {HELD_MS:.0f} ms to enqueue, and the device waited for them.\n",
    ]
    for op in dict.fromkeys(row["op"] for row in measured):
        of_op = [row for row in measured if row["op"] == op]
        if op == "item_softmax":
            parts += _softmax(of_op)
            continue
        for direction in dict.fromkeys(row["direction"] for row in of_op):
            chosen = [row for row in of_op if row["direction"] == direction]
            for timing, title in PASSES.items():
                parts.append(_times(f"{op}, {direction}, {title}", chosen, timing))
            parts.append(_calls(f"{op}, {direction}: what a caller waits, forward and backward", chosen))
            parts.append(_failures(chosen))
    parts.append(_accuracy(checks))
    return "\n".join(part for part in parts if part)


def _lines(rows: Iterable[Row]) -> dict[tuple[str, ...], dict[str, Row]]:
    """By dtype, sizes and rows: each contender's row, the better one of those that differ in their chunks only."""
    lines: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        line = lines.setdefault((row["dtype"], row["sizes"], row["rows"]), {})
        name = "mamba-ssm" if row["contender"].startswith("mamba-ssm, chunks") else row["contender"]
        if name not in line or _both_ms(row) < _both_ms(line[name]):
            line[name] = row
    return lines


def _both_ms(row: Row) -> float:
    return float("inf") if "error" in row else row["both_ways"]["device_ms"]


def _names(lines: dict[tuple[str, ...], dict[str, Row]]) -> list[str]:
    names = dict.fromkeys(name for line in lines.values() for name in line)
    return [name for name in names if name != "ours"]


def _table(title: str, head: list[str], lines: Iterable[list[str]]) -> str:
    rule = "|---" * len(head) + "|"
    rows = ["| " + " | ".join(cells) + " |" for cells in lines]
    return "\n".join([f"## {title}\n", "| " + " | ".join(head) + " |", rule, *rows]) + "\n"


def _cell(row: Row | None, text: Callable[[Row], str]) -> str:
    if row is None:
        return ""
    if "error" not in row:
        return text(row)
    return {"out of": "memory", "wrong:": "wrong"}.get(row["error"][:6], "fails")


def _times(title: str, rows: list[Row], timing: str) -> str:
    lines = _lines(rows)
    names = _names(lines)

    def our_own(row: Row) -> str:
        time = row[timing]
        speed = f"{time['bytes_per_s'] / 2**30:,.0f} ({100 * time['of_copy']:.0f} %)"
        return f"{time['device_ms']:.4f} | {time['ns_per_event']:.3f} | {speed}"

    def compared(row: Row, line: dict[str, Row]) -> str:
        ours = line.get("ours", row)
        if _host_was_late(row[timing]):
            return "host"
        time_ms = row[timing]["device_ms"]
        return f"{time_ms:.3f} ms" if "error" in ours else f"{time_ms / ours[timing]['device_ms']:.2f}x"

    def cells(key: tuple[str, ...], line: dict[str, Row]) -> list[str]:
        ours = _cell(line.get("ours"), our_own)
        ours = ours if "|" in ours else f"{ours} | |"
        return [*key, ours, *(_cell(line.get(name), lambda row: compared(row, line)) for name in names)]

    head = ["", "", "", "ours, ms", "ns an event", "GiB/s", *names]
    return _table(title, head, (cells(key, line) for key, line in lines.items()))


def _host_was_late(time: dict[str, float]) -> bool:
    """Whether launches took longer to enqueue than the device was held back: its time is then the host's."""
    return time["call_ms"] > HELD_MS and time["device_ms"] < 0.8 * time["call_ms"]


def _calls(title: str, rows: list[Row]) -> str:
    lines = _lines(rows)
    names = ["ours", *_names(lines)]
    text = "{:.3f}".format
    body = (
        [*key, *(_cell(line.get(name), lambda row: text(row["both_ways"]["call_ms"])) for name in names)]
        for key, line in lines.items()
    )
    return _table(f"{title}, ms", ["", "", "", *names], body)


def _softmax(rows: list[Row]) -> list[str]:
    lines: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        lines.setdefault((row["dtype"], row["rows"], f"{row['items']:,} items"), {})[row["contender"]] = row
    names = ["ours", *_names(lines)]

    def of(timing: str) -> Callable[[Row], str]:
        products = 1 if timing == "forward" else 3

        def text(row: Row) -> str:
            width = int(row["sizes"].split()[0])
            flop = 2 * products * row["events"] * row["items"] * width
            time_ms = row[timing]["device_ms"]
            return f"{time_ms:.3f} ({1e-9 * flop / time_ms:.0f})"

        return text

    def mib(row: Row) -> str:
        return f"{row['beyond_gradients_bytes'] / 2**20:,.1f}"

    texts = {
        f"item_softmax, {title}, ms (TFLOP/s of {'one product' if timing == 'forward' else 'three products'})": of(
            timing
        )
        for timing, title in PASSES.items()
    }
    texts["item_softmax, MiB beyond inputs and gradients"] = mib
    made = [
        _table(
            title,
            ["", "", "", *names],
            ([*key, *(_cell(line.get(name), text) for name in names)] for key, line in lines.items()),
        )
        for title, text in texts.items()
    ]
    return [*made, _failures(rows)]


def _failures(rows: list[Row]) -> str:
    told = dict.fromkeys(f"- {row['contender']}, {row['dtype']}: {row['error']}" for row in rows if "error" in row)
    return "\n".join(told) + "\n" if told else ""


def _accuracy(checks: list[Row]) -> str:
    def text(row: Row) -> str:
        if "error" in row:
            return row["error"]
        errors = dict(row["errors"])
        output = errors.pop("output")
        worst = max(errors, key=lambda name: errors[name])
        return f"{output:.1e}; {worst} {errors[worst]:.1e}"

    head = ["", "", "", "output; worst gradient"]
    body = ([row["op"], row["what"].replace(" | ", ", "), row["contender"], text(row)] for row in checks)
    return _table("Error against the definition in fp64, root mean square over that of the truth", head, body)
