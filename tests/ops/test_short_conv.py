from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssd_torchrec.errors import ConfigError, DoubleBackwardError, DtypeError, JaggedLayoutError, ShapeError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.ops import short_conv_triton as kernels
from ssd_torchrec.ops.launch import INTERPRETED
from ssd_torchrec.ops.short_conv import short_conv, short_conv_definition, short_conv_stream
from ssd_torchrec.ops.short_conv_triton import short_conv_triton
from tests.golden import assert_golden, golden_cases, golden_tensors, gradients
from tests.numerics import assert_as_accurate_as_eager

ROWS = {"one-row": [5], "empty-and-short-rows": [3, 0, 7, 1, 2], "only-empty-rows": [0, 0], "no-rows": []}
PATHS = {"definition": short_conv_definition, "stream": short_conv_stream, "triton": short_conv_triton}
IN_FP64 = [short_conv_definition, short_conv_stream]
NO_DEFINITION = [short_conv_stream, short_conv_triton]
WAYS = ["forward", "resumed", "reverse"]
MANY = [70, 0, 1, 40, 9, 30]  # more than the lanes of one program walk over
CHANNELS = 6
TOLERANCES = {torch.float64: (1e-9, 1e-8), torch.float32: (1e-6, 1e-6)}  # of y, of gradients
RUN = kernels.RUN
few = settings(max_examples=12, derandomize=True, deadline=None)


def named(value: Any) -> str:
    return getattr(value, "__name__", str(value))


@pytest.fixture(autouse=True)
def lanes_take_few_events(monkeypatch):
    """In the interpreter: there a few events are to make many lanes, and to be soon done with."""
    if INTERPRETED:
        monkeypatch.setattr(kernels, "RUN", 4)


def conv_inputs(
    lengths: list[int], taps: int = 4, tail: bool = False, seed: int = 0, channels: int = CHANNELS
) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    shapes = {"x": (sum(lengths), channels), "weight": (channels, taps), "bias": (channels,)}
    shapes |= {"tail": (len(lengths), taps - 1, channels)} if tail else {}
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


def on(device: torch.device, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.to(device, torch.float32) for name, t in tensors.items()}


def judge(conv: Any, tensors: dict[str, Tensor], lengths: list[int], **options: Any) -> None:
    truth = results(short_conv_definition, {n: t.double() for n, t in tensors.items()}, lengths, **options)
    eager = results(short_conv_definition, tensors, lengths, **options)
    got = results(conv, tensors, lengths, **options)
    for name in truth:
        assert_as_accurate_as_eager(name, got[name], eager[name], truth[name])


@pytest.mark.parametrize("case", golden_cases("K"))
@pytest.mark.parametrize(
    ("conv", "dtype"),
    [*((conv, torch.float64) for conv in IN_FP64), *((conv, torch.float32) for conv in PATHS.values())],
    ids=named,
)
def test_conv_is_the_published_one(conv, dtype, case, device):
    golden = golden_tensors(case)
    inputs = {n: golden[f"input.{n}"].to(device, dtype).requires_grad_() for n in ("x", "weight", "bias")}
    layout = JaggedLayout.from_lengths(golden["input.offsets"].diff(), device)
    y = conv(*inputs.values(), layout, activation=case["config"]["activation"])
    assert_golden("y", y, golden["expected.y"].to(device), TOLERANCES[dtype][0])
    for name, grad in gradients([y], [golden["input.grad_y"]], inputs).items():
        assert_golden(f"d{name}", grad, golden[f"grad.{name}"].to(device), TOLERANCES[dtype][1])


