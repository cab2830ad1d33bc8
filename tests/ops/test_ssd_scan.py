import pytest
import torch

from ssd_torchrec.errors import DoubleBackwardError, JaggedLayoutError, ShapeError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.ops.ssd_scan import ssd_scan, ssd_scan_chunked, ssd_scan_definition
from tests.golden import assert_golden, golden_cases, golden_tensors, gradients
from tests.numerics import assert_as_accurate_as_eager
from tests.ops.scans import call, results, scan_inputs

ROWS = {
    "one-row": [5],
    "empty-row-inside": [3, 0, 7, 1],
    "many-chunks": [70, 0, 1, 33, 32, 31, 64, 65],
    "only-empty-rows": [0, 0],
    "no-rows": [],
}
PATHS = {"definition": ssd_scan_definition, "chunked": ssd_scan_chunked}
HEADS = 16  # enough values of a head's parameter for a root mean square to mean something
TOLERANCES = {  # of y, of final states, of gradients, against (1 + max |expected|)
    torch.float64: (1e-9, 1e-9, 1e-8),
    torch.float32: (None, 1e-5, 1e-5),  # y: ten times the noise of the published program in fp32
}


@pytest.mark.parametrize("case", golden_cases("F"))
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("scan", PATHS.values(), ids=PATHS)
def test_scan_is_the_published_one(scan, dtype, case, device):
    golden = golden_tensors(case)
    names = [
        "x",
        "dt",
        "A",
        "B",
        "C",
        "dt_bias",
        "D",
        *(n for n in ("gate", "initial_states") if f"input.{n}" in golden),
    ]
    inputs = {n: golden[f"input.{n}"].to(device, dtype).requires_grad_() for n in names}
    layout = JaggedLayout.from_lengths(golden["input.offsets"].diff(), device)
    gated = {n: t for n, t in inputs.items() if n != "gate"}
    gated["dt"] = inputs["dt"] * inputs.get("gate", 1)  # a time gate multiplies the raw step, outside
    if "initial_states" in gated:
        gated["initial_state"] = gated.pop("initial_states")
    outputs = list(call(scan, gated, layout, return_final_state=True))
    y_tolerance, state_tolerance, grad_tolerance = TOLERANCES[dtype]
    expected = golden["expected.y"].to(device)
    if y_tolerance is None:
        y_tolerance = 10 * case["fp32_noise"]["y"] / (1 + expected.abs().max().item())
    assert_golden("y", outputs[0], expected, y_tolerance)
    if "expected.final_states" in golden:
        assert_golden("final_states", outputs[1], golden["expected.final_states"].to(device), state_tolerance)
    cotangents = [golden["input.grad_y"], golden.get("input.grad_final_states", torch.zeros(outputs[1].shape))]
    for name, grad in gradients(outputs, cotangents, inputs).items():
        assert_golden(f"d{name}", grad, golden[f"grad.{name}"].to(device), grad_tolerance)


@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunked_scan_is_as_accurate_as_eager(dtype, reverse, groups, lengths, device):
    layout = JaggedLayout.from_lengths(lengths, device)
    tensors = {n: t.to(device, dtype) for n, t in scan_inputs(lengths, heads=HEADS, groups=groups).items()}
    wide = {name: t.double() for name, t in tensors.items()}
    truth = results(ssd_scan_definition, wide, layout, reverse=reverse)
    eager = results(ssd_scan_definition, tensors, layout, reverse=reverse)
    got = results(ssd_scan_chunked, tensors, layout, reverse=reverse)
    for name in truth:
        assert_as_accurate_as_eager(name, got[name], eager[name], truth[name])


@pytest.mark.parametrize("fastest", [1e-4, 50.0], ids=["slow", "fast"])
def test_extreme_decays_are_as_accurate_as_eager(fastest, device):
    lengths = [70, 3, 40]
    layout = JaggedLayout.from_lengths(lengths, device)
    tensors = {n: t.to(device, torch.float32) for n, t in scan_inputs(lengths, heads=HEADS, fastest=fastest).items()}
    truth = results(ssd_scan_definition, {n: t.double() for n, t in tensors.items()}, layout)
    eager = results(ssd_scan_definition, tensors, layout)
    got = results(ssd_scan_chunked, tensors, layout)
    for name in truth:
        assert_as_accurate_as_eager(name, got[name], eager[name], truth[name])


