"""Calls of each operator, forward and backward, that between them launch every kernel variant worth compiling.

Tensors are laid out and typed as the modules hand them over: events are parts of a projection, so their rows lie apart;
under bf16 steps, parameters and states stay fp32. Names say dtype and sizes, then what differs from the plain call.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssd_torchrec.jagged import JaggedLayout
from tests.ops.scans import call as call_scan

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = {FP32: "fp32", BF16: "bf16", FP16: "fp16"}

ROWS = {
    "tiny": [9] * 1025,
    "mixed": [9] * 1024 + [41],
    "short": [31] * 1025,
    "few": [31] * 3,
    "middling": [41] * 513,
    "some": [41] * 65,
    "long": [4001, 0, 6],
}
"""Row lengths, one for each path of the scans. Event counts are odd: Triton compiles multiples of 16, and 1, apart."""


@dataclass(frozen=True)
class Launch:
    """One call of an operator, and of its gradient."""

    name: str
    call: Callable[[], None]


def short_conv(dtype: torch.dtype, channels: int, taps: int, activation: str, *words: str) -> Launch:
    def call() -> None:
        from ssd_torchrec.ops.short_conv_triton import short_conv_triton

        layout = JaggedLayout.from_lengths(ROWS["few"])
        _, x, _ = _projection(layout, dtype, 128, channels, 4)
        tensors = {"x": x, "weight": torch.randn(channels, taps), "bias": torch.randn(channels)}
        if "no bias" in words:
            del tensors["bias"]
        if "tail" in words:
            tensors["tail"] = torch.randn(layout.num_rows, taps - 1, channels, dtype=dtype)
        options = {"activation": activation, "reverse": "reverse" in words, "return_tail": "tail" in words}

        def outputs(x: Tensor, weight: Tensor, bias: Tensor | None = None, tail: Tensor | None = None) -> Any:
            return short_conv_triton(x, weight, bias, layout, tail=tail, **options)

        _both_ways(outputs, tensors)

    return Launch(_name(dtype, {"C": channels, "K": taps}, activation, *words), call)


def gated_norm(dtype: torch.dtype, channels: int, groups: int = 1) -> Launch:
    def call() -> None:
        from ssd_torchrec.ops.gated_norm_triton import gated_norm_triton

        layout = JaggedLayout.from_lengths(ROWS["few"])
        z, _ = _projection(layout, dtype, channels, channels + 68)
        tensors = {"y": torch.randn(z.shape, dtype=dtype), "z": z, "weight": torch.randn(channels)}
        _both_ways(lambda y, z, weight: gated_norm_triton(y, z, weight, eps=1e-12, groups=groups), tensors)

    return Launch(_name(dtype, {"E": channels, "groups": groups}), call)


def item_softmax(dtype: torch.dtype, width: int, *words: str) -> Launch:
    def call() -> None:
        from ssd_torchrec.ops.item_softmax_triton import item_softmax_triton

        queries, candidates = 77, 301
        target = torch.arange(queries) % candidates
        items = torch.arange(candidates) if "items" in words else None
        tensors = {
            "queries": torch.randn(queries, width, dtype=dtype),
            "candidates": torch.randn(candidates, width, dtype=dtype),
        }
        if "log_q" in words:
            tensors["log_q"] = torch.randn(candidates)

        def outputs(queries: Tensor, candidates: Tensor, log_q: Tensor | None = None) -> Tensor:
            return item_softmax_triton(queries, candidates, target, log_q=log_q, item_of_candidate=items)

        _both_ways(outputs, tensors)

    return Launch(_name(dtype, {"D": width}, *words), call)


def selective_scan(dtype: torch.dtype, channels: int, state: int, rows: str, *words: str) -> Launch:
    def call() -> None:
        from ssd_torchrec.ops.selective_triton import selective_scan_triton

        layout = JaggedLayout.from_lengths(ROWS[rows])
        _, B, C = _projection(layout, dtype, 4, state, state)
        tensors = {
            "x": torch.randn(layout.num_events, channels, dtype=dtype),
            "dt": torch.randn(layout.num_events, channels, dtype=dtype),
            "A": -torch.rand(channels, state),
            "B": B,
            "C": C,
            **_scan_extras(layout, dtype, (channels,), (channels, state), words),
        }
        options = {"reverse": "reverse" in words, "return_final_state": "states" in words}
        _both_ways(lambda **t: call_scan(selective_scan_triton, t, layout, **options), tensors)

    return Launch(_name(dtype, {"E": channels, "N": state}, rows, *words), call)


def ssd_scan(
    dtype: torch.dtype, heads: int, channels: int, state: int, rows: str, *words: str, groups: int = 1
) -> Launch:
    def call() -> None:
        from ssd_torchrec.ops.ssd_triton import ssd_scan_bidirectional_triton, ssd_scan_triton

        layout = JaggedLayout.from_lengths(ROWS[rows])
        x, B, C = _projection(layout, dtype, heads * channels, groups * state, groups * state)
        directions = (2,) if "both ways" in words else ()
        tensors = {
            "x": x.unflatten(-1, (heads, channels)),
            "dt": torch.randn(layout.num_events, *directions, heads),
            "A": -torch.rand(*directions, heads),
            "B": B.unflatten(-1, (groups, state)),
            "C": C.unflatten(-1, (groups, state)),
            **_scan_extras(layout, dtype, (heads, channels), (heads, channels, state), words),
        }
        if directions:
            tensors["dt_bias"] = torch.randn(2, heads)
            _both_ways(lambda **t: call_scan(ssd_scan_bidirectional_triton, t, layout), tensors)
        else:
            options = {"reverse": "reverse" in words, "return_final_state": "states" in words}
            _both_ways(lambda **t: call_scan(ssd_scan_triton, t, layout, **options), tensors)

    return Launch(_name(dtype, {"H": heads, "P": channels, "N": state, "G": groups}, rows, *words), call)


def _scan_extras(
    layout: JaggedLayout, dtype: torch.dtype, event: tuple[int, ...], state: tuple[int, ...], words: tuple[str, ...]
) -> dict[str, Tensor]:
    """What scans can do without; `event` and `state` are shapes."""
    extras = {}
    if "bare" not in words:
        extras |= {"dt_bias": torch.randn(event[0]), "D": torch.randn(event[0])}
    if "z" in words:
        extras["z"] = torch.randn(layout.num_events, *event, dtype=dtype)
    if "states" in words:
        extras["initial_state"] = torch.randn(layout.num_rows, *state)
    return extras


def _projection(layout: JaggedLayout, dtype: torch.dtype, *widths: int) -> tuple[Tensor, ...]:
    """Parts of one tensor of events."""
    return torch.randn(layout.num_events, sum(widths), dtype=dtype).split(widths, dim=-1)


def _both_ways(outputs: Callable[..., Any], tensors: dict[str, Tensor]) -> None:
    tensors = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    made = outputs(**tensors)
    made = made if isinstance(made, tuple) else (made,)
    torch.autograd.grad(made, list(tensors.values()), [torch.ones_like(output) for output in made])


def _name(dtype: torch.dtype, sizes: dict[str, int], *words: str) -> str:
    return " ".join([DTYPES[dtype], *(f"{letter}{size}" for letter, size in sizes.items()), *words])


LAUNCHES: dict[str, list[Launch]] = {
    "short_conv": [
        *(short_conv(dtype, 192, 4, "hardswish") for dtype in (BF16, FP32)),
        *(short_conv(BF16, 192, 4, "hardswish", option) for option in ("reverse", "tail")),
        *(short_conv(dtype, 640, 8, "silu") for dtype in (BF16, FP32)),
    ],
    "gated_norm": [
        *(gated_norm(dtype, channels) for dtype in (BF16, FP32) for channels in (128, 512)),
        gated_norm(BF16, 512, groups=2),
    ],
    "item_softmax": [
        *(item_softmax(dtype, 128) for dtype in (BF16, FP32)),
        *(item_softmax(dtype, 64, "log_q", "items") for dtype in (BF16, FP32)),
    ],
    "selective_scan": [
        selective_scan(BF16, 128, 16, "short"),
        selective_scan(FP32, 512, 32, "long", "z", "states", "reverse"),
    ],
    "ssd_scan": [
        *(ssd_scan(BF16, 4, 32, 32, rows) for rows in ROWS),
        *(ssd_scan(FP32, 4, 32, 32, rows) for rows in ("short", "middling")),
        ssd_scan(BF16, 4, 32, 32, "short", "z", "reverse"),
        ssd_scan(BF16, 4, 32, 32, "short", "both ways"),
        ssd_scan(BF16, 4, 32, 32, "middling", "z", "states"),
        *(ssd_scan(BF16, 4, 64, 64, rows) for rows in ("short", "middling")),
    ],
}
"""What is compiled each time the tests run."""

RARE: dict[str, list[Launch]] = {
    "short_conv_rare": [
        *(short_conv(dtype, 192, 4, activation) for dtype in (BF16, FP32) for activation in ("silu", "none")),
        *(short_conv(FP32, 192, 4, "hardswish", option) for option in ("reverse", "tail")),
        *(short_conv(dtype, 192, 4, "hardswish", "no bias") for dtype in (BF16, FP32)),
        short_conv(BF16, 640, 8, "hardswish", "tail"),
        short_conv(FP16, 192, 4, "hardswish"),
    ],
    "gated_norm_rare": [gated_norm(FP16, 128), gated_norm(FP32, 512, groups=2), gated_norm(BF16, 4096)],
    "item_softmax_rare": [
        *(item_softmax(dtype, 128, words) for dtype in (BF16, FP32) for words in ("log_q", "items")),
        *(item_softmax(dtype, width) for dtype in (BF16, FP32) for width in (64, 256)),
        item_softmax(FP16, 64),
    ],
    "selective_scan_rare": [
        *(selective_scan(dtype, 128, 16, "long") for dtype in (BF16, FP32)),
        *(selective_scan(dtype, 512, 32, "short", "z") for dtype in (BF16, FP32)),
        selective_scan(BF16, 512, 32, "long", "z", "states"),
        *(selective_scan(dtype, 20, 5, "short", "bare") for dtype in (BF16, FP32)),
        selective_scan(FP16, 128, 16, "short"),
    ],
    "ssd_scan_rare": [
        *(ssd_scan(FP32, 4, 32, 32, rows) for rows in ("tiny", "mixed", "few", "long")),
        *(ssd_scan(dtype, 4, 32, 32, "long", "z", "states", "reverse") for dtype in (BF16, FP32)),
        *(ssd_scan(dtype, 32, 16, 64, rows) for dtype in (BF16, FP32) for rows in ("tiny", "short", "middling")),
        *(ssd_scan(FP32, 4, 64, 64, rows) for rows in ("short", "middling")),
        *(ssd_scan(dtype, 4, 24, 20, rows, "bare") for dtype in (BF16, FP32) for rows in ("short", "middling")),
        *(ssd_scan(dtype, 2, 64, 128, "middling") for dtype in (BF16, FP32)),
        *(ssd_scan(FP32, 4, 32, 32, rows, "both ways") for rows in ("short", "middling")),
        ssd_scan(BF16, 4, 32, 32, "middling", "both ways"),
        ssd_scan(BF16, 8, 32, 32, "middling", groups=2),
        ssd_scan(FP16, 4, 32, 32, "short"),
    ],
}
"""Other sizes, other combinations: minutes."""