@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("activation", ["silu", "hardswish", "none"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stream_is_as_accurate_as_eager(dtype, way, activation, taps, lengths, device):
    tensors = conv_inputs(lengths, taps, tail=way == "resumed")
    options = {"activation": activation, "reverse": way == "reverse"}
    judge(short_conv_stream, {name: t.to(device, dtype) for name, t in tensors.items()}, lengths, **options)


@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("way", WAYS)
def test_kernels_are_as_accurate_as_eager(way, lengths, device):
    tensors = conv_inputs(lengths, tail=way == "resumed")
    judge(short_conv_triton, on(device, tensors), lengths, reverse=way == "reverse")


@pytest.mark.parametrize("activation", ["silu", "hardswish", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kernels_are_as_accurate_as_eager_in_16_bits(dtype, activation, device):
    tensors = {name: t.to(device, dtype) for name, t in conv_inputs([3, 0, 7, 1, 2], tail=True).items()}
    judge(short_conv_triton, tensors, [3, 0, 7, 1, 2], activation=activation)


@pytest.mark.parametrize("taps", [1, 2, 8])
@pytest.mark.parametrize("way", WAYS)
def test_kernels_take_any_number_of_taps_up_to_eight(way, taps, device):
    tensors = conv_inputs([3, 0, 9, 1, 2], taps, tail=way == "resumed")
    judge(short_conv_triton, on(device, tensors), [3, 0, 9, 1, 2], activation="hardswish", reverse=way == "reverse")


@pytest.mark.parametrize(("way", "channels"), [("forward", 70), ("resumed", 6), ("reverse", 6)])
def test_lanes_and_programs_share_the_events(way, channels, device, monkeypatch):
    monkeypatch.setattr(kernels, "RUN", RUN)
    tensors = conv_inputs(MANY, tail=way == "resumed", channels=channels)
    judge(short_conv_triton, on(device, tensors), MANY, reverse=way == "reverse")


@pytest.mark.parametrize("conv", IN_FP64)
@pytest.mark.parametrize("way", ["resumed", "reverse"])
def test_derivative_is_the_derivative(way, conv):
    tensors = conv_inputs([3, 0, 1], taps=3, tail=way == "resumed")

    def named(*values):
        given = dict(zip(tensors, values, strict=True))
        return call(conv, given, [3, 0, 1], reverse=way == "reverse", return_tail=way == "resumed")

    assert torch.autograd.gradcheck(named, tuple(t.requires_grad_() for t in tensors.values()))


@pytest.mark.parametrize("conv", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=str)
def test_nothing_in_still_reaches_every_input(lengths, conv, device):
    tensors = on(device, conv_inputs(lengths, tail=True))
    for name, value in results(conv, tensors, lengths).items():
        assert value.isfinite().all()
        assert not name.startswith("d") or value.shape == tensors[name[1:]].shape


@pytest.mark.parametrize("conv", NO_DEFINITION)
def test_bias_is_optional(conv, device):
    tensors = on(device, conv_inputs([5, 2]))
    zero = results(conv, tensors | {"bias": torch.zeros_like(tensors["bias"])}, [5, 2])
    del tensors["bias"], zero["dbias"]
    for name, value in results(conv, tensors, [5, 2]).items():
        torch.testing.assert_close(value, zero[name], msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("conv", NO_DEFINITION)
@pytest.mark.parametrize("taps", [1, 4])
def test_a_short_row_keeps_the_rest_of_its_tail(taps, conv, device):
    tensors = on(device, conv_inputs([0, 1, 6], taps, tail=True))
    _, tail = call(conv, tensors, [0, 1, 6], return_tail=True)
    old, x = tensors["tail"], tensors["x"]
    assert torch.equal(tail[0], old[0])
    assert torch.equal(tail[1], torch.cat([old[1], x[:1]])[1:])
    assert torch.equal(tail[2], x[7 - (taps - 1) :])


@pytest.mark.parametrize("conv", NO_DEFINITION)
def test_an_empty_row_hands_on_whatever_its_tail_holds(conv, device):
    tensors = on(device, conv_inputs([0, 2], tail=True))
    tensors["tail"][0] = torch.nan
    tensors["tail"].requires_grad_()
    _, tail = call(conv, tensors, [0, 2], return_tail=True)
    dtail = torch.ones_like(tail)
    assert torch.equal(torch.autograd.grad(tail, tensors["tail"], dtail)[0][0], dtail[0])


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


@pytest.mark.parametrize("conv", NO_DEFINITION)
@pytest.mark.parametrize("way", WAYS)
def test_nothing_crosses_rows(way, conv, device):
    lengths = [5, 4, 3]
    tensors = on(device, conv_inputs(lengths, tail=way == "resumed"))
    poisoned = tensors | {"x": tensors["x"].clone()}
    poisoned["x"][5:9] = torch.nan
    if way == "resumed":
        poisoned["tail"] = tensors["tail"].clone()
        poisoned["tail"][1] = torch.nan
    clean, dirty = (results(conv, t, lengths, reverse=way == "reverse") for t in (tensors, poisoned))
    for name in ("y", "dx"):
        for rows in (slice(5), slice(9, None)):
            assert torch.equal(dirty[name][rows], clean[name][rows]), name
    for name in {"new_tail", "dtail"} & clean.keys():
        assert torch.equal(dirty[name][::2], clean[name][::2]), name


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_kernels_give_a_row_the_same_bits_in_any_batch(reverse, device):
    lengths = [9, 0, 2, 20]
    tensors = on(device, conv_inputs(lengths))
    dy = torch.ones_like(tensors["x"]).cumsum(0)

    def y_and_dx(events: slice, lengths: list[int]) -> tuple[Tensor, Tensor]:
        x = tensors["x"][events].clone().requires_grad_()
        y = call(short_conv_triton, tensors | {"x": x}, lengths, reverse=reverse)
        return y, *torch.autograd.grad(y, x, dy[events])

    together = y_and_dx(slice(None), lengths)
    for events, length in ((slice(9), 9), (slice(9, 11), 2), (slice(11, 31), 20)):
        for name, batched, alone in zip(("y", "dx"), together, y_and_dx(events, [length]), strict=True):
            assert torch.equal(batched[events], alone), name


def test_kernels_read_a_part_of_wider_events_where_it_lies(device):
    tensors = on(device, conv_inputs([5, 2]))
    wide = torch.full((7, CHANNELS + 3), torch.nan, device=device)
    wide[:, 2:-1] = tensors["x"]
    layout = JaggedLayout.from_lengths([5, 2], device)
    rows = (layout.position, layout.row_of_event)
    y = torch.ops.ssd_torchrec.short_conv(wide[:, 2:-1], tensors["weight"], tensors["bias"], None, *rows, "silu", False)
    assert torch.equal(y, call(short_conv_triton, tensors, [5, 2]))


def test_kernels_mix_dtypes_as_autocast_leaves_them(device):
    tensors = on(device, conv_inputs([5, 2], tail=True))
    half = tensors | {"x": tensors["x"].bfloat16()}
    got = results(short_conv_triton, half, [5, 2])
    wide = results(
        short_conv_triton, tensors | {"x": half["x"].float(), "tail": tensors["tail"].bfloat16().float()}, [5, 2]
    )
    for name in ("y", "new_tail"):
        assert torch.equal(got[name], wide[name].bfloat16()), name
    dtypes = {"dx": torch.bfloat16, "dweight": torch.float32, "dbias": torch.float32, "dtail": torch.float32}
    assert {name: got[name].dtype for name in dtypes} == dtypes


def test_kernels_are_sound_operators(device):
    t, layout = on(device, conv_inputs([3, 0, 2], taps=3, tail=True)), JaggedLayout.from_lengths([3, 0, 2], device)
    x, tail, rows, ops = t["x"], t["tail"], (layout.position, layout.row_of_event), torch.ops.ssd_torchrec
    resumed, bare = (t["weight"], t["bias"], tail), (t["weight"], None, None)
    checks = ("test_schema", "test_faketensor")  # the gradient is outside the operators
    for op, args in (
        (ops.short_conv, (x, *resumed, *rows, "silu", False)),
        (ops.short_conv, (x, *bare, *rows, "silu", True)),
        (ops.short_conv_backward, (x, tail, x, *resumed, *rows, layout.offsets, "silu", False)),
        (ops.short_conv_backward, (x, None, x, *bare, *rows, layout.offsets, "silu", True)),
        (ops.short_conv_tail, (x, tail, layout.offsets, 2)),
        (ops.short_conv_tail, (x, None, layout.offsets, 2)),
        (ops.short_conv_tail_backward, (x, tail, x, *resumed, layout.offsets, "silu")),
        (ops.short_conv_tail_backward, (x, None, x, *resumed, layout.offsets, "silu")),
    ):
        torch.library.opcheck(op.default, args, test_utils=checks)


class Resumed(torch.nn.Module):
    def forward(self, x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor, layout_tensors: list[Tensor]) -> Any:
        offsets, row_of_event, position, last_event = layout_tensors
        layout = JaggedLayout(offsets, 9, row_of_event, position, last_event)
        return short_conv_triton(x, weight, bias, layout, activation="silu", tail=tail, return_tail=True)


def resumed_inputs(lengths: list[int], device: torch.device) -> tuple[Any, ...]:
    layout = JaggedLayout.from_lengths(lengths, device)
    tensors = [layout.offsets, layout.row_of_event, layout.position, layout.last_event]
    return *on(device, conv_inputs(lengths, tail=True)).values(), tensors


def test_kernels_compile_whole_for_any_size(device):
    compiled = torch.compile(Resumed(), fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ([3, 0, 9], [5, 5], [1, 7, 2, 4]):
        *tensors, rows = resumed_inputs(lengths, device)
        for t in tensors:
            t.requires_grad_()
        got, expected = compiled(*tensors, rows), Resumed()(*tensors, rows)
        grads = [torch.autograd.grad([o.cos().sum() for o in outputs], tensors) for outputs in (got, expected)]
        for a, b in zip((*got, *grads[0]), (*expected, *grads[1]), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_kernels_export_for_any_size(strict, device):
    events, rows = torch.export.Dim("events", min=2), torch.export.Dim("rows", min=2)
    layout = [{0: rows + 1}, {0: events}, {0: events}, {0: rows}]
    dynamic = {"x": {0: events}, "weight": None, "bias": None, "tail": {0: rows}, "layout_tensors": layout}
    example = resumed_inputs([3, 0, 9], device)
    program = torch.export.export(Resumed(), example, dynamic_shapes=dynamic, strict=strict)
    other = resumed_inputs([1, 7, 2, 4], device)
    for got, expected in zip(program.module()(*other), Resumed()(*other), strict=True):
        assert torch.equal(got, expected)


def test_fp64_takes_the_definition(device):
    tensors = {name: t.to(device) for name, t in conv_inputs([9, 2], tail=True).items()}
    assert torch.equal(call(short_conv, tensors, [9, 2]), call(short_conv_definition, tensors, [9, 2]))


def test_autocast_does_not_coarsen_the_sums():
    tensors = {name: t.float() for name, t in conv_inputs([40]).items()}
    plain = results(short_conv, tensors, [40])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = results(short_conv, tensors, [40])
    for name in plain:
        assert torch.equal(plain[name], cast[name]), name


@pytest.mark.parametrize("conv", NO_DEFINITION)
def test_second_backward_is_refused(conv, device):
    tensors = {name: t.requires_grad_() for name, t in on(device, conv_inputs([3])).items()}
    y = call(conv, tensors, [3])
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


def test_more_taps_than_kernels_hold_are_refused(device):
    with pytest.raises(ShapeError, match="at most 8 taps on the GPU, got 9"):
        call(short_conv_triton, on(device, conv_inputs([3], taps=9)), [3])


def test_what_is_no_floating_point_number_is_refused(device):
    tensors = on(device, conv_inputs([3]))
    with pytest.raises(DtypeError, match=r"float32, bfloat16 or float16, got torch\.int64"):
        call(short_conv, tensors | {"x": tensors["x"].long()}, [3])
    with pytest.raises(DtypeError, match=r"weight of short_conv must be a floating point tensor, got torch\.int64"):
        call(short_conv, tensors | {"weight": tensors["weight"].long()}, [3])
    with pytest.raises(DtypeError, match="bias on meta"):
        call(short_conv, tensors | {"bias": tensors["bias"].to("meta")}, [3])


def test_an_unknown_activation_is_refused():
    with pytest.raises(ConfigError, match="silu, hardswish or none, got 'relu'"):
        call(short_conv, conv_inputs([3]), [3], activation="relu")


@pytest.mark.parametrize("options", [{"tail": True}, {"return_tail": True}], ids=str)
def test_a_reversed_row_cannot_resume(options):
    tensors = conv_inputs([3], tail=options.pop("tail", False))
    with pytest.raises(ConfigError, match="reverse must come without a tail"):
        call(short_conv, tensors, [3], reverse=True, **options)
