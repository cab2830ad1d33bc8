import math

import pytest
import torch
from torch import Tensor

from ssd_torchrec.errors import DoubleBackwardError, DtypeError, JaggedLayoutError, ShapeError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.ops import selective_triton as kernels
from ssd_torchrec.ops.launch import INTERPRETED
from ssd_torchrec.ops.selective_scan import selective_scan, selective_scan_definition, selective_scan_stepped
from ssd_torchrec.ops.selective_triton import selective_scan_triton
from tests.golden import assert_golden, golden_cases, golden_tensors, gradients
from tests.numerics import assert_as_accurate_as_eager
from tests.ops.scans import POSITIONAL, call, results

ROWS = {
    "one-row": [5],
    "empty-and-short-rows": [3, 0, 7, 1, 2],
    "only-empty-rows": [0, 0],
    "no-rows": [],
}
PATHS = {"definition": selective_scan_definition, "stepped": selective_scan_stepped, "triton": selective_scan_triton}
IN_FP64 = {name: PATHS[name] for name in ("definition", "stepped")}
FAST = {name: PATHS[name] for name in ("stepped", "triton")}
DIRECTIONS = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
TOLERANCES = {  # of y, of final states, of gradients, against (1 + max |expected|)
    torch.float64: (1e-9, 1e-9, 1e-8),
    torch.float32: (None, 1e-5, 1e-5),  # y: ten times the noise of the published program in fp32
}


@pytest.fixture(autouse=True)
def chunks_take_few_events(monkeypatch):
    """In the interpreter: there a few events are to make many chunks, and to be soon done with."""
    if INTERPRETED:
        monkeypatch.setattr(kernels, "CHUNK", 2)


