"""What is asked of every contender: operators, shapes, numbers, and the definition that all are held against."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.ops_on_gpu import ours, peers
from benchmarks.ops_on_gpu.contenders import Batch, Contender, Tensors
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.ops.gated_norm import gated_norm_definition
from ssd_torchrec.ops.item_softmax import item_softmax_definition
from ssd_torchrec.ops.selective_scan import selective_scan_definition
from ssd_torchrec.ops.short_conv import short_conv_definition
from ssd_torchrec.ops.ssd_bidirectional import ssd_scan_bidirectional_definition
from ssd_torchrec.ops.ssd_scan import ssd_scan_definition

ALIGNED = 16
"""Events of every batch are a multiple of it: Triton compiles such sizes, and others, apart."""
CHECK_LENGTHS = [70, 3, 33, 64, 17, 130, 1, 2]
TAPS = 4


@dataclass(frozen=True)
class Rows:
    """Rows of one length, or of lengths with an exponential tail: `shortest`, and `scale` beyond it in the mean."""

    name: str
    count: int
    shortest: int
    scale: float = 0.0
    longest: int = 200

    def lengths(self, count: int | None = None) -> list[int]:
        count = min(self.count, count or self.count)
        if not self.scale:
            return [self.shortest] * count
        beyond = -torch.rand(count, generator=torch.Generator().manual_seed(0)).log() * self.scale
        lengths = (self.shortest + beyond).long().clamp(max=self.longest).tolist()
        lengths[lengths.index(min(lengths))] += -sum(lengths) % ALIGNED
        return lengths


JAGGED = [
    Rows("2,048 rows, mean length 165", 2048, 20, 400),
    Rows("2,048 rows, mean length 47", 2048, 5, 43),
    Rows("2,048 rows, mean length 9", 2048, 5, 4),
]
LONG = [Rows("64 rows of 2,000", 64, 2000), Rows("4 rows of 100,000", 4, 100_000)]


@dataclass(frozen=True)
class Sizes:
    """Of one event: `heads` of `channels` numbers, each with `state` numbers of its own."""

    heads: int
    channels: int
    state: int

    @property
    def width(self) -> int:
        return self.heads * self.channels

    def __str__(self) -> str:
        return f"{self.width} channels, {self.heads} heads, state {self.state}"


NARROW, WIDE = Sizes(4, 32, 32), Sizes(32, 16, 64)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Direction = Literal["causal", "bidirectional", "reverse"]


@dataclass(frozen=True)
class Problem:
    """One line of a table. For the item softmax, rows are of queries and `items` the candidates."""

    op: str
    rows: Rows
    sizes: Sizes
    dtype: str
    direction: Direction = "causal"
    items: int = 0

    @property
    def key(self) -> str:
        return " | ".join([self.op, self.rows.name, self.what])

    @property
    def what(self) -> str:
        """All but the rows: what a contender is checked for, and its kernels are compiled for."""
        items = [f"{self.items:,} items"] if self.items else []
        return " | ".join([str(self.sizes), *items, self.dtype, self.direction])

    def batch(self, lengths: list[int], device: torch.device) -> Batch:
        return Batch(lengths, JaggedLayout.from_lengths(lengths, device), self.direction != "causal")


class Draw:
    """Random tensors on a device: of events in the dtype of the problem, parameters in fp32."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self.rng = torch.Generator(device).manual_seed(0)
        self.device = device
        self.dtype = DTYPES[problem.dtype]

    def events(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.rng, device=self.device).to(self.dtype)

    def between(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.rng, device=self.device)


def _scan_tensors(problem: Problem, events: int, draw: Draw) -> Tensors:
    H, P, N = problem.sizes.heads, problem.sizes.channels, problem.sizes.state
    of_ways = (2, H) if problem.direction == "bidirectional" else (H,)
    return {
        "x": draw.events(events, H, P),
        "dt": draw.events(events, *of_ways),
        "A": draw.between(-8, -1, *of_ways),
        "B": draw.events(events, 1, N),
        "C": draw.events(events, 1, N),
        "dt_bias": draw.between(-6, -2, *of_ways),
        "D": draw.between(0.5, 1.5, H),
    }


