"""How fast the operators are on one CPU thread, forward and backward, against what one would write without them.

`benchmarks/ops.py` runs it where there is no GPU: a few minutes.

Every variant of a line runs once a round, in turn and after a run that is not counted, so that a busy machine slows all
of them alike; the table gives medians of the processor time.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import processor
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.ops.gated_norm import gated_norm
from ssd_torchrec.ops.item_softmax import item_softmax
from ssd_torchrec.ops.short_conv import short_conv, short_conv_definition
from ssd_torchrec.ops.ssd_scan import ssd_scan, ssd_scan_chunked, ssd_scan_definition

ROUNDS = 7
ROWS = 128
LENGTHS = {9: (5, 4), 47: (5, 43), 165: (20, 400)}  # mean: shortest row, scale of an exponential beyond it; 200 at most
HEADS, CHANNELS, STATE, CONV_CHANNELS, TAPS, WIDTH = 4, 32, 32, 192, 4, 64

Variants = dict[str, Callable[[], object]]


def row_lengths(mean: int) -> Tensor:
    shortest, scale = LENGTHS[mean]
    beyond = -torch.rand(ROWS, generator=torch.Generator().manual_seed(0)).log() * scale
    return (shortest + beyond).long().clamp(max=200)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


def both_ways(outputs: Callable[[], Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    """Forward and backward, with a cotangent made beforehand."""
    cotangent = torch.randn_like(outputs())
    return lambda: torch.autograd.grad(outputs(), inputs, cotangent)


def padded_dual(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, lengths: Tensor) -> Tensor:
    """The scan as one masked product over rows padded to the longest."""
    here = torch.arange(int(lengths.max())) < lengths[:, None]  # (B, L)

    def pad(events: Tensor) -> Tensor:
        return events.new_zeros(*here.shape, *events.shape[1:]).index_put((here,), events)

    delta = pad(F.softplus(dt)).transpose(1, 2)  # (B, H, L)
    total = (delta * A[:, None]).cumsum(-1)
    decay = (total[..., None] - total[..., None, :]).clamp(max=0).exp().tril()
    product = (pad(C[:, 0]) @ pad(B[:, 0]).mT)[:, None]
    y = (product * decay * delta[..., None, :]) @ pad(x).transpose(1, 2)
    return y.transpose(1, 2)[here]


def scan_variants(mean: int) -> tuple[int, Variants]:
    lengths = row_lengths(mean)
    layout, events = JaggedLayout.from_lengths(lengths), int(lengths.sum())
    A = (-2 * torch.rand(HEADS) - 0.05).requires_grad_()
    inputs = [
        normal(events, HEADS, CHANNELS),
        normal(events, HEADS),
        A,
        normal(events, 1, STATE),
        normal(events, 1, STATE),
    ]
    return events, {
        "ours": both_ways(lambda: ssd_scan(*inputs, layout), inputs),
        "chunks of 16": both_ways(lambda: ssd_scan_chunked(*inputs, layout, chunk=16), inputs),
        "chunks of 32": both_ways(lambda: ssd_scan_chunked(*inputs, layout, chunk=32), inputs),
        "padded, dense": both_ways(lambda: padded_dual(*inputs, lengths), inputs),
        "event by event": both_ways(lambda: ssd_scan_definition(*inputs, layout), inputs),
    }


def conv_variants(mean: int) -> tuple[int, Variants]:
    lengths = row_lengths(mean)
    layout, events = JaggedLayout.from_lengths(lengths), int(lengths.sum())
    here = torch.arange(int(lengths.max())) < lengths[:, None]
    x, weight, bias = inputs = [normal(events, CONV_CHANNELS), normal(CONV_CHANNELS, TAPS), normal(CONV_CHANNELS)]

    def padded() -> Tensor:
        rows = x.new_zeros(*here.shape, CONV_CHANNELS).index_put((here,), x).mT
        y = F.conv1d(rows, weight[:, None], bias, padding=TAPS - 1, groups=CONV_CHANNELS)
        return F.silu(y[..., : here.shape[1]].mT[here])

    return events, {
        "ours": both_ways(lambda: short_conv(*inputs, layout, activation="silu"), inputs),
        "padded conv1d": both_ways(padded, inputs),
        "event by event": both_ways(lambda: short_conv_definition(*inputs, layout, activation="silu"), inputs),
    }


def norm_variants(mean: int) -> tuple[int, Variants]:
    events, width = int(row_lengths(mean).sum()), HEADS * CHANNELS
    y, z, weight = inputs = [normal(events, width), normal(events, width), normal(width)]
    return events, {
        "ours": both_ways(lambda: gated_norm(*inputs, eps=1e-5), inputs),
        "rms_norm": both_ways(lambda: F.rms_norm(y * F.silu(z), (width,), weight, 1e-5), inputs),
    }


def softmax_variants(candidates: int, queries: int = 4096) -> Variants:
    q, c = inputs = [normal(queries, WIDTH), normal(candidates, WIDTH)]
    target = torch.randint(0, candidates, (queries,))

    def matmuls() -> object:
        with torch.no_grad():
            logits = q @ c.T
            return logits @ c, logits.T @ q

    return {
        "ours": both_ways(lambda: item_softmax(q, c, target), inputs),
        "all logits": both_ways(lambda: F.cross_entropy(q @ c.T, target, reduction="none"), inputs),
        "its three products alone": matmuls,
    }


def median_ms(variants: Variants) -> dict[str, float]:
    """Median time of each variant; those that take over two seconds run once."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(ROUNDS):
        for name, run in variants.items():
            if times[name] and times[name][0] > 2000:
                continue
            run()  # brings its memory and caches into the state that a training loop has
            start = time.process_time()
            run()
            times[name].append(1e3 * (time.process_time() - start))
    return {name: statistics.median(taken) for name, taken in times.items()}


def table(title: str, lines: dict[str, dict[str, float]]) -> str:
    """Times in ms; behind each the multiple of ours."""
    names = list(next(iter(lines.values())))
    rows = [f"## {title}", "", "| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for line, taken in lines.items():
        cells = [
            f"{taken[n]:.1f}" if n == "ours" else f"{taken[n]:.1f} ({taken[n] / taken['ours']:.2g}x)" for n in names
        ]
        rows.append(f"| {line} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def main(output: Path) -> None:
    """Print the table and write it to `ops-cpu.md` in the folder `output`."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    parts = [
        "# Operators on one CPU thread\n",
        "Printed by `python -m benchmarks.ops`.",
        f"Forward and backward in fp32, torch {torch.__version__}, {processor()}: processor ms, median of {ROUNDS}.",
        f"{ROWS} rows of at most 200 events. Behind each time its multiple of ours.\n",
    ]
    kinds = {
        f"ssd_scan, {HEADS} heads of {CHANNELS}, state {STATE}": scan_variants,
        f"short_conv, {CONV_CHANNELS} channels, {TAPS} taps, SiLU": conv_variants,
        f"gated_norm, {HEADS * CHANNELS} channels": norm_variants,
    }
    for title, make in kinds.items():
        lines = {}
        for mean in LENGTHS:
            events, variants = make(mean)
            lines[f"mean length {mean}, {events:,} events"] = median_ms(variants)
        parts.append(table(title, lines))
    lines = {f"{k:,} candidates": median_ms(softmax_variants(k)) for k in (1000, 4000, 20000)}
    parts.append(table(f"item_softmax, 4,096 queries of width {WIDTH}", lines))
    output.mkdir(parents=True, exist_ok=True)
    (output / "ops-cpu.md").write_text("\n".join(parts))
    print("\n".join(parts))
