import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn

from ssd_torchrec.errors import ConfigError, DtypeError, JaggedLayoutError, ShapeError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.ops import attention as ops
from ssd_torchrec.ops.attention import (
    attention,
    attention_definition,
    attention_fused,
    attention_grouped,
    row_groups,
)
from ssd_torchrec.ops.rows import rearrange
from tests.golden import gradients
from tests.numerics import assert_as_accurate_as_eager

ROWS = {
    "one-row": [5],
    "empty-and-short-rows": [3, 0, 7, 1, 2],
    "rows-of-one-length": [4, 4, 1, 4],
    "only-empty-rows": [0, 0],
    "no-rows": [],
}
CAUSAL = {"causal": True, "both-ways": False}
all_rows = pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS)
both = pytest.mark.parametrize("causal", CAUSAL.values(), ids=CAUSAL)


def inputs(lengths: list[int], heads: int = 2, channels: int = 8) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    shape = (sum(lengths), heads, channels)
    return {name: torch.randn(shape, generator=rng, dtype=torch.float64) for name in ("query", "key", "value")}


def results(attend: Any, tensors: dict[str, Tensor], lengths: list[int], **options: Any) -> dict[str, Tensor]:
    tensors = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    layout = JaggedLayout.from_lengths(lengths, tensors["query"].device)
    y = attend(*tensors.values(), layout, **options)
    cotangent = (torch.arange(y.numel(), device=y.device) % 5 - 2).view_as(y)
    return {"y": y.detach()} | {f"d{k}": g for k, g in gradients([y], [cotangent], tensors).items()}


def test_an_event_takes_the_weighted_mean_of_the_values_it_sees():
    query = key = torch.zeros(3, 1, 1)  # all weights alike
    value = torch.tensor([1.0, 3.0, 8.0])[:, None, None]
    layout = JaggedLayout.from_lengths([2, 0, 1])
    assert attention(query, key, value, layout, causal=True).flatten().tolist() == [1, 2, 8]
    assert attention(query, key, value, layout, causal=False).flatten().tolist() == [2, 2, 8]


def test_scores_are_divided_by_the_root_of_the_channels():
    query, key = torch.zeros(2, 1, 4), torch.zeros(2, 1, 4)
    query[0, 0, 0], key[1, 0, 0] = 2.0, 3.0
    value = torch.tensor([0.0, 1.0])[:, None, None].expand(2, 1, 4)
    for attend in (attention_definition, attention_grouped):
        y = attend(query, key, value, JaggedLayout.from_lengths([2]), causal=False)
        torch.testing.assert_close(y[0, 0, 0], torch.tensor(6 / 2).sigmoid())


@all_rows
@both
def test_groups_give_what_the_definition_gives(lengths, causal):
    truth = results(attention_definition, inputs(lengths), lengths, causal=causal)
    got = results(attention_grouped, inputs(lengths), lengths, causal=causal)
    for name, wanted in truth.items():
        torch.testing.assert_close(got[name], wanted, atol=1e-12, rtol=0)


def attention_of_pytorch(query: Tensor, key: Tensor, value: Tensor, layout: JaggedLayout, *, causal: bool) -> Tensor:
    """Eager PyTorch's own, each row alone: its gradients round a little more than those of a softmax written out."""
    rows = [x.split(layout.offsets.diff().tolist()) for x in (query, key, value)]
    heads = [[x.transpose(0, 1)[None] for x in row] for row in zip(*rows, strict=True) if len(row[0])]
    mixed = [F.scaled_dot_product_attention(*row, is_causal=causal)[0].transpose(0, 1) for row in heads]
    return torch.cat([query[:0] + key[:0] + value[:0], *mixed])


@all_rows
@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_is_as_accurate_as_eager(lengths, causal, dtype, device):
    rounded = {name: t.to(device, dtype) for name, t in inputs(lengths).items()}
    exact = {name: t.double() for name, t in rounded.items()}
    got = results(attention, rounded, lengths, causal=causal)
    eager = results(attention_of_pytorch, rounded, lengths, causal=causal)
    truth = results(attention_definition, exact, lengths, causal=causal)
    for name in truth:
        assert_as_accurate_as_eager(name, got[name], eager[name], truth[name])