def _scan_definition(t: Tensors, batch: Batch) -> Tensor:
    scan = ssd_scan_bidirectional_definition if batch.both else ssd_scan_definition
    return scan(t["x"], t["dt"], t["A"], t["B"], t["C"], batch.layout, dt_bias=t["dt_bias"], D=t["D"])


def _selective_tensors(problem: Problem, events: int, draw: Draw) -> Tensors:
    E, N = problem.sizes.width, problem.sizes.state
    return {
        "x": draw.events(events, E),
        "dt": draw.events(events, E),
        "A": draw.between(-N, -1, E, N),
        "B": draw.events(events, N),
        "C": draw.events(events, N),
        "dt_bias": draw.between(-6, -2, E),
        "D": draw.between(0.5, 1.5, E),
    }


def _selective_definition(t: Tensors, batch: Batch) -> Tensor:
    given = (t["x"], t["dt"], t["A"], t["B"], t["C"], batch.layout)
    return selective_scan_definition(*given, dt_bias=t["dt_bias"], D=t["D"])


def _conv_channels(sizes: Sizes) -> int:
    return sizes.width + 2 * sizes.state  # x, B and C of a scan


def _conv_tensors(problem: Problem, events: int, draw: Draw) -> Tensors:
    channels = _conv_channels(problem.sizes)
    return {
        "x": draw.events(events, channels),
        "weight": draw.between(-1, 1, channels, TAPS),
        "bias": draw.between(-1, 1, channels),
    }


def _conv_definition(t: Tensors, batch: Batch) -> Tensor:
    given = (t["x"], t["weight"], t["bias"], batch.layout)
    return short_conv_definition(*given, activation="silu", reverse=batch.both)


def _norm_tensors(problem: Problem, events: int, draw: Draw) -> Tensors:
    width = problem.sizes.width
    return {
        "y": draw.events(events, width),
        "z": draw.events(events, width),
        "weight": draw.between(0.5, 1.5, width),
    }


def _norm_definition(t: Tensors, batch: Batch) -> Tensor:
    return gated_norm_definition(t["y"], t["z"], t["weight"], eps=1e-5)


def _softmax_tensors(problem: Problem, events: int, draw: Draw) -> Tensors:
    width = problem.sizes.width
    target = torch.randint(0, problem.items, (events,), generator=draw.rng, device=draw.device)
    return {
        "queries": draw.events(events, width),
        "candidates": 0.3 * draw.events(problem.items, width),
        "target": target,
    }


def _softmax_definition(t: Tensors, batch: Batch) -> Tensor:
    return item_softmax_definition(t["queries"], t["candidates"], t["target"]).mean()


@dataclass(frozen=True)
class Operation:
    problems: list[Problem]
    tensors: Callable[[Problem, int, Draw], Tensors]
    definition: Callable[[Tensors, Batch], Tensor]
    contenders: dict[str, Contender]
    numbers: Callable[[Sizes, bool], tuple[int, int]] | None
    """Numbers of an event that forward and backward must at least read or write, given whether both directions run."""

    def can(self, name: str, problem: Problem) -> bool:
        """Whether a contender has anything to do with a problem."""
        if name in ours.BIDIRECTIONAL_ALONE:
            return problem.direction == "bidirectional"
        if name in CAUSAL_ALONE:
            return problem.direction == "causal"
        return name not in JAGGED_ALONE or problem.rows in JAGGED

    def make(self, problem: Problem, lengths: list[int], device: torch.device) -> tuple[Tensors, Batch]:
        return self.tensors(problem, sum(lengths), Draw(problem, device)), problem.batch(lengths, device)


