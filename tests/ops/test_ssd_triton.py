"""The kernels of the scan: as exact as plain PyTorch, and blind to everything but their own row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssd_torchrec.errors import DoubleBackwardError, ShapeError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.ops import ssd_carry, ssd_sizes
from ssd_torchrec.ops.ssd_scan import ssd_scan_definition
from ssd_torchrec.ops.ssd_triton import ssd_scan_triton
from tests.golden import assert_golden, golden_cases, golden_tensors, gradients
from tests.numerics import assert_as_accurate_as_eager
from tests.ops.scans import HEADS, call, results, results_without_states, scan_inputs

ROWS = {
    "one-row": [5],
    "empty-row-inside": [18, 0, 1, 16],
    "only-empty-rows": [0, 0],
    "no-rows": [],
}
EVENTS = ("x", "dt", "B", "C", "z")
SLOW = pytest.mark.slow  # of several seconds in the interpreter, and much like another
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # of tests that hypothesis runs many times
few = settings(max_examples=4, derandomize=True, deadline=None)
row_lengths = st.lists(st.integers(0, 20), min_size=1, max_size=3)


@pytest.fixture(params=[1, 10**9], ids=["row-by-row", "side-by-side"])
def programs(request, monkeypatch):
    """A GPU that few rows fill takes a row's chunks one after the other, one that many do not takes them at once."""
    monkeypatch.setattr(ssd_sizes, "PROGRAMS", request.param)


def on(device: torch.device, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: t.to(device, dtype) for name, t in tensors.items()}


def assert_accurate(tensors: dict[str, Tensor], layout: JaggedLayout, reverse: bool = False, **options: int) -> None:
    truth = results(ssd_scan_definition, {n: t.double() for n, t in tensors.items()}, layout, reverse=reverse)
    eager = results(ssd_scan_definition, tensors, layout, reverse=reverse)
    got = results(ssd_scan_triton, tensors, layout, reverse=reverse, **options)
    for name in truth:
        assert_as_accurate_as_eager(name, got[name], eager[name], truth[name])


@pytest.mark.parametrize("case", golden_cases("F"))
def test_scan_is_the_published_one(case, device):
    golden = golden_tensors(case)
    given_names = [n for n in ("gate", "initial_states") if f"input.{n}" in golden]
    names = ["x", "dt", "A", "B", "C", "dt_bias", "D", *given_names]
    inputs = {n: golden[f"input.{n}"].to(device).requires_grad_() for n in names}
    layout = JaggedLayout.from_lengths(golden["input.offsets"].diff(), device)
    gated = {n: t for n, t in inputs.items() if n != "gate"}
    gated["dt"] = inputs["dt"] * inputs.get("gate", 1)
    if "initial_states" in gated:
        gated["initial_state"] = gated.pop("initial_states")
    outputs = list(call(ssd_scan_triton, gated, layout, return_final_state=True))
    expected = golden["expected.y"].to(device)
    assert_golden("y", outputs[0], expected, 10 * case["fp32_noise"]["y"] / (1 + expected.abs().max().item()))
    cotangents = [golden["input.grad_y"], golden.get("input.grad_final_states", torch.zeros(outputs[1].shape))]
    for name, grad in gradients(outputs, cotangents, inputs).items():
        assert_golden(f"d{name}", grad, golden[f"grad.{name}"].to(device), 1e-5)


@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize(("reverse", "groups"), [(False, 1), pytest.param(True, 2, marks=SLOW)])
def test_kernels_are_as_accurate_as_eager(reverse, groups, lengths, programs, device):
    tensors = on(device, scan_inputs(lengths, heads=HEADS, groups=groups, seed=1))
    assert_accurate(tensors, JaggedLayout.from_lengths(lengths, device), reverse, chunk=16)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_longer_chunks_are_as_accurate_as_eager(reverse, device):
    lengths = [35]
    tensors = on(device, scan_inputs(lengths, heads=HEADS, channels=16, state=16))
    assert_accurate(tensors, JaggedLayout.from_lengths(lengths, device), reverse, chunk=32)