@both
@pytest.mark.parametrize("attend", [attention_definition, attention_grouped])
def test_the_gradient_is_that_of_the_output(attend, causal):
    lengths = [2, 0, 3, 2]
    layout = JaggedLayout.from_lengths(lengths)
    tensors = [t.requires_grad_() for t in inputs(lengths, channels=2).values()]
    assert torch.autograd.gradcheck(lambda *args: attend(*args, layout, causal=causal), tensors)


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_rows_do_not_see_each_other(causal, dtype, dropout):
    layout = JaggedLayout.from_lengths([3, 0, 3, 2])
    tensors = [t.to(dtype) for t in inputs([3, 0, 3, 2]).values()]
    broken = [torch.cat([torch.full_like(t[:3], torch.nan), t[3:]]) for t in tensors]
    ys = []
    for args in (tensors, broken):
        torch.manual_seed(0)
        ys.append(attention(*args, layout, causal=causal, dropout=dropout)[3:])
    assert torch.equal(*ys)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_nothing_later_reaches_back_if_causal(dropout):
    layout = JaggedLayout.from_lengths([6])
    tensors = inputs([6])
    for i in range(1, 6):
        ys = {True: [], False: []}
        for later in (0.0, 1.0):
            moved = [torch.cat([t[:i], t[i:] + later]) for t in tensors.values()]
            for causal, y in ys.items():
                torch.manual_seed(0)
                y.append(attention(*moved, layout, causal=causal, dropout=dropout)[:i])
        assert torch.equal(*ys[True])
        assert not torch.equal(*ys[False])


def test_what_is_dropped_are_weights_and_the_rest_is_scaled_up(device):
    events = 4_000
    value = torch.ones(events, 1, 8, device=device)
    layout = JaggedLayout.from_lengths([1] * events, device)  # each event has one weight, of 1
    y = attention(value, value, value, layout, causal=True, dropout=0.25)
    torch.testing.assert_close(y.unique(), torch.tensor([0, 4 / 3], device=device))
    assert (y.amin(-1) == y.amax(-1)).all()
    assert (y[:, 0, 0] == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)


@both
def test_dropping_almost_nothing_is_attention(causal):
    lengths = [3, 0, 3, 2]
    layout = JaggedLayout.from_lengths(lengths)
    got = attention(*inputs(lengths).values(), layout, causal=causal, dropout=1e-9)  # rounds to none of 65536
    wanted = attention_definition(*inputs(lengths).values(), layout, causal=causal)
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)


def test_groups_lay_rows_of_one_length_side_by_side():
    layout = JaggedLayout.from_lengths([2, 0, 1, 2])
    groups = row_groups(layout)
    assert groups.shapes == [(1, 1), (2, 2)]
    assert [group.tolist() for group in groups.split(torch.arange(5))] == [[[2]], [[0, 1], [3, 4]]]
    assert row_groups(layout) is groups


@pytest.mark.parametrize("lengths", [[2, 0, 1, 2], [1], [0, 3]])
def test_groups_join_to_what_was_split(lengths):
    events = torch.randn(sum(lengths), 3)
    groups = row_groups(JaggedLayout.from_lengths(lengths))
    assert torch.equal(groups.join(groups.split(events)), events)


def test_rearranging_is_differentiable_twice():
    order = torch.tensor([2, 0, 1])
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    squared = lambda x: rearrange(x, order, order.argsort()).square()  # noqa: E731
    torch.testing.assert_close(squared(x), x[order].square())
    assert torch.autograd.gradcheck(squared, x)
    assert torch.autograd.gradgradcheck(squared, x)


def row_by_row(query: Tensor, key: Tensor, value: Tensor, ends_q: Tensor, ends_k: Tensor, *longest: int, **kw: Any):
    """What PyTorch's kernel is documented to compute, without a GPU."""
    lengths = ends_q.diff().tolist()
    assert (ends_q.dtype, ends_k.dtype, longest) == (torch.int32, torch.int32, (max(lengths), max(lengths)))
    assert kw.keys() == {"window_size"}
    layout = JaggedLayout.from_lengths(lengths)
    return attention_definition(query, key, value, layout, causal={(-1, 0): True, (-1, -1): False}[kw["window_size"]])


