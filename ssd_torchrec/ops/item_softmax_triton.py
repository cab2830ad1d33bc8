"""The item softmax as Triton kernels: logits live a tile at a time, and are computed again backwards.

    highest, total = running maximum of logit[i, k], running sum_k exp(logit[i, k] - highest)
    p[i, k]        = exp(logit[i, k] - log_sum_exp[i])
    dlogit[i, k]   = p[i, k] - [k = target[i]]
    dqueries[i]    = w[i] sum_k dlogit[i, k] candidates[k]
    dcandidates[k] = sum_i dlogit[i, k] w[i] queries[i]         dlog_q[k] = -sum_i w[i] dlogit[i, k]

Shapes: M queries, K candidates, D width. w: gradient of the loss. A program has a block of one kind and meets all of
the other, or a split of them where blocks alone would leave the GPU idle; what splits give is added in order. Sums are
fp32. dlogit and w queries are rounded to the dtype of the operands, as a product must have them.
Source: Milakov & Gimelshein 2018, arXiv:1805.02867, for the running maximum.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssd_torchrec.errors import ShapeError
from ssd_torchrec.ops.launch import architecture, dot_precision, inner_contiguous
from ssd_torchrec.ops.registry import refuse_double_backward, register

PROGRAMS = 512
"""Splits make a kernel's programs up to this many, four for each multiprocessor of an H100. A constant: sums have one
order on every GPU."""

WIDEST = 256
"""Largest width D: a tile holds whole rows."""

LARGEST_BLOCK = 128
"""Queries or candidates of a tile, at most."""

COMBINED = 256
"""Queries whose splits one program puts together."""

LOWEST = tl.constexpr(-3e38)
"""Where a running maximum begins. Finite: below it a candidate left out, at -inf, is exp(-inf) and not NaN."""


class _Tile(NamedTuple):
    M: int  # queries
    K: int  # candidates
    warps: int
    stages: int


# By dtype of the operands and width: the largest that registers hold, forward without spills. The side that a program
# keeps has 64 or more, for the products of a whole warp group, unless fp32 leaves no room; before Hopper products take
# both operands from registers, where each fp32 is two tf32.
_Tiles = dict[str, dict[int, _Tile]]
_FORWARD: _Tiles = {
    "bf16": {64: _Tile(128, 64, 4, 3), 128: _Tile(128, 64, 8, 3), 256: _Tile(128, 64, 8, 2)},
    "fp32": {64: _Tile(128, 64, 4, 2), 128: _Tile(64, 32, 4, 2), 256: _Tile(64, 32, 8, 2)},
    "fp32 before Hopper": {64: _Tile(64, 32, 8, 2), 128: _Tile(32, 16, 4, 2), 256: _Tile(16, 32, 8, 2)},
}
_DQUERIES: _Tiles = {
    "bf16": {64: _Tile(64, 128, 4, 3), 128: _Tile(128, 64, 8, 3), 256: _Tile(128, 64, 8, 2)},
    "fp32": {64: _Tile(128, 64, 8, 2), 128: _Tile(128, 32, 8, 2), 256: _Tile(16, 32, 8, 2)},
    "fp32 before Hopper": {64: _Tile(32, 32, 4, 2), 128: _Tile(32, 32, 8, 2), 256: _Tile(16, 32, 8, 2)},
}
_DCANDIDATES: _Tiles = {
    "bf16": {64: _Tile(64, 128, 4, 2), 128: _Tile(64, 64, 4, 2), 256: _Tile(64, 64, 8, 2)},
    "fp32": {64: _Tile(64, 128, 8, 2), 128: _Tile(32, 64, 8, 1), 256: _Tile(32, 16, 8, 1)},
    "fp32 before Hopper": {64: _Tile(32, 64, 8, 1), 128: _Tile(32, 32, 8, 1), 256: _Tile(32, 16, 8, 1)},
}

_COUNTS = ["M", "K", "per_split", "splits"]  # they change from batch to batch: not compiled for each kind of number


@triton.jit
def _load_rows(ptr, rows, mask, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, OPERAND: tl.constexpr):
    """(rows, BLOCK_D) as operand of a product, 0 where masked."""
    d = tl.arange(0, BLOCK_D)
    at = rows.to(tl.int64)[:, None] * stride + d[None, :]
    return tl.load(ptr + at, mask=mask[:, None] & (d < D)[None, :], other=0.0).to(OPERAND)


@triton.jit
def _load_target(ptr, rows, M, K):
    """(rows,) int32; -1 for all that is no candidate."""
    target = tl.load(ptr + rows, mask=rows < M, other=-1)
    return tl.where((target >= 0) & (target < K), target, -1).to(tl.int32)


@triton.jit
def _load_log_q(ptr, columns, K, HAS_LOG_Q: tl.constexpr):
    """(columns,) fp32 to subtract from the logits; infinite behind the last candidate."""
    if HAS_LOG_Q:
        return tl.load(ptr + columns, mask=columns < K, other=float("inf"))
    return tl.where(columns < K, 0.0, float("inf"))


@triton.jit(do_not_specialize=_COUNTS)
def _forward_kernel(
    queries_ptr,
    candidates_ptr,
    target_ptr,
    log_q_ptr,
    item_ptr,
    highest_ptr,
    total_ptr,
    chosen_ptr,
    M,
    K,
    queries_stride,
    candidates_stride,
    per_split,
    D: tl.constexpr,
    HAS_LOG_Q: tl.constexpr,
    HAS_ITEMS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(M, BLOCK_M)
    split, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    target = _load_target(target_ptr, rows, M, K)
    queries = _load_rows(queries_ptr, rows, rows < M, queries_stride, D, BLOCK_D, OPERAND)
    if HAS_ITEMS:
        wanted = tl.load(item_ptr + target, mask=target >= 0, other=0)
    highest = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    chosen = tl.zeros([BLOCK_M], tl.float32)
    start = split * per_split
    for at in range(start, tl.minimum(start + per_split, K), BLOCK_K):
        columns = at + tl.arange(0, BLOCK_K)
        log_q = _load_log_q(log_q_ptr, columns, K, HAS_LOG_Q)
        candidates = _load_rows(candidates_ptr, columns, columns < K, candidates_stride, D, BLOCK_D, OPERAND)
        logits = tl.dot(queries, tl.trans(candidates), input_precision=PRECISION) - log_q[None, :]
        is_target = columns[None, :] == target[:, None]
        if HAS_ITEMS:
            item = tl.load(item_ptr + columns, mask=columns < K, other=0)
            logits = tl.where((item[None, :] == wanted[:, None]) & ~is_target, float("-inf"), logits)
        higher = tl.maximum(highest, tl.max(logits, 1))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
        chosen += tl.sum(tl.where(is_target, logits, 0.0), 1)
        highest = higher
    partial = split.to(tl.int64) * M + rows
    tl.store(highest_ptr + partial, highest, mask=rows < M)
    tl.store(total_ptr + partial, total, mask=rows < M)
    tl.store(chosen_ptr + rows, chosen, mask=(target >= start) & (target < start + per_split))  # one split holds it


@triton.jit(do_not_specialize=_COUNTS)
def _combine_kernel(
    highest_ptr, total_ptr, chosen_ptr, target_ptr, loss_ptr, log_sum_exp_ptr, M, K, splits, BLOCK_M: tl.constexpr
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    highest = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for _ in range(0, splits):
        of_split = tl.load(highest_ptr + rows, mask=rows < M, other=LOWEST)
        higher = tl.maximum(highest, of_split)
        part = tl.load(total_ptr + rows, mask=rows < M, other=0.0)
        total = total * tl.exp(highest - higher) + part * tl.exp(of_split - higher)
        highest = higher
        highest_ptr += M
        total_ptr += M
    target = _load_target(target_ptr, rows, M, K)
    asks_nothing = tl.load(target_ptr + rows, mask=rows < M, other=-1) == -1
    chosen = tl.load(chosen_ptr + rows, mask=target >= 0, other=float("nan"))
    log_total = tl.log(total)
    loss = tl.where(asks_nothing, 0.0, (highest - chosen) + log_total)
    tl.store(loss_ptr + rows, loss, mask=rows < M)
    log_sum_exp = tl.where(target >= 0, highest + log_total, float("inf"))  # so that p is 0 backwards
    tl.store(log_sum_exp_ptr + rows, log_sum_exp, mask=rows < M)


@triton.jit(do_not_specialize=_COUNTS)
def _dqueries_kernel(
    dloss_ptr,
    queries_ptr,
    candidates_ptr,
    target_ptr,
    log_q_ptr,
    item_ptr,
    log_sum_exp_ptr,
    dqueries_ptr,
    M,
    K,
    queries_stride,
    candidates_stride,
    per_split,
    D: tl.constexpr,
    HAS_LOG_Q: tl.constexpr,
    HAS_ITEMS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(M, BLOCK_M)
    split, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    target = _load_target(target_ptr, rows, M, K)
    queries = _load_rows(queries_ptr, rows, rows < M, queries_stride, D, BLOCK_D, OPERAND)
    log_sum_exp = tl.load(log_sum_exp_ptr + rows, mask=rows < M, other=float("inf"))
    if HAS_ITEMS:
        wanted = tl.load(item_ptr + target, mask=target >= 0, other=0)
    dqueries = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    start = split * per_split
    for at in range(start, tl.minimum(start + per_split, K), BLOCK_K):
        columns = at + tl.arange(0, BLOCK_K)
        log_q = _load_log_q(log_q_ptr, columns, K, HAS_LOG_Q)
        candidates = _load_rows(candidates_ptr, columns, columns < K, candidates_stride, D, BLOCK_D, OPERAND)
        logits = tl.dot(queries, tl.trans(candidates), input_precision=PRECISION) - log_q[None, :]
        is_target = columns[None, :] == target[:, None]
        if HAS_ITEMS:
            item = tl.load(item_ptr + columns, mask=columns < K, other=0)
            logits = tl.where((item[None, :] == wanted[:, None]) & ~is_target, float("-inf"), logits)
        p = tl.exp(logits - log_sum_exp[:, None])
        dlogits = tl.where(is_target, p - 1, p)
        dqueries = tl.dot(dlogits.to(OPERAND), candidates, dqueries, input_precision=PRECISION)
    dloss = tl.load(dloss_ptr + rows, mask=log_sum_exp < float("inf"), other=0.0)
    d = tl.arange(0, BLOCK_D)
    partial = (split.to(tl.int64) * M + rows)[:, None] * D + d[None, :]
    tl.store(dqueries_ptr + partial, dqueries * dloss[:, None], mask=(rows < M)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=_COUNTS)
def _dcandidates_kernel(
    dloss_ptr,
    queries_ptr,
    weighted_ptr,
    candidates_ptr,
    target_ptr,
    log_q_ptr,
    item_ptr,
    log_sum_exp_ptr,
    dcandidates_ptr,
    dlog_q_ptr,
    M,
    K,
    queries_stride,
    candidates_stride,
    per_split,
    D: tl.constexpr,
    HAS_LOG_Q: tl.constexpr,
    HAS_ITEMS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Logits are computed as (columns, rows): a product's result is never turned."""
    blocks = tl.cdiv(K, BLOCK_K)
    split, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    columns = block * BLOCK_K + tl.arange(0, BLOCK_K)
    candidates = _load_rows(candidates_ptr, columns, columns < K, candidates_stride, D, BLOCK_D, OPERAND)
    if HAS_LOG_Q:
        log_q = tl.load(log_q_ptr + columns, mask=columns < K, other=0.0)
    if HAS_ITEMS:
        item = tl.load(item_ptr + columns, mask=columns < K, other=0)
    dcandidates = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dlog_q = tl.zeros([BLOCK_K], tl.float32)
    start = split * per_split
    for at in range(start, tl.minimum(start + per_split, M), BLOCK_M):
        rows = at + tl.arange(0, BLOCK_M)
        target = tl.load(target_ptr + rows, mask=rows < M, other=-1)
        log_sum_exp = tl.load(log_sum_exp_ptr + rows, mask=rows < M, other=float("inf"))
        queries = _load_rows(queries_ptr, rows, rows < M, queries_stride, D, BLOCK_D, OPERAND)
        weighted = _load_rows(weighted_ptr, rows, rows < M, D, D, BLOCK_D, OPERAND)
        logits = tl.dot(candidates, tl.trans(queries), input_precision=PRECISION)
        if HAS_LOG_Q:
            logits -= log_q[:, None]
        is_target = columns[:, None] == target.to(tl.int32)[None, :]
        if HAS_ITEMS:
            wanted = tl.load(item_ptr + target, mask=log_sum_exp < float("inf"), other=0)
            logits = tl.where((item[:, None] == wanted[None, :]) & ~is_target, float("-inf"), logits)
        p = tl.exp(logits - log_sum_exp[None, :])
        dlogits = tl.where(is_target, p - 1, p)
        dcandidates = tl.dot(dlogits.to(OPERAND), weighted, dcandidates, input_precision=PRECISION)
        if HAS_LOG_Q:
            dloss = tl.load(dloss_ptr + rows, mask=log_sum_exp < float("inf"), other=0.0)
            dlog_q -= tl.sum(dlogits * dloss[None, :], 1)
    d = tl.arange(0, BLOCK_D)
    partial = split.to(tl.int64) * K + columns
    mask = (columns < K)[:, None] & (d < D)[None, :]
    tl.store(dcandidates_ptr + partial[:, None] * D + d[None, :], dcandidates, mask=mask)
    if HAS_LOG_Q:
        tl.store(dlog_q_ptr + partial, dlog_q, mask=columns < K)