@pytest.mark.parametrize(
    ("programs", "reverse", "states", "lengths"),
    [(10**9, False, True, [33, 0]), (1, True, False, [3, 34])],
    indirect=["programs"],
    ids=["side-by-side-forward-resumed", "row-by-row-reverse-fresh"],
)
def test_pieces_of_long_rows_are_as_accurate_as_eager(programs, reverse, states, lengths, device):
    tensors = on(device, scan_inputs(lengths, heads=HEADS, states=states))
    assert_accurate(tensors, JaggedLayout.from_lengths(lengths, device), reverse, chunk=16, piece=16)


def test_more_pieces_than_are_scanned_at_once_are_as_accurate_as_eager(device):
    lengths = [16 * (ssd_carry.PIECES_AT_ONCE + 2) + 5]
    tensors = on(device, scan_inputs(lengths, heads=1, gate=False))
    truth = results(
        ssd_scan_definition, {n: t.double() for n, t in tensors.items()}, JaggedLayout.from_lengths(lengths, device)
    )
    got = results(ssd_scan_triton, tensors, JaggedLayout.from_lengths(lengths, device), chunk=16, piece=16)
    for name in truth:
        torch.testing.assert_close(
            got[name].double(), truth[name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_rows_of_one_chunk_take_a_way_of_their_own(device):
    lengths = [9, 0, 16, 1]
    tensors = on(device, scan_inputs(lengths, heads=HEADS, states=False))
    layout = JaggedLayout.from_lengths(lengths, device)
    wide = {name: t.double() for name, t in tensors.items()}
    truth, eager = (results_without_states(ssd_scan_definition, t, layout) for t in (wide, tensors))
    got = results_without_states(ssd_scan_triton, tensors, layout, chunk=16)  # a state would ask for a carry
    for name in truth:
        assert_as_accurate_as_eager(name, got[name], eager[name], truth[name])


@pytest.mark.parametrize(
    ("fastest", "reverse"),
    [(1e-4, False), (800.0, True), pytest.param(1e-4, True, marks=SLOW), pytest.param(800.0, False, marks=SLOW)],
)
def test_extreme_decays_are_as_accurate_as_eager(fastest, reverse, device):
    lengths = [20]
    tensors = on(device, scan_inputs(lengths, heads=HEADS, fastest=fastest))
    assert_accurate(tensors, JaggedLayout.from_lengths(lengths, device), reverse, chunk=16)


@pytest.mark.parametrize(
    ("programs", "dtype"),
    [
        (1, torch.bfloat16),
        (10**9, torch.float16),
        pytest.param(1, torch.float16, marks=SLOW),
        pytest.param(10**9, torch.bfloat16, marks=SLOW),
    ],
    indirect=["programs"],
    ids=["row-by-row-bfloat16", "side-by-side-float16", "row-by-row-float16", "side-by-side-bfloat16"],
)
def test_sixteen_bits_are_as_accurate_as_eager(dtype, programs, device):
    lengths = [3, 0, 18]
    tensors = on(device, scan_inputs(lengths, heads=HEADS), dtype)
    assert_accurate(tensors, JaggedLayout.from_lengths(lengths, device), chunk=16)


@few
@given(lengths=row_lengths, more=row_lengths, reverse=st.booleans(), piece=st.sampled_from([0, 16]))
def test_a_row_does_not_know_its_batch(lengths, more, reverse, piece):
    """Bit for bit, in values and in the gradients of events; but z's are PyTorch's, whose vectors have other tails."""
    tensors = on(DEVICE, scan_inputs([*lengths, *more], heads=1, gate=False))
    events, rows = sum(lengths), len(lengths)
    alone = {n: t[:events] if n in EVENTS else t for n, t in tensors.items()}
    alone["initial_state"] = tensors["initial_state"][:rows]
    options = {"reverse": reverse, "chunk": 16, "piece": piece}
    got = results(ssd_scan_triton, tensors, JaggedLayout.from_lengths([*lengths, *more], DEVICE), **options)
    expected = results(ssd_scan_triton, alone, JaggedLayout.from_lengths(lengths, DEVICE), **options)
    for name in ("y", "final_state", "dx", "ddt", "dB", "dC", "dinitial_state"):
        assert torch.equal(got[name][: len(expected[name])], expected[name]), name


@few
@given(lengths=row_lengths, seed=st.integers(0, 99), reverse=st.booleans())
def test_rows_may_come_in_any_order(lengths, seed, reverse):
    tensors = on(DEVICE, scan_inputs(lengths, heads=1))
    row = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    layout = JaggedLayout.from_lengths(lengths, DEVICE)
    event = torch.cat([torch.arange(layout.offsets[r], layout.offsets[r + 1]) for r in row.tolist()]).long().to(DEVICE)
    moved = tensors | {n: t[event] for n, t in tensors.items() if n in EVENTS}
    moved["initial_state"] = tensors["initial_state"][row]
    options = {"reverse": reverse, "return_final_state": True, "chunk": 16}
    y, final = call(ssd_scan_triton, tensors, layout, **options)
    y_moved, final_moved = call(
        ssd_scan_triton, moved, JaggedLayout.from_lengths([lengths[r] for r in row.tolist()], DEVICE), **options
    )
    assert torch.equal(y_moved, y[event])
    assert torch.equal(final_moved, final[row])


@few
@given(lengths=row_lengths)
def test_backwards_is_forwards_on_turned_rows(lengths):
    tensors = on(DEVICE, scan_inputs(lengths, heads=1))
    layout = JaggedLayout.from_lengths(lengths, DEVICE)
    row = layout.row_of_event
    turned = layout.offsets[row] + layout.offsets[row + 1] - 1 - torch.arange(sum(lengths), device=DEVICE)
    forward = tensors | {n: t[turned] for n, t in tensors.items() if n in EVENTS}
    y, final = call(ssd_scan_triton, tensors, layout, reverse=True, return_final_state=True, chunk=16)
    y_turned, final_turned = call(ssd_scan_triton, forward, layout, return_final_state=True, chunk=16)
    torch.testing.assert_close(y[turned], y_turned)
    torch.testing.assert_close(final, final_turned)


@pytest.mark.parametrize(
    ("programs", "piece", "reverse"),
    [
        (1, 0, False),
        (10**9, 0, False),
        (10**9, 16, True),
        *(pytest.param(*way, marks=SLOW) for way in [(1, 0, True), (10**9, 0, True), (1, 16, False), (1, 16, True)]),
        pytest.param(10**9, 16, False, marks=SLOW),
    ],
    indirect=["programs"],
)
def test_nothing_crosses_rows(piece, reverse, programs, device):
    lengths = [18, 20, 3]
    tensors = on(device, scan_inputs(lengths, heads=2, states=False))
    poisoned = {n: t.clone() for n, t in tensors.items()}
    for name in EVENTS:
        poisoned[name][18:38] = torch.nan
    layout = JaggedLayout.from_lengths(lengths, device)
    clean, dirty = (
        results(ssd_scan_triton, t, layout, reverse=reverse, chunk=16, piece=piece) for t in (tensors, poisoned)
    )
    for name in ("y", *(f"d{n}" for n in EVENTS)):
        for rows in (slice(18), slice(38, None)):
            assert torch.equal(dirty[name][rows], clean[name][rows]), name


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_an_event_changes_only_what_comes_after_it(reverse, device):
    lengths, changed = [40], 21
    tensors = on(device, scan_inputs(lengths, heads=2))
    layout = JaggedLayout.from_lengths(lengths, device)
    y = call(ssd_scan_triton, tensors, layout, reverse=reverse, chunk=16)
    for name in EVENTS:
        other = tensors | {name: tensors[name].clone()}
        other[name][changed] += 1
        differs = (call(ssd_scan_triton, other, layout, reverse=reverse, chunk=16) != y).flatten(1).any(1)
        assert differs[changed], name
        assert not differs[changed + 1 :].any() if reverse else not differs[:changed].any(), name


def test_the_same_run_gives_the_same_bits(device):
    lengths = [40, 3]
    tensors = on(device, scan_inputs(lengths, heads=2))
    layout = JaggedLayout.from_lengths(lengths, device)
    first, second = (results(ssd_scan_triton, tensors, layout, chunk=16) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_events_may_be_parts_of_a_projection(device):
    """No copy is made of them, and rows lie apart: their places follow their strides."""
    lengths = [20, 3]
    layout = JaggedLayout.from_lengths(lengths, device)
    tensors = on(device, scan_inputs(lengths, heads=2, channels=4, state=6))
    projected = torch.randn(23, 8 + 6 + 6 + 5, device=device)
    x, B, C, _ = projected.split([8, 6, 6, 5], dim=-1)
    parts = tensors | {"x": x.unflatten(-1, (2, 4)), "B": B[:, None], "C": C[:, None]}
    whole = {name: t.contiguous() for name, t in parts.items()}
    expected = results(ssd_scan_triton, whole, layout, chunk=16)

    inputs = parts | {"projected": projected.clone().requires_grad_()}
    x, B, C, _ = inputs.pop("projected").split([8, 6, 6, 5], dim=-1)
    y = call(
        ssd_scan_triton, inputs | {"x": x.unflatten(-1, (2, 4)), "B": B[:, None], "C": C[:, None]}, layout, chunk=16
    )
    assert torch.equal(y, expected["y"])


def test_state_too_large_for_a_tile_is_refused(device):
    tensors = on(device, scan_inputs([3], heads=1, channels=65, state=65))
    with pytest.raises(ShapeError, match="64 x 128, got 65 channels and state 65; use more heads"):
        call(ssd_scan_triton, tensors, JaggedLayout.from_lengths([3], device))


def test_second_backward_is_refused(device):
    tensors = {n: t.requires_grad_() for n, t in on(device, scan_inputs([3])).items()}
    y = call(ssd_scan_triton, tensors, JaggedLayout.from_lengths([3], device))
    with pytest.raises(DoubleBackwardError, match=r"ssd_scan.*pass float64"):
        torch.autograd.grad(y.sum(), tensors["x"], create_graph=True)


def test_kernels_are_sound_operators(device):
    lengths = [3, 0, 20]
    offsets = JaggedLayout.from_lengths(lengths, device).offsets
    t = on(device, scan_inputs(lengths, heads=2))
    inputs = [t["x"], t["dt"], t["A"], t["B"], t["C"], offsets, t["dt_bias"], t["D"]]
    checks = ("test_schema", "test_faketensor")  # the gradient is outside the operators
    forward = torch.ops.ssd_torchrec.ssd_scan.default
    torch.library.opcheck(
        forward, (*inputs, t["z"], t["initial_state"], 20, True, False, True, True, 16, 0), test_utils=checks
    )
    torch.library.opcheck(forward, (*inputs, None, None, 20, False, True, False, False, 16, 0), test_utils=checks)
    backward = torch.ops.ssd_torchrec.ssd_scan_backward.default
    final = t["initial_state"]
    options = (t["initial_state"], 20, True, False, 16, 0)
    torch.library.opcheck(backward, (t["x"], final, *inputs, *options), test_utils=checks)


class Scan(torch.nn.Module):
    def forward(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, offsets: Tensor) -> Tensor:
        unused = offsets.new_zeros(x.shape[0])
        layout = JaggedLayout(offsets, 20, unused, unused, offsets[1:])
        return ssd_scan_triton(x, dt, A, B, C, layout, chunk=16)


def example(lengths: list[int], device: torch.device) -> list[Tensor]:
    t = on(device, scan_inputs(lengths, heads=2))
    return [*(t[n] for n in ("x", "dt", "A", "B", "C")), JaggedLayout.from_lengths(lengths, device).offsets]


def test_scan_compiles_whole_for_any_size(device):
    compiled = torch.compile(Scan(), fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ([3, 0, 20], [5, 5], [1, 19, 2, 4]):
        inputs = example(lengths, device)
        inputs[0].requires_grad_()
        got, expected = compiled(*inputs), Scan()(*inputs)
        assert torch.equal(got, expected)
        assert torch.equal(*(torch.autograd.grad(y.sum(), inputs[0])[0] for y in (got, expected)))


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_scan_exports_for_any_size(strict, device):
    events, ends = torch.export.Dim("events"), torch.export.Dim("ends", min=3)
    dynamic = {"x": {0: events}, "dt": {0: events}, "A": None, "B": {0: events}, "C": {0: events}, "offsets": {0: ends}}
    inputs = example([3, 0, 20], device)
    program = torch.export.export(Scan(), tuple(inputs), dynamic_shapes=dynamic, strict=strict)
    others = example([1, 19, 2, 4], device)
    assert torch.equal(program.module()(*others), Scan()(*others))
