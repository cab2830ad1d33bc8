from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssd_torchrec.errors import ConfigError, DoubleBackwardError, JaggedLayoutError, ShapeError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.ops.short_conv import short_conv, short_conv_definition, short_conv_stream
from tests.golden import assert_golden, golden_cases, golden_tensors, gradients
from tests.numerics import assert_as_accurate_as_eager

ROWS = {"one-row": [5], "empty-and-short-rows": [3, 0, 7, 1, 2], "only-empty-rows": [0, 0], "no-rows": []}
PATHS = {"definition": short_conv_definition, "stream": short_conv_stream}
CHANNELS = 6
few = settings(max_examples=12, derandomize=True, deadline=None)


def conv_inputs(lengths: list[int], taps: int = 4, tail: bool = False, seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    shapes = {"x": (sum(lengths), CHANNELS), "weight": (CHANNELS, taps), "bias": (CHANNELS,)}
    shapes |= {"tail": (len(lengths), taps - 1, CHANNELS)} if tail else {}
    return {name: torch.randn(shape, generator=rng, dtype=torch.float64) for name, shape in shapes.items()}


def call(conv: Any, tensors: dict[str, Tensor], lengths: list[int], **options: Any) -> Any:
    options = {"activation": "silu"} | options
    layout = JaggedLayout.from_lengths(lengths, tensors["x"].device)
    return conv(tensors["x"], tensors["weight"], tensors.get("bias"), layout, tail=tensors.get("tail"), **options)


def results(conv: Any, tensors: dict[str, Tensor], lengths: list[int], **options: Any) -> dict[str, Tensor]:
    tensors = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    outputs = call(conv, tensors, lengths, return_tail=not options.get("reverse"), **options)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    cotangents = [(torch.arange(o.numel(), device=o.device) % 5 - 2).view_as(o) for o in outputs]
    grads = gradients(outputs, cotangents, tensors)
    named = dict(zip(("y", "new_tail"), (o.detach() for o in outputs), strict=False))
    return named | {f"d{name}": grad for name, grad in grads.items()}


@pytest.mark.parametrize("case", golden_cases("K"))
@pytest.mark.parametrize(
    ("dtype", "tolerances"), [(torch.float64, (1e-9, 1e-8)), (torch.float32, (1e-6, 1e-6))], ids=str
)
@pytest.mark.parametrize("conv", PATHS.values(), ids=PATHS)
def test_conv_is_the_published_one(conv, dtype, tolerances, case, device):
    golden = golden_tensors(case)
    inputs = {n: golden[f"input.{n}"].to(device, dtype).requires_grad_() for n in ("x", "weight", "bias")}
    layout = JaggedLayout.from_lengths(golden["input.offsets"].diff(), device)
    y = conv(*inputs.values(), layout, activation=case["config"]["activation"])
    assert_golden("y", y, golden["expected.y"].to(device), tolerances[0])
    for name, grad in gradients([y], [golden["input.grad_y"]], inputs).items():
        assert_golden(f"d{name}", grad, golden[f"grad.{name}"].to(device), tolerances[1])


@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("activation", ["silu", "hardswish", "none"])
@pytest.mark.parametrize("way", ["forward", "resumed", "reverse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_conv_is_as_accurate_as_eager(dtype, way, activation, taps, lengths, device):
    options = {"activation": activation, "reverse": way == "reverse"}
    tensors = conv_inputs(lengths, taps, tail=way == "resumed")
    tensors = {name: t.to(device, dtype) for name, t in tensors.items()}
    truth = results(short_conv_definition, {n: t.double() for n, t in tensors.items()}, lengths, **options)
    eager = results(short_conv_definition, tensors, lengths, **options)
    got = results(short_conv_stream, tensors, lengths, **options)
    for name in truth:
        assert_as_accurate_as_eager(name, got[name], eager[name], truth[name])


@pytest.mark.parametrize("conv", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("way", ["resumed", "reverse"])
def test_derivative_is_the_derivative(way, conv):
    tensors = conv_inputs([3, 0, 1], taps=3, tail=way == "resumed")

    def named(*values):
        given = dict(zip(tensors, values, strict=True))
        return call(conv, given, [3, 0, 1], reverse=way == "reverse", return_tail=way == "resumed")

    assert torch.autograd.gradcheck(named, tuple(t.requires_grad_() for t in tensors.values()))


@pytest.mark.parametrize("conv", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=str)
def test_nothing_in_still_reaches_every_input(lengths, conv):
    tensors = conv_inputs(lengths, tail=True)
    for name, value in results(conv, tensors, lengths).items():
        assert value.isfinite().all()
        assert not name.startswith("d") or value.shape == tensors[name[1:]].shape


def test_bias_is_optional():
    tensors = conv_inputs([5, 2])
    zero = call(short_conv_stream, tensors | {"bias": torch.zeros(CHANNELS).double()}, [5, 2])
    del tensors["bias"]
    torch.testing.assert_close(call(short_conv_stream, tensors, [5, 2]), zero)


@pytest.mark.parametrize("taps", [1, 4])
def test_a_short_row_keeps_the_rest_of_its_tail(taps):
    tensors = conv_inputs([0, 1, 6], taps, tail=True)
    _, tail = call(short_conv_stream, tensors, [0, 1, 6], return_tail=True)
    old, x = tensors["tail"], tensors["x"]
    assert torch.equal(tail[0], old[0])
    assert torch.equal(tail[1], torch.cat([old[1], x[:1]])[1:])
    assert torch.equal(tail[2], x[7 - (taps - 1) :])


@few
@given(
    first=st.lists(st.integers(0, 6), min_size=3, max_size=3),
    second=st.lists(st.integers(0, 6), min_size=3, max_size=3),
)
def test_rows_resume_where_they_stopped(first, second):
    both = [a + b for a, b in zip(first, second, strict=True)]
    tensors = conv_inputs(both, tail=True)
    y, tail = call(short_conv_stream, tensors, both, return_tail=True)
    layout = JaggedLayout.from_lengths(both)
    early = layout.position < torch.tensor(first)[layout.row_of_event]
    y_first, between = call(short_conv_stream, tensors | {"x": tensors["x"][early]}, first, return_tail=True)
    resumed = tensors | {"x": tensors["x"][~early], "tail": between}
    y_second, tail_second = call(short_conv_stream, resumed, second, return_tail=True)
    torch.testing.assert_close(y[early], y_first)
    torch.testing.assert_close(y[~early], y_second)
    assert torch.equal(tail, tail_second)


@few
@given(lengths=st.lists(st.integers(0, 9), max_size=5))
def test_backwards_is_forwards_on_turned_rows(lengths):
    tensors, layout = conv_inputs(lengths), JaggedLayout.from_lengths(lengths)
    turned = (
        layout.offsets[layout.row_of_event] + layout.offsets[layout.row_of_event + 1] - 1 - torch.arange(sum(lengths))
    )
    y = call(short_conv_stream, tensors, lengths, reverse=True)
    torch.testing.assert_close(y[turned], call(short_conv_stream, tensors | {"x": tensors["x"][turned]}, lengths))


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_nothing_crosses_rows(reverse):
    lengths = [5, 4, 3]
    tensors = {name: t.float() for name, t in conv_inputs(lengths).items()}
    poisoned = tensors | {"x": tensors["x"].clone()}
    poisoned["x"][5:9] = torch.nan
    clean, dirty = (results(short_conv_stream, t, lengths, reverse=reverse) for t in (tensors, poisoned))
    for name in ("y", "dx"):
        for rows in (slice(5), slice(9, None)):
            assert torch.equal(dirty[name][rows], clean[name][rows]), name


def test_fp64_takes_the_definition():
    tensors = conv_inputs([9, 2], tail=True)
    assert torch.equal(call(short_conv, tensors, [9, 2]), call(short_conv_definition, tensors, [9, 2]))


def test_autocast_does_not_coarsen_the_sums():
    tensors = {name: t.float() for name, t in conv_inputs([40]).items()}
    plain = results(short_conv, tensors, [40])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = results(short_conv, tensors, [40])
    for name in plain:
        assert torch.equal(plain[name], cast[name]), name


def test_second_backward_is_refused():
    tensors = {name: t.float().requires_grad_() for name, t in conv_inputs([3]).items()}
    y = call(short_conv, tensors, [3])
    with pytest.raises(DoubleBackwardError, match=r"short_conv.*pass float64"):
        torch.autograd.grad(y.sum(), tensors["x"], create_graph=True)


def test_what_does_not_fit_is_refused():
    tensors, layout = conv_inputs([3]), JaggedLayout.from_lengths([3])
    x, weight, bias = tensors.values()
    with pytest.raises(ShapeError, match="drop the middle dimension"):
        short_conv(x, weight[:, None], bias, layout, activation="silu")
    with pytest.raises(ShapeError, match=r"weight must be \(6, 4\), got \(5, 4\)"):
        short_conv(x, weight[:5], bias, layout, activation="silu")
    with pytest.raises(ShapeError, match=r"bias must be \(6,\)"):
        short_conv(x, weight, bias[:5], layout, activation="silu")
    with pytest.raises(ShapeError, match=r"tail must be \(1, 3, 6\)"):
        short_conv(x, weight, bias, layout, activation="silu", tail=x[None, :2])
    with pytest.raises(JaggedLayoutError, match=r"events must be \(3, ...\)"):
        short_conv(x[:2], weight, bias, layout, activation="silu")


def test_an_unknown_activation_is_refused():
    with pytest.raises(ConfigError, match="silu, hardswish or none, got 'relu'"):
        call(short_conv, conv_inputs([3]), [3], activation="relu")


@pytest.mark.parametrize("options", [{"tail": True}, {"return_tail": True}], ids=str)
def test_a_reversed_row_cannot_resume(options):
    tensors = conv_inputs([3], tail=options.pop("tail", False))
    with pytest.raises(ConfigError, match="reverse must come without a tail"):
        call(short_conv, tensors, [3], reverse=True, **options)