def selective_inputs(
    lengths: list[int],
    *,
    channels: int = 16,
    state: int = 5,
    fastest: float = 2.0,
    gate: bool = True,
    states: bool = True,
    seed: int = 0,
) -> dict[str, Tensor]:
    """By parameter name, in fp64; `fastest` is the largest decay rate."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    events = sum(lengths)
    tensors = {
        "x": normal(events, channels),
        "dt": normal(events, channels),
        "A": -fastest * (0.01 + torch.rand(channels, state, generator=rng, dtype=torch.float64)),
        "B": normal(events, state),
        "C": normal(events, state),
        "dt_bias": normal(channels),
        "D": normal(channels),
    }
    if gate:
        tensors["z"] = normal(events, channels)
    if states:
        tensors["initial_state"] = normal(len(lengths), channels, state)
    return tensors


def on(device: torch.device, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: t.to(device, dtype) for name, t in tensors.items()}


def judge(scan, tensors: dict[str, Tensor], lengths: list[int], **options) -> None:
    layout = JaggedLayout.from_lengths(lengths, tensors["x"].device)
    truth = results(selective_scan_definition, {n: t.double() for n, t in tensors.items()}, layout, **options)
    eager = results(selective_scan_definition, tensors, layout, **options)
    got = results(scan, tensors, layout, **options)
    for name in truth:
        assert_as_accurate_as_eager(name, got[name], eager[name], truth[name])


@pytest.mark.parametrize("case", golden_cases("G"))
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("scan", PATHS.values(), ids=PATHS)
def test_scan_is_the_published_one(scan, dtype, case, device):
    if dtype == torch.float64 and scan is selective_scan_triton:
        pytest.skip("kernels take fp64 nowhere")
    golden = golden_tensors(case)
    theirs = {"x": "u", "dt": "delta", "dt_bias": "delta_bias", "initial_state": "initial_states"}
    names = [*POSITIONAL, "dt_bias", "D", "z", "initial_state"]
    names = {ours: theirs.get(ours, ours) for ours in names if f"input.{theirs.get(ours, ours)}" in golden}
    inputs = {ours: golden[f"input.{name}"].to(device, dtype).requires_grad_() for ours, name in names.items()}
    layout = JaggedLayout.from_lengths(golden["input.offsets"].diff(), device)
    outputs = list(call(scan, inputs, layout, return_final_state=True))
    y_tolerance, state_tolerance, grad_tolerance = TOLERANCES[dtype]
    expected = golden["expected.y"].to(device)
    if y_tolerance is None:
        y_tolerance = 10 * case["fp32_noise"]["y"] / (1 + expected.abs().max().item())
    assert_golden("y", outputs[0], expected, y_tolerance)
    assert_golden("final_states", outputs[1], golden["expected.final_states"].to(device), state_tolerance)
    cotangents = [golden["input.grad_y"], golden.get("input.grad_final_states", torch.zeros(outputs[1].shape))]
    for ours, grad in gradients(outputs, cotangents, inputs).items():
        assert_golden(f"d{ours}", grad, golden[f"grad.{names[ours]}"].to(device), grad_tolerance)


@pytest.mark.parametrize("lengths", [*ROWS.values(), [70, 0, 1, 33, 64]], ids=[*ROWS, "long-rows"])
@DIRECTIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stepped_scan_is_as_accurate_as_eager(dtype, reverse, lengths, device):
    judge(selective_scan_stepped, on(device, selective_inputs(lengths), dtype), lengths, reverse=reverse)


@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS)
@DIRECTIONS
def test_kernels_are_as_accurate_as_eager(reverse, lengths, device):
    judge(selective_scan_triton, on(device, selective_inputs(lengths)), lengths, reverse=reverse)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kernels_are_as_accurate_as_eager_in_16_bits(dtype, device):
    lengths = ROWS["empty-and-short-rows"]
    judge(selective_scan_triton, on(device, selective_inputs(lengths), dtype), lengths)


@pytest.mark.parametrize(("channels", "state"), [(30, 1), (70, 2), (40, 16), (20, 32), (24, 48), (12, 128)])
def test_kernels_take_any_size(channels, state, device):
    lengths = [7, 3]
    judge(selective_scan_triton, on(device, selective_inputs(lengths, channels=channels, state=state)), lengths)


@pytest.mark.parametrize(("states", "reverse"), [(True, False), (False, True)], ids=["resumed", "from-nothing-reverse"])
def test_long_rows_are_cut_into_pieces(states, reverse, device, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", 2)
    monkeypatch.setattr(kernels, "PIECE", 4)
    monkeypatch.setattr(kernels, "LINKED_AT_ONCE", 2)
    lengths = [3, 0, 14, 1, 4]
    assert kernels._piece(sum(lengths), 1, max(lengths)) == 4
    judge(selective_scan_triton, on(device, selective_inputs(lengths, states=states)), lengths, reverse=reverse)


def test_gradients_of_few_channels_at_once_are_those_of_all(device, monkeypatch):
    lengths, channels, state = [3, 0, 1, 5], 70, 16
    inputs = on(device, selective_inputs(lengths, channels=channels, state=state))
    width = kernels._width(kernels._gradient_tile(state))
    blocks = math.ceil(channels / width)
    assert blocks == 3
    layout = JaggedLayout.from_lengths(lengths, device)
    together = results(selective_scan_triton, inputs, layout)
    events, chunks = sum(lengths), kernels.num_slots(sum(lengths), len(lengths), kernels.CHUNK)
    bytes_of_one = 4 * state * (2 * events + chunks * width)
    for at_once, portions in ((1, [1, 1, 1]), (2, [2, 1])):
        monkeypatch.setattr(kernels, "GRADIENT_BYTES", at_once * bytes_of_one)
        assert [len(of) for of in kernels._portions(blocks, bytes_of_one)] == portions
        apart = results(selective_scan_triton, inputs, layout)
        for name, value in together.items():
            torch.testing.assert_close(apart[name], value, rtol=0, atol=1e-6 * float(value.abs().max()))


@pytest.mark.parametrize("scan", FAST.values(), ids=FAST)
@pytest.mark.parametrize("fastest", [1e-4, 50.0], ids=["slow", "fast"])
def test_extreme_decays_are_as_accurate_as_eager(fastest, scan, device):
    lengths = [17, 3]
    judge(scan, on(device, selective_inputs(lengths, fastest=fastest)), lengths)


@pytest.mark.parametrize("scan", FAST.values(), ids=FAST)
def test_decays_beyond_the_dtype_leave_nothing(scan, device):
    tensors, layout = on(device, selective_inputs([9, 3], fastest=1e5)), JaggedLayout.from_lengths([9, 3], device)
    truth = results(selective_scan_definition, {n: t.double() for n, t in tensors.items()}, layout)
    for name, got in results(scan, tensors, layout).items():
        torch.testing.assert_close(
            got, truth[name].float(), rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("scan", IN_FP64.values(), ids=IN_FP64)
@DIRECTIONS
def test_derivative_is_the_derivative(scan, reverse):
    lengths = [3, 0, 5]
    layout, tensors = JaggedLayout.from_lengths(lengths), selective_inputs(lengths, channels=2, state=2)

    def named(*values):
        return call(scan, dict(zip(tensors, values, strict=True)), layout, reverse=reverse, return_final_state=True)

    assert torch.autograd.gradcheck(named, tuple(t.requires_grad_() for t in tensors.values()))


@pytest.mark.parametrize("scan", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("lengths", [[], [0, 0], [0, 2, 0]], ids=str)
def test_nothing_in_still_reaches_every_input(scan, lengths, device):
    tensors = on(device, selective_inputs(lengths))
    for name, value in results(scan, tensors, JaggedLayout.from_lengths(lengths, device)).items():
        assert value.isfinite().all()
        assert not name.startswith("d") or value.shape == tensors[name[1:]].shape


@pytest.mark.parametrize("scan", FAST.values(), ids=FAST)
@pytest.mark.parametrize("lengths", [[0, 2], [0, 0]], ids=str)
def test_empty_row_keeps_its_state(scan, lengths, device):
    tensors, layout = on(device, selective_inputs(lengths)), JaggedLayout.from_lengths(lengths, device)
    _, final = call(scan, tensors, layout, return_final_state=True)
    assert torch.equal(final[0], tensors["initial_state"][0])
    del tensors["initial_state"]
    _, final = call(scan, tensors, layout, return_final_state=True)
    assert not final[0].any()


@pytest.mark.parametrize("scan", FAST.values(), ids=FAST)
def test_long_steps_are_taken_as_they_are(scan, device):
    """softplus is the identity above 20, so that the step of 25 is 25 to the last digit."""
    tensors = on(device, selective_inputs([1], gate=False, states=False))
    tensors |= {"dt": torch.full((1, 16), 25.0, device=device)}
    del tensors["dt_bias"], tensors["D"]
    _, final = call(scan, tensors, JaggedLayout.from_lengths([1], device), return_final_state=True)
    torch.testing.assert_close(final[0], 25 * tensors["x"][0, :, None] * tensors["B"][0], rtol=3e-7, atol=0)


@pytest.mark.parametrize("raw", [-1e12, -80.0, -12.0, -3.0, 0.0, 3.0, 12.0, 30.0])
def test_steps_are_as_accurate_as_eager(raw, device):
    """Each of them alone: a step that is small beside others could be all wrong, and not be noticed."""
    tensors = on(device, selective_inputs([1], gate=False, states=False))
    tensors["dt"] = raw + tensors["dt"].sigmoid()
    tensors |= {"dt_bias": torch.zeros(16, device=device), "D": torch.zeros(16, device=device)}
    judge(selective_scan_triton, tensors, [1])


def test_fp64_takes_the_definition(device):
    tensors = on(device, selective_inputs([9, 2]), torch.float64)
    layout = JaggedLayout.from_lengths([9, 2], device)
    got, definition = (call(scan, tensors, layout) for scan in (selective_scan, selective_scan_definition))
    assert torch.equal(got, definition)


def test_the_door_picks_by_device(device):
    tensors, layout = on(device, selective_inputs([9, 2])), JaggedLayout.from_lengths([9, 2], device)
    picked = selective_scan_triton if device.type == "cuda" else selective_scan_stepped
    assert torch.equal(call(selective_scan, tensors, layout), call(picked, tensors, layout))


@pytest.mark.parametrize("scan", PATHS.values(), ids=PATHS)
def test_gate_and_skip_are_what_they_say(scan, device):
    tensors, layout = on(device, selective_inputs([3, 2])), JaggedLayout.from_lengths([3, 2], device)
    bare = call(scan, {name: t for name, t in tensors.items() if name not in ("D", "z")}, layout)
    expected = (bare + tensors["D"] * tensors["x"]) * tensors["z"] * tensors["z"].sigmoid()
    torch.testing.assert_close(call(scan, tensors, layout), expected)


@pytest.mark.parametrize("scan", FAST.values(), ids=FAST)
def test_dtypes_come_back_as_promised(scan, device):
    tensors, layout = on(device, selective_inputs([3])), JaggedLayout.from_lengths([3], device)
    tensors |= {name: tensors[name].bfloat16() for name in ("x", "dt", "B", "C", "z")}  # as autocast leaves them
    got = results(scan, tensors, layout)
    assert (got["y"].dtype, got["final_state"].dtype) == (torch.bfloat16, torch.float32)
    assert all(got[f"d{name}"].dtype == t.dtype for name, t in tensors.items())


@pytest.mark.parametrize("scan", FAST.values(), ids=FAST)
def test_autocast_does_not_coarsen_the_sums(scan, device):
    tensors, layout = on(device, selective_inputs([9])), JaggedLayout.from_lengths([9], device)
    plain = results(scan, tensors, layout)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        cast = results(scan, tensors, layout)
    for name in plain:
        assert torch.equal(plain[name], cast[name]), name


@pytest.mark.parametrize("scan", FAST.values(), ids=FAST)
def test_events_may_be_parts_of_a_projection(scan, device):
    """And a cotangent may be an expanded number."""
    tensors, layout = on(device, selective_inputs([3, 2], state=4)), JaggedLayout.from_lengths([3, 2], device)
    names = ("x", "z", "dt", "B", "C")
    parts = torch.cat([tensors[name] for name in names], dim=1).split([16, 16, 16, 4, 4], dim=1)
    apart = tensors | dict(zip(names, parts, strict=True))
    (y, dx), (y_apart, dx_apart) = (_with_gradient(scan, t, layout) for t in (tensors, apart))
    assert torch.equal(y, y_apart)
    assert torch.equal(dx, dx_apart)


def _with_gradient(scan, tensors: dict[str, Tensor], layout: JaggedLayout) -> tuple[Tensor, Tensor]:
    x = tensors["x"].detach().requires_grad_()
    y = call(scan, tensors | {"x": x}, layout)
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


@pytest.mark.parametrize("scan", FAST.values(), ids=FAST)
def test_second_backward_is_refused(scan, device):
    tensors = {name: t.requires_grad_() for name, t in on(device, selective_inputs([3])).items()}
    y = call(scan, tensors, JaggedLayout.from_lengths([3], device))
    with pytest.raises(DoubleBackwardError, match=r"selective_scan.*pass float64"):
        torch.autograd.grad(y.sum(), tensors["x"], create_graph=True)


BROKEN = {
    "dt": (torch.zeros(3, 5), r"dt must be \(3, 16\), got \(3, 5\)"),
    "A": (torch.zeros(16), r"A must be \(16, 5\), got \(16,\)"),
    "B": (torch.zeros(3, 1, 5), r"x must be \(T, E\) and B \(T, N\)"),
    "C": (torch.zeros(3, 6), r"C must be \(3, 5\)"),
    "D": (torch.zeros(1), r"D must be \(16,\)"),
    "dt_bias": (torch.zeros(16, 1), r"dt_bias must be \(16,\)"),
    "z": (torch.zeros(3, 12), r"z must be \(3, 16\)"),
    "initial_state": (torch.zeros(2, 16, 5), r"initial_state must be \(1, 16, 5\)"),
    "x": (torch.zeros(3, 4, 4), r"x must be \(T, E\)"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_shapes_that_do_not_fit_are_refused(name):
    value, message = BROKEN[name]
    with pytest.raises(ShapeError, match=message):
        call(selective_scan, selective_inputs([3]) | {name: value}, JaggedLayout.from_lengths([3]))


def test_growing_states_are_refused():
    with pytest.raises(ShapeError, match=r"A must be at most 0, got 1; pass -A_log.exp\(\)"):
        call(selective_scan, selective_inputs([3]) | {"A": torch.ones(16, 5)}, JaggedLayout.from_lengths([3]))


def test_events_of_another_batch_are_refused():
    with pytest.raises(JaggedLayoutError, match=r"events must be \(4, ...\)"):
        call(selective_scan, selective_inputs([3]), JaggedLayout.from_lengths([4]))


def test_kernels_refuse_what_no_warp_takes(device):
    layout = JaggedLayout.from_lengths([3], device)
    with pytest.raises(ShapeError, match="N must be at most 128 on the GPU, got 129"):
        call(selective_scan_triton, on(device, selective_inputs([3], state=129)), layout)
    with pytest.raises(DtypeError, match="selective_scan must be given float32, bfloat16 or float16"):
        call(selective_scan_triton, on(device, selective_inputs([3]), torch.float64), layout)
    whole = on(device, selective_inputs([3])) | {"A": torch.zeros(16, 5, dtype=torch.int64, device=device)}
    with pytest.raises(DtypeError, match="A of selective_scan must be a floating point tensor"):
        call(selective_scan_triton, whole, layout)
