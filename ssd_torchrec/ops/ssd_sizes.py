"""How large the chunks, tiles and programs of a scan's launches are, from what the host knows.

The length of a chunk follows that of the rows: a chunk that is longer than its row multiplies zeros. All else follows
from the widths and the dtype. What was chosen here was measured by `python -m benchmarks.ssd_sizes`.
"""

from dataclasses import dataclass

import torch

from ssd_torchrec.ops.launch import INTERPRETED

PIECE = 512
"""Events of a piece of a long row."""

LONG = 1024
"""Rows above this many events go in pieces."""

PROGRAMS = 1024
"""Programs that fill a GPU: where chunks are fewer, the heads of a group are split over several, and where rows are,
their chunks go side by side."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the launches of one pass, forward or backward."""

    chunk: int
    """Events Q of a chunk: 16 or 32."""

    whole: bool
    """Whether each row is one chunk and none has a state: then a program is a row."""

    serial: bool
    """Whether a row's chunks go one after the other, in one direction, its state in registers."""

    piece: int
    """Events of a piece, a multiple of `chunk`; 0 where rows go whole."""

    heads: int
    """Heads that a program takes one after the other, a divisor of those of a group."""

    warps: int
    """Warps of such a program."""

    carry_heads: int
    """Heads side by side in a program that carries states, a power of two that divides those of a group."""

    carry_warps: int
    """Warps of such a program."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What sizes are chosen for."""

    dtype: torch.dtype
    """Of the events."""

    num_events: int
    """Events T in all."""

    num_rows: int
    """Rows B."""

    longest: int
    """Events of the longest row."""

    heads: int
    """Heads H."""

    groups: int
    """Groups G."""

    channels: int
    """Channels P of a head."""

    state: int
    """State N per channel."""

    has_states: bool
    """Whether rows have states before or after them."""

    directions: int = 1
    """1 or 2."""


def block(size: int) -> int:
    """The tile that holds `size` numbers: tensor cores take powers of two from 16 on."""
    return max(16, 1 << (size - 1).bit_length())


def chunk_of(problem: Problem, *, backward: bool) -> int:
    """Events of a chunk.

    Chunks of 32 take fewer states than chunks of 16 and multiply more zeros. Gradients of 32 leave too little room in
    the registers: they are worth it only where they spare a row its states.
    """
    mean = problem.num_events / problem.num_rows
    return 16 if problem.longest <= 16 or mean <= 12 or (backward and problem.longest > 32) else 32


def sizes_of(problem: Problem, *, backward: bool, chunk: int = 0, piece: int = 0) -> Sizes:
    """Choose for one pass.

    Args:
        chunk: events of a chunk, 0 to choose.
        piece: events of a piece, 0 to choose.
    """
    chunk = chunk or chunk_of(problem, backward=backward)
    piece = piece or (PIECE if problem.longest > LONG else 0)
    whole = problem.longest <= chunk and not problem.has_states
    per_group = problem.heads // problem.groups
    channels, state = block(problem.channels), block(problem.state)
    carry_heads = 1
    while per_group % (2 * carry_heads) == 0 and carry_heads * channels < 64 and carry_heads * channels * state < 4096:
        carry_heads *= 2
    # A head of a row alone reads all of B and C again. In fp32 its state does not fit the registers, and interpreted
    # kernels, where all is fp32, have none.
    serial = not backward and not whole and not piece and problem.directions == 1
    serial = serial and state <= 2 * channels and (problem.dtype != torch.float32 or INTERPRETED)
    roomy = chunk == 32 if backward else problem.dtype == torch.float32
    slots = problem.num_rows if whole else problem.num_events // chunk + problem.num_rows
    heads = per_group
    while slots * (problem.heads // heads) < PROGRAMS and heads % 2 == 0:
        heads //= 2
    return Sizes(
        chunk=chunk,
        whole=whole,
        serial=serial and problem.num_rows * problem.heads >= PROGRAMS,
        piece=piece,
        heads=heads,
        warps=min(8, max(1, channels * state // 1024) * (2 if roomy else 1)),
        carry_heads=carry_heads,
        carry_warps=min(8, max(2, carry_heads * channels * state // 2048)),
    )