@all_rows
@both
def test_the_fused_kernel_is_asked_for_what_the_definition_gives(lengths, causal, monkeypatch):
    monkeypatch.setattr(ops, "varlen_attn", row_by_row)
    got = results(attention_fused, inputs(lengths), lengths, causal=causal)
    for name, wanted in results(attention_definition, inputs(lengths), lengths, causal=causal).items():
        torch.testing.assert_close(got[name], wanted)


def test_pytorch_takes_the_fused_call_as_it_is_made():
    x, ends = torch.empty(0), torch.empty(0)
    inspect.signature(varlen_attn).bind(x, x, x, ends, ends, 1, 1, window_size=(-1, 0))


HEADS = {  # dtype, channels, dropout, and whether one launch serves them
    "bf16": (torch.bfloat16, 64, 0.0, True),
    "fp16": (torch.float16, 256, 0.0, True),
    "fp32": (torch.float32, 64, 0.0, False),
    "fp64": (torch.float64, 64, 0.0, False),
    "odd-channels": (torch.bfloat16, 50, 0.0, False),
    "too-many-channels": (torch.bfloat16, 264, 0.0, False),
    "dropout": (torch.bfloat16, 64, 0.1, False),
}


@pytest.mark.parametrize(("dtype", "channels", "dropout", "fused"), HEADS.values(), ids=HEADS)
def test_one_launch_serves_what_the_kernel_takes(dtype, channels, dropout, fused):
    with FakeTensorMode():
        assert ops.is_fused(torch.empty(3, 2, channels, dtype=dtype, device="cuda"), dropout) == fused
    assert not ops.is_fused(torch.empty(3, 2, channels, dtype=dtype), dropout)


def test_bf16_on_a_gpu_goes_through_the_operator_of_pytorch(monkeypatch):
    """Its fake stands in for the kernel: what it is given has types and shapes, and no numbers."""
    monkeypatch.setattr(ops, "attention_grouped", None)
    host = JaggedLayout.from_lengths([3, 0, 5])
    with FakeTensorMode():
        shapes = {name: t.shape for name, t in vars(host).items() if isinstance(t, Tensor)}
        layout = replace(host, **{name: torch.empty(s, dtype=torch.int64, device="cuda") for name, s in shapes.items()})
        query, key, value = torch.empty(8, 3, 2, 32, dtype=torch.bfloat16, device="cuda").unbind(1)
        y = attention(query, key, value, layout, causal=True)
    assert (y.shape, y.dtype, y.device.type) == ((8, 2, 32), torch.bfloat16, "cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu_the_fused_kernel_gives_what_the_definition_gives(causal, dtype, device):
    lengths = [200, 0, 1, 33, 64, 165]
    rounded = {name: t.to(device, dtype) for name, t in inputs(lengths, channels=32).items()}
    exact = {name: t.double() for name, t in rounded.items()}
    got = results(attention_fused, rounded, lengths, causal=causal)
    eager = results(attention_of_pytorch, rounded, lengths, causal=causal)
    truth = results(attention_definition, exact, lengths, causal=causal)
    for name in truth:
        assert_as_accurate_as_eager(name, got[name], eager[name], truth[name])


X = torch.zeros(3, 2, 4)
REFUSED = {
    "other-events": ((X[:2], X, X), {}, JaggedLayoutError, r"events must be \(3, ...\)"),
    "no-heads": ((X[:, 0], X, X), {}, ShapeError, r"query must be \(T, H, P\) with P at least 1, got \(3, 4\)"),
    "no-channels": ((X[..., :0], X, X), {}, ShapeError, "P at least 1"),
    "fewer-keys": ((X, X[:, :1], X), {}, ShapeError, r"key must be \(3, 2, 4\), got \(3, 1, 4\)"),
    "value-of-another-dtype": ((X, X, X.double()), {}, DtypeError, "value must be torch.float32 on cpu as query is"),
    "integers": ((X.long(),) * 3, {}, DtypeError, "must be given floating point tensors, got torch.int64"),
    "percent": ((X, X, X), {"dropout": 20.0}, ConfigError, r"dropout must be in \[0, 1\), got 20.0"),
}


@pytest.mark.parametrize(("args", "options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_attended_to_is_refused(args, options, error, message):
    with pytest.raises(error, match=message):
        attention(*args, JaggedLayout.from_lengths([3]), causal=True, **options)