def test_decays_beyond_the_dtype_leave_nothing(device):
    lengths = [70, 3]
    layout = JaggedLayout.from_lengths(lengths, device)
    tensors = {n: t.to(device, torch.float32) for n, t in scan_inputs(lengths, fastest=1e5).items()}
    truth = results(ssd_scan_definition, {n: t.double() for n, t in tensors.items()}, layout)
    for name, got in results(ssd_scan_chunked, tensors, layout).items():
        torch.testing.assert_close(
            got, truth[name].float(), rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("scan", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_derivative_is_the_derivative(scan, reverse):
    lengths = [3, 0, 5]
    layout = JaggedLayout.from_lengths(lengths)
    tensors = scan_inputs(lengths, heads=2, channels=2, state=2, groups=2)
    options = {"chunk": 2} if scan is ssd_scan_chunked else {}

    def named(*values):
        given = dict(zip(tensors, values, strict=True))
        return call(scan, given, layout, reverse=reverse, return_final_state=True, **options)

    assert torch.autograd.gradcheck(named, tuple(t.requires_grad_() for t in tensors.values()))


@pytest.mark.parametrize("scan", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("lengths", [[], [0, 0], [0, 2, 0]], ids=str)
def test_nothing_in_still_reaches_every_input(scan, lengths):
    tensors = scan_inputs(lengths)
    for name, value in results(scan, tensors, JaggedLayout.from_lengths(lengths)).items():
        assert value.shape == tensors[name.removeprefix("d")].shape if name.startswith("d") else True
        assert value.isfinite().all()


def test_empty_row_keeps_its_state():
    lengths = [0, 2]
    tensors = {name: t.float() for name, t in scan_inputs(lengths).items()}
    _, final = call(ssd_scan, tensors, JaggedLayout.from_lengths(lengths), return_final_state=True)
    assert torch.equal(final[0], tensors["initial_state"][0])
    del tensors["initial_state"]
    _, final = call(ssd_scan, tensors, JaggedLayout.from_lengths(lengths), return_final_state=True)
    assert not final[0].any()


def test_long_steps_are_taken_as_they_are():
    """softplus is the identity above 20, so that the step of 25 is 25 to the last digit."""
    tensors = {name: t.float() for name, t in scan_inputs([1], gate=False, states=False).items()}
    tensors |= {"dt": torch.full((1, 4), 25.0), "dt_bias": torch.zeros(4), "D": torch.zeros(4)}
    _, final = call(ssd_scan, tensors, JaggedLayout.from_lengths([1]), return_final_state=True)
    torch.testing.assert_close(final[0], 25 * tensors["x"][0, ..., None] * tensors["B"][0, :, None])


def test_fp64_takes_the_definition(device):
    tensors = {name: t.to(device) for name, t in scan_inputs([9, 2]).items()}
    layout = JaggedLayout.from_lengths([9, 2], device)
    got, definition = (call(scan, tensors, layout) for scan in (ssd_scan, ssd_scan_definition))
    assert torch.equal(got, definition)


@pytest.mark.parametrize("scan", PATHS.values(), ids=PATHS)
def test_gate_and_skip_are_what_they_say(scan):
    tensors, layout = scan_inputs([5, 2]), JaggedLayout.from_lengths([5, 2])
    bare = call(scan, {name: t for name, t in tensors.items() if name not in ("D", "z")}, layout)
    expected = (bare + tensors["D"][:, None] * tensors["x"]) * tensors["z"] * tensors["z"].sigmoid()
    torch.testing.assert_close(call(scan, tensors, layout), expected)


def test_dtypes_come_back_as_promised():
    tensors = {name: t.float() for name, t in scan_inputs([3]).items()}
    tensors |= {name: tensors[name].bfloat16() for name in ("x", "B", "C", "z")}  # as autocast leaves them
    y, final = call(ssd_scan, tensors, JaggedLayout.from_lengths([3]), return_final_state=True)
    assert (y.dtype, final.dtype) == (torch.bfloat16, torch.float32)


def test_autocast_does_not_coarsen_the_sums():
    tensors = {name: t.float() for name, t in scan_inputs([40]).items()}
    layout = JaggedLayout.from_lengths([40])
    plain = results(ssd_scan, tensors, layout)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = results(ssd_scan, tensors, layout)
    for name in plain:
        assert torch.equal(plain[name], cast[name]), name


def test_second_backward_is_refused():
    tensors = {name: t.float().requires_grad_() for name, t in scan_inputs([3]).items()}
    y = call(ssd_scan, tensors, JaggedLayout.from_lengths([3]))
    with pytest.raises(DoubleBackwardError, match=r"ssd_scan.*pass float64"):
        torch.autograd.grad(y.sum(), tensors["x"], create_graph=True)


BROKEN = {
    "dt": (torch.zeros(3, 5), r"dt must be \(3, 4\), got \(3, 5\)"),
    "A": (torch.zeros(5), r"A must be \(4,\), got \(5,\)"),
    "B": (torch.zeros(3, 3, 5), "H a multiple of G"),
    "C": (torch.zeros(3, 1, 6), r"C must be \(3, 1, 5\)"),
    "D": (torch.zeros(1), r"D must be \(4,\)"),
    "dt_bias": (torch.zeros(4, 1), r"dt_bias must be \(4,\)"),
    "z": (torch.zeros(3, 12), r"z must be \(3, 4, 3\)"),
    "initial_state": (torch.zeros(2, 4, 3, 5), r"initial_state must be \(1, 4, 3, 5\)"),
    "x": (torch.zeros(3, 12), r"x must be \(T, H, P\)"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_shapes_that_do_not_fit_are_refused(name):
    value, message = BROKEN[name]
    with pytest.raises(ShapeError, match=message):
        call(ssd_scan, scan_inputs([3]) | {name: value}, JaggedLayout.from_lengths([3]))


def test_growing_states_are_refused():
    tensors = scan_inputs([3])
    with pytest.raises(ShapeError, match=r"A must be at most 0, got 1; pass -A_log.exp\(\)"):
        call(ssd_scan, tensors | {"A": torch.ones(4)}, JaggedLayout.from_lengths([3]))


def test_events_of_another_batch_are_refused():
    with pytest.raises(JaggedLayoutError, match=r"events must be \(4, ...\)"):
        call(ssd_scan, scan_inputs([3]), JaggedLayout.from_lengths([4]))