def _operand(queries: Tensor) -> torch.dtype:
    """Of both sides of a product. Most p of a million candidates are too small for fp16: with it, products are tf32."""
    return torch.float32 if queries.dtype == torch.float16 else queries.dtype


def _block_width(D: int) -> int:
    return 1 << max(4, (D - 1).bit_length())


def _blocks(count: int, size: int) -> int:
    return -(-count // size)


def _tile(tiles: _Tiles, queries: Tensor) -> _Tile:
    kind = "bf16" if _operand(queries) == torch.bfloat16 else "fp32" if architecture() >= 90 else "fp32 before Hopper"
    return tiles[kind][max(64, _block_width(queries.shape[1]))]


def _options(
    tile: _Tile, queries: Tensor, candidates: Tensor, log_q: Tensor | None, item: Tensor | None
) -> dict[str, Any]:
    D = queries.shape[1]
    return {
        "M": len(queries),
        "K": len(candidates),
        "queries_stride": queries.stride(0),
        "candidates_stride": candidates.stride(0),
        "D": D,
        "HAS_LOG_Q": log_q is not None,
        "HAS_ITEMS": item is not None,
        "OPERAND": tl.bfloat16 if _operand(queries) == torch.bfloat16 else tl.float32,
        "PRECISION": dot_precision(queries.dtype),
        "BLOCK_M": tile.M,
        "BLOCK_K": tile.K,
        "BLOCK_D": _block_width(D),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _splits(blocks: int, others: int, block: int) -> tuple[int, int]:
    """How many splits the others are cut into for so many programs, none of them empty, and how many each has."""
    if not blocks or not others:
        return 0, block
    per_split = _blocks(others, _blocks(PROGRAMS, blocks) * block) * block
    return _blocks(others, per_split), per_split


def _parts(splits: int, like: Tensor) -> Tensor:
    """(splits, ...) for what each split adds to a gradient."""
    return like.new_empty(splits, *like.shape, dtype=like.dtype if splits == 1 else torch.float32)


def _added(parts: Tensor, dtype: torch.dtype) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(0).to(dtype)


def _launch_forward(
    queries: Tensor, candidates: Tensor, target: Tensor, log_q: Tensor | None, item: Tensor | None
) -> tuple[Tensor, Tensor]:
    queries, candidates, target = inner_contiguous(queries), inner_contiguous(candidates), target.contiguous()
    M, K = len(queries), len(candidates)
    tile = _tile(_FORWARD, queries)
    blocks = _blocks(M, tile.M)
    splits, per_split = _splits(blocks, K, tile.K)
    highest, total = queries.new_empty(2, splits, M, dtype=torch.float32)
    chosen, loss, log_sum_exp = (queries.new_empty(M, dtype=torch.float32) for _ in range(3))
    with torch.cuda.device_of(queries):  # Triton launches on the current device
        if splits:
            options = _options(tile, queries, candidates, log_q, item)
            _forward_kernel[(blocks * splits,)](
                queries, candidates, target, log_q, item, highest, total, chosen, per_split=per_split, **options
            )
        if M:
            counts: dict[str, Any] = {"M": M, "K": K, "splits": splits, "BLOCK_M": COMBINED}
            _combine_kernel[(_blocks(M, COMBINED),)](highest, total, chosen, target, loss, log_sum_exp, **counts)
    return loss, log_sum_exp


def _launch_dqueries(
    dloss: Tensor,
    queries: Tensor,
    candidates: Tensor,
    target: Tensor,
    log_q: Tensor | None,
    item: Tensor | None,
    log_sum_exp: Tensor,
) -> Tensor:
    queries, candidates = inner_contiguous(queries), inner_contiguous(candidates)
    dloss, target = dloss.contiguous(), target.contiguous()
    tile = _tile(_DQUERIES, queries)
    blocks = _blocks(len(queries), tile.M)
    splits, per_split = _splits(blocks, len(candidates), tile.K)
    dqueries = _parts(splits, queries)
    if splits:
        options = _options(tile, queries, candidates, log_q, item)
        with torch.cuda.device_of(queries):
            _dqueries_kernel[(blocks * splits,)](
                dloss,
                queries,
                candidates,
                target,
                log_q,
                item,
                log_sum_exp,
                dqueries,
                per_split=per_split,
                **options,
            )
    return _added(dqueries, queries.dtype)


def _launch_dcandidates(
    dloss: Tensor,
    queries: Tensor,
    candidates: Tensor,
    target: Tensor,
    log_q: Tensor | None,
    item: Tensor | None,
    log_sum_exp: Tensor,
) -> tuple[Tensor, Tensor]:
    queries, candidates = inner_contiguous(queries), inner_contiguous(candidates)
    dloss, target = dloss.masked_fill(log_sum_exp.isinf(), 0), target.contiguous()
    weighted = (queries * dloss[:, None]).to(_operand(queries))
    tile = _tile(_DCANDIDATES, queries)
    blocks = _blocks(len(candidates), tile.K)
    splits, per_split = _splits(blocks, len(queries), tile.M)
    dcandidates = _parts(splits, candidates)
    dlog_q = dloss.new_empty(0) if log_q is None else _parts(splits, log_q)
    if splits:
        options = _options(tile, queries, candidates, log_q, item)
        with torch.cuda.device_of(queries):
            _dcandidates_kernel[(blocks * splits,)](
                dloss,
                queries,
                weighted,
                candidates,
                target,
                log_q,
                item,
                log_sum_exp,
                dcandidates,
                dlog_q,
                per_split=per_split,
                **options,
            )
    return _added(dcandidates, candidates.dtype), dlog_q if log_q is None else _added(dlog_q, log_q.dtype)


register(
    "item_softmax(Tensor queries, Tensor candidates, Tensor target, Tensor? log_q, Tensor? item) -> (Tensor, Tensor)",
    _launch_forward,
    fake=lambda queries, *_: tuple(queries.new_empty(queries.shape[0], dtype=torch.float32) for _ in range(2)),
)
register(
    "item_softmax_dqueries(Tensor dloss, Tensor queries, Tensor candidates, Tensor target, Tensor? log_q, "
    "Tensor? item, Tensor log_sum_exp) -> Tensor",
    _launch_dqueries,
    fake=lambda dloss, queries, *_: queries.new_empty(queries.shape),
)
register(
    "item_softmax_dcandidates(Tensor dloss, Tensor queries, Tensor candidates, Tensor target, Tensor? log_q, "
    "Tensor? item, Tensor log_sum_exp) -> (Tensor, Tensor)",
    _launch_dcandidates,
    fake=lambda dloss, queries, candidates, target, log_q, *_: (
        candidates.new_empty(candidates.shape),
        dloss.new_empty(0) if log_q is None else log_q.new_empty(log_q.shape),
    ),
)


class _ItemSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, candidates: Tensor, target: Tensor, log_q: Tensor | None, item: Tensor | None
    ) -> Tensor:
        queries = queries.masked_fill((target == -1)[:, None], 0)  # one that is not asked may be anything, even NaN
        loss, log_sum_exp = torch.ops.ssd_torchrec.item_softmax(queries, candidates, target, log_q, item)
        ctx.save_for_backward(queries, candidates, target, log_q, item, log_sum_exp)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("item_softmax")
        saved = ctx.saved_tensors
        wants_queries, wants_candidates, _, wants_log_q, _ = ctx.needs_input_grad
        dqueries = dcandidates = dlog_q = None
        if wants_queries:
            dqueries = torch.ops.ssd_torchrec.item_softmax_dqueries(*grad_outputs, *saved)
        if wants_candidates or wants_log_q:
            dcandidates, dlog_q = torch.ops.ssd_torchrec.item_softmax_dcandidates(*grad_outputs, *saved)
        return dqueries, dcandidates, None, dlog_q if wants_log_q else None, None


def item_softmax_triton(
    queries: Tensor,
    candidates: Tensor,
    target: Tensor,
    *,
    log_q: Tensor | None = None,
    item_of_candidate: Tensor | None = None,
) -> Tensor:
    """The kernels. Beyond inputs and gradients they hold copies of the queries, and what the splits of short sides add:
    not more than about `PROGRAMS` blocks.

    Raises:
        ShapeError: rows are wider than a tile.
    """
    D = queries.shape[1]
    if D > WIDEST:
        raise ShapeError(
            f"queries must have width at most {WIDEST} on CUDA, got {D}; project both sides, or pass float64"
        )
    log_q = None if log_q is None else log_q.float().contiguous()
    item = None if item_of_candidate is None else item_of_candidate.contiguous()
    return _ItemSoftmax.apply(queries, candidates.to(queries.dtype), target, log_q, item)