PADDED_STEPS, DENSE = "PyTorch, padded, step by step", "PyTorch, padded, dense"
FUSED, FUSED_ALONE = "fla fused_chunk", "fla fused_chunk, scan alone"
JAGGED_ALONE = (PADDED_STEPS,)
CAUSAL_ALONE = (FUSED_ALONE, DENSE)
CHECKED_AS = {FUSED_ALONE: FUSED}
"""Contenders without a check of their own, their inputs not being those of the definition."""


def _scan_numbers(sizes: Sizes, both: bool) -> tuple[int, int]:
    steps = (2 if both else 1) * sizes.heads
    return 2 * sizes.width + 2 * sizes.state + steps, 3 * sizes.width + 4 * sizes.state + 2 * steps


def _problems(op: str, rows: list[Rows], directions: tuple[Direction, ...] = ("causal",)) -> list[Problem]:
    """Lines of one tuning in a row, the most events first: on them the peers' kernels tune themselves."""
    return [
        Problem(op, shape, sizes, dtype, direction)
        for sizes in (NARROW, WIDE)
        for dtype in DTYPES
        for direction in directions
        for shape in rows
    ]


OPERATIONS: dict[str, Operation] = {
    "ssd_scan": Operation(
        _problems("ssd_scan", JAGGED + LONG, ("causal", "bidirectional")),
        _scan_tensors,
        _scan_definition,
        {
            "ours": ours.scan,
            ours.TWO_SCANS: ours.two_scans,
            "mamba-ssm, chunks of 64": peers.mamba_scan(64),
            "mamba-ssm, chunks of 256": peers.mamba_scan(256),
            FUSED: peers.fla_scan("fused_chunk_simple_gla"),
            "fla chunk": peers.fla_scan("chunk_simple_gla"),
            FUSED_ALONE: peers.fla_scan_alone("fused_chunk_simple_gla"),
            DENSE: peers.padded_dual,
        },
        _scan_numbers,
    ),
    "selective_scan": Operation(
        _problems("selective_scan", JAGGED + LONG),
        _selective_tensors,
        _selective_definition,
        {"ours": ours.selective, PADDED_STEPS: peers.padded_steps},
        lambda s, both: (3 * s.width + 2 * s.state, 5 * s.width + 4 * s.state),
    ),
    "short_conv": Operation(
        _problems("short_conv", JAGGED, ("causal", "reverse")),
        _conv_tensors,
        _conv_definition,
        {"ours": ours.conv, "fla causal_conv1d": peers.fla_conv, "PyTorch, padded": peers.padded_conv},
        lambda s, both: (2 * _conv_channels(s), 3 * _conv_channels(s)),
    ),
    "gated_norm": Operation(
        _problems("gated_norm", JAGGED),
        _norm_tensors,
        _norm_definition,
        {"ours": ours.norm, "mamba-ssm rmsnorm_fn": peers.mamba_norm, "PyTorch": peers.torch_norm},
        lambda s, both: (3 * s.width, 5 * s.width),
    ),
    "item_softmax": Operation(
        [
            Problem("item_softmax", Rows(f"{count:,} queries", 1, count), Sizes(1, 64, 0), dtype, items=items)
            for dtype in DTYPES
            for count in (4096, 8192)
            for items in (10_000, 100_000, 1_000_000)
        ],
        _softmax_tensors,
        _softmax_definition,
        {
            "ours": ours.softmax,
            "fla fused_linear_cross_entropy": peers.softmax(peers.fla_softmax),
            "PyTorch, all logits": peers.softmax(peers.all_logits),
        },
        None,
    ),
}


def smaller(problem: Problem) -> Problem:
    """The same at the size of a check, whose rows are `CHECK_LENGTHS`: few items."""
    return replace(problem, items=min(problem.items, 304))


def widened(tensors: Tensors) -> dict[str, Any]:
    """On the CPU, in fp64, with gradients: the truth's inputs."""
    wide = {name: t.detach().cpu() for name, t in tensors.items()}
    return {n: t.double().requires_grad_() if t.is_floating_point() else t for n, t in wide.items()}
