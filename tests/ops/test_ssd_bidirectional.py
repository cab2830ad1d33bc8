"""Both directions at once: the definition, the chunked path and the kernels."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssd_torchrec.errors import DoubleBackwardError, DtypeError, JaggedLayoutError, ShapeError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.ops.ssd_bidirectional import (
    ssd_scan_bidirectional,
    ssd_scan_bidirectional_chunked,
    ssd_scan_bidirectional_definition,
)
from ssd_torchrec.ops.ssd_scan import ssd_scan
from ssd_torchrec.ops.ssd_triton import ssd_scan_bidirectional_triton
from tests.numerics import assert_as_accurate_as_eager
from tests.ops.scans import HEADS, bidirectional_inputs, call, results_without_states

ROWS = {
    "one-row": [5],
    "rows-of-one-chunk": [16, 0, 1],
    "many-chunks": [33, 0, 2],
    "only-empty-rows": [0, 0],
    "no-rows": [],
}
EVENTS = ("x", "dt", "B", "C", "z")
SLOW = pytest.mark.slow  # of several seconds in the interpreter, and much like another
KERNELS = partial(ssd_scan_bidirectional_triton, chunk=16)
PATHS = {"chunked": ssd_scan_bidirectional_chunked, "kernels": KERNELS}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # of tests that hypothesis runs many times
few = settings(max_examples=2, derandomize=True, deadline=None)
row_lengths = st.lists(st.integers(0, 16), min_size=1, max_size=2)


def on(device: torch.device, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: t.to(device, dtype) for name, t in tensors.items()}


def assert_accurate(scan: Callable[..., Any], tensors: dict[str, Tensor], layout: JaggedLayout) -> None:
    wide = {name: t.double() for name, t in tensors.items()}
    truth = results_without_states(ssd_scan_bidirectional_definition, wide, layout)
    eager = results_without_states(ssd_scan_bidirectional_definition, tensors, layout)
    got = results_without_states(scan, tensors, layout)
    for name in truth:
        assert_as_accurate_as_eager(name, got[name], eager[name], truth[name])


def one_way(tensors: dict[str, Tensor], layout: JaggedLayout, way: int) -> Tensor:
    """`ssd_scan` of the inputs of one direction, with the skip."""
    own = {"dt": tensors["dt"][:, way], "A": tensors["A"][way], "dt_bias": tensors["dt_bias"][way]}
    shared = {name: t for name, t in tensors.items() if name != "z"}
    return call(ssd_scan, shared | own, layout, reverse=way == 1)


@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS)
def test_it_is_the_sum_of_both_scans_with_one_skip_and_one_gate(lengths, device):
    tensors, layout = (
        on(device, bidirectional_inputs(lengths), torch.float64),
        JaggedLayout.from_lengths(lengths, device),
    )
    both = one_way(tensors, layout, 0) + one_way(tensors, layout, 1) - tensors["D"][:, None] * tensors["x"]
    expected = both * torch.nn.functional.silu(tensors["z"])
    torch.testing.assert_close(call(ssd_scan_bidirectional, tensors, layout), expected)


@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize(
    ("path", "dtype", "groups"),
    [
        ("chunked", torch.float32, 1),
        ("chunked", torch.bfloat16, 2),
        ("kernels", torch.float32, 1),
        pytest.param("kernels", torch.bfloat16, 2, marks=SLOW),
    ],
)
def test_paths_are_as_accurate_as_eager(path, dtype, groups, lengths, device):
    scan = PATHS[path]
    tensors = on(device, bidirectional_inputs(lengths, heads=HEADS, groups=groups), dtype)
    assert_accurate(scan, tensors, JaggedLayout.from_lengths(lengths, device))


@pytest.mark.parametrize("path", ["chunked", pytest.param("kernels", marks=SLOW)])
def test_half_precision_is_as_accurate_as_eager(path, device):
    tensors = on(device, bidirectional_inputs([3, 0, 20], heads=HEADS), torch.float16)
    assert_accurate(PATHS[path], tensors, JaggedLayout.from_lengths([3, 0, 20], device))


@SLOW
def test_pieces_of_long_rows_are_as_accurate_as_eager(device):
    lengths = [35]
    tensors = on(device, bidirectional_inputs(lengths, heads=HEADS))
    assert_accurate(partial(KERNELS, piece=32), tensors, JaggedLayout.from_lengths(lengths, device))


@pytest.mark.parametrize("lengths", [[30, 2], [35]], ids=["rows-of-one-chunk", "many-chunks"])
def test_longer_chunks_are_as_accurate_as_eager(lengths, device):
    tensors = on(device, bidirectional_inputs(lengths, heads=HEADS))
    assert_accurate(partial(KERNELS, chunk=32), tensors, JaggedLayout.from_lengths(lengths, device))


@pytest.mark.parametrize("fastest", [1e-4, 800.0], ids=["slow", "fast"])
@pytest.mark.parametrize("scan", PATHS.values(), ids=PATHS)
def test_extreme_decays_are_as_accurate_as_eager(scan, fastest, device):
    lengths = [20]
    tensors = on(device, bidirectional_inputs(lengths, heads=HEADS, fastest=fastest, seed=1))
    assert_accurate(scan, tensors, JaggedLayout.from_lengths(lengths, device))


@pytest.mark.parametrize("absent", [["dt_bias"], ["D", "z"]], ids="-and-".join)
@pytest.mark.parametrize("scan", PATHS.values(), ids=PATHS)
def test_what_is_not_given_is_not_missed(scan, absent, device):
    lengths = [20, 2]
    tensors = on(device, bidirectional_inputs(lengths, heads=HEADS))
    tensors = {name: t for name, t in tensors.items() if name not in absent}
    assert_accurate(scan, tensors, JaggedLayout.from_lengths(lengths, device))


@pytest.mark.parametrize("scan", [ssd_scan_bidirectional_definition, ssd_scan_bidirectional_chunked])
@pytest.mark.parametrize("lengths", [[3, 0, 4], [0, 0], []], ids=str)
def test_derivative_is_the_derivative(scan, lengths):
    tensors, layout = (
        bidirectional_inputs(lengths, heads=2, channels=2, state=2, groups=2),
        JaggedLayout.from_lengths(lengths),
    )

    def named(*values: Tensor) -> Tensor:
        return call(scan, dict(zip(tensors, values, strict=True)), layout)

    assert torch.autograd.gradcheck(named, tuple(t.requires_grad_() for t in tensors.values()))


@pytest.mark.parametrize("longest", [16, 17], ids=["one-chunk", "chunks"])
@few
@given(lengths=row_lengths, more=row_lengths)
def test_a_row_does_not_know_its_batch(longest, lengths, more):
    """Bit for bit, in values and in the gradients of events, as long as both batches take the same path.

    Without z, whose gradient is PyTorch's, and rounds the tail of a vector differently.
    """
    assert_rows_do_not_know_others([longest, *lengths], [min(length, longest) for length in more])


def test_a_row_in_pieces_does_not_know_its_batch():
    assert_rows_do_not_know_others([17, 3], [9, 0, 18], piece=16)


def assert_rows_do_not_know_others(lengths: list[int], more: list[int], piece: int = 0) -> None:
    tensors = on(DEVICE, bidirectional_inputs([*lengths, *more], heads=1, gate=False))
    alone = {n: t[: sum(lengths)] if n in EVENTS else t for n, t in tensors.items()}
    got = results_without_states(KERNELS, tensors, JaggedLayout.from_lengths([*lengths, *more], DEVICE), piece=piece)
    expected = results_without_states(KERNELS, alone, JaggedLayout.from_lengths(lengths, DEVICE), piece=piece)
    for name in ("y", "dx", "ddt", "dB", "dC"):
        assert torch.equal(got[name][: sum(lengths)], expected[name]), name


@few
@given(lengths=row_lengths)
def test_turned_rows_with_swapped_directions_give_turned_outputs(lengths):
    lengths = [20, *lengths]
    layout = JaggedLayout.from_lengths(lengths, DEVICE)
    tensors = on(DEVICE, bidirectional_inputs(lengths, heads=1))
    row = layout.row_of_event
    turned = layout.offsets[row] + layout.offsets[row + 1] - 1 - torch.arange(sum(lengths), device=DEVICE)
    other = tensors | {n: t[turned] for n, t in tensors.items() if n in EVENTS}
    other |= {"dt": other["dt"].flip(1), "A": tensors["A"].flip(0), "dt_bias": tensors["dt_bias"].flip(0)}
    y, y_turned = (call(KERNELS, t, layout) for t in (tensors, other))
    torch.testing.assert_close(y_turned, y[turned])


@pytest.mark.parametrize("lengths", [[9, 16, 3], [18, 20, 3]], ids=["rows-of-one-chunk", "many-chunks"])
@pytest.mark.parametrize("scan", PATHS.values(), ids=PATHS)
def test_nothing_crosses_rows(scan, lengths, device):
    tensors, layout = on(device, bidirectional_inputs(lengths, heads=2)), JaggedLayout.from_lengths(lengths, device)
    poisoned = {n: t.clone() for n, t in tensors.items()}
    start, stop = lengths[0], lengths[0] + lengths[1]
    for name in EVENTS:
        poisoned[name][start:stop] = torch.nan
    clean, dirty = (results_without_states(scan, t, layout) for t in (tensors, poisoned))
    for name in ("y", *(f"d{n}" for n in EVENTS)):
        for rows in (slice(start), slice(stop, None)):
            assert torch.equal(dirty[name][rows], clean[name][rows]), name


def test_the_same_run_gives_the_same_bits(device):
    tensors, layout = on(device, bidirectional_inputs([40, 3], heads=2)), JaggedLayout.from_lengths([40, 3], device)
    first, second = (results_without_states(KERNELS, tensors, layout) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_events_may_be_parts_of_a_projection(device):
    """No copy is made of them, and rows lie apart: their places follow their strides."""
    layout = JaggedLayout.from_lengths([20, 3], device)
    tensors = on(device, bidirectional_inputs([20, 3], heads=2, channels=4, state=6, gate=False))
    x, B, C, dt, _ = torch.randn(23, 8 + 6 + 6 + 4 + 5, device=device).split([8, 6, 6, 4, 5], dim=-1)
    parts = tensors | {"x": x.unflatten(-1, (2, 4)), "B": B[:, None], "C": C[:, None], "dt": dt.unflatten(-1, (2, 2))}
    whole = {name: t.contiguous() for name, t in parts.items()}
    assert torch.equal(call(KERNELS, parts, layout), call(KERNELS, whole, layout))


class Scan(torch.nn.Module):
    def forward(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, offsets: Tensor) -> Tensor:
        layout = JaggedLayout(offsets, 20, offsets.new_zeros(len(x)), offsets.new_zeros(len(x)), offsets[1:])
        return KERNELS(x, dt, A, B, C, layout)


@SLOW
def test_it_compiles_whole_for_any_size(device):
    compiled = torch.compile(Scan(), fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ([3, 0, 20], [5, 5], [1, 19, 2, 4]):
        tensors = on(device, bidirectional_inputs(lengths, heads=2))
        inputs = [tensors[name].requires_grad_() for name in ("x", "dt", "A", "B", "C")]
        offsets = JaggedLayout.from_lengths(lengths, device).offsets
        got, expected = (scan(*inputs, offsets) for scan in (compiled, Scan()))
        assert torch.equal(got, expected)
        grads, grads_expected = (torch.autograd.grad(y.sum(), inputs) for y in (got, expected))
        for grad, grad_expected in zip(grads, grads_expected, strict=True):
            assert torch.equal(grad, grad_expected)


def test_fp64_takes_the_definition(device):
    tensors, layout = on(device, bidirectional_inputs([9, 2]), torch.float64), JaggedLayout.from_lengths([9, 2], device)
    got, definition = (call(s, tensors, layout) for s in (ssd_scan_bidirectional, ssd_scan_bidirectional_definition))
    assert torch.equal(got, definition)


def test_dtypes_come_back_as_promised(device):
    tensors, layout = on(device, bidirectional_inputs([20, 3])), JaggedLayout.from_lengths([20, 3], device)
    tensors |= {name: tensors[name].bfloat16() for name in ("x", "B", "C", "z")}  # as autocast leaves them
    got = results_without_states(ssd_scan_bidirectional, tensors, layout)
    assert got["y"].dtype == torch.bfloat16
    assert {name: got[f"d{name}"].dtype for name in tensors} == {name: t.dtype for name, t in tensors.items()}


def test_autocast_does_not_coarsen_the_sums(device):
    tensors, layout = on(device, bidirectional_inputs([20])), JaggedLayout.from_lengths([20], device)
    plain = results_without_states(ssd_scan_bidirectional, tensors, layout)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        cast = results_without_states(ssd_scan_bidirectional, tensors, layout)
    for name in plain:
        assert torch.equal(plain[name], cast[name]), name


@pytest.mark.parametrize("scan", PATHS.values(), ids=PATHS)
def test_second_backward_is_refused(scan, device):
    tensors = {n: t.requires_grad_() for n, t in on(device, bidirectional_inputs([3])).items()}
    y = call(scan, tensors, JaggedLayout.from_lengths([3], device))
    with pytest.raises(DoubleBackwardError, match=r"ssd_scan.*pass float64"):
        torch.autograd.grad(y.sum(), tensors["x"], create_graph=True)


BROKEN = {
    "dt-of-one-direction": ("dt", torch.zeros(3, 4), r"dt must be \(T, 2, H\), got \(3, 4\)"),
    "dt-of-three-directions": ("dt", torch.zeros(3, 3, 4), r"dt must be \(T, 2, H\), got \(3, 3, 4\)"),
    "dt-of-other-events": ("dt", torch.zeros(4, 2, 4), r"dt must be \(3, "),
    "dt-of-other-heads": ("dt", torch.zeros(3, 2, 5), r"must be \(2, 5\)|dt must be"),
    "A-of-one-direction": ("A", torch.zeros(4), r"A must be \(2, 4\), got \(4,\)"),
    "dt_bias-of-one-direction": ("dt_bias", torch.zeros(4), r"dt_bias must be \(2, 4\), got \(4,\)"),
    "D-of-both-directions": ("D", torch.zeros(2, 4), r"D must be \(4,\), got \(2, 4\)"),
    "B-of-groups-that-do-not-fit": ("B", torch.zeros(3, 3, 5), "H a multiple of G"),
    "C-of-another-state": ("C", torch.zeros(3, 1, 6), r"C must be \(3, 1, 5\)"),
    "z-of-flat-channels": ("z", torch.zeros(3, 12), r"z must be \(3, 4, 3\)"),
    "A-that-grows-forward": ("A", torch.tensor([[1.0], [-1.0]]).expand(2, 4), "A must be at most 0, got 1"),
    "A-that-grows-backward": ("A", torch.tensor([[-1.0], [1.0]]).expand(2, 4), "A must be at most 0, got 1"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_fit_is_refused(name):
    of, value, message = BROKEN[name]
    with pytest.raises(ShapeError, match=message):
        call(ssd_scan_bidirectional, bidirectional_inputs([3]) | {of: value}, JaggedLayout.from_lengths([3]))


def test_events_of_another_batch_are_refused():
    with pytest.raises(JaggedLayoutError, match=r"events must be \(4, ...\)"):
        call(ssd_scan_bidirectional, bidirectional_inputs([3]), JaggedLayout.from_lengths([4]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only the kernels choose by dtype")
def test_dtypes_that_kernels_do_not_take_are_refused(device):
    tensors = on(device, bidirectional_inputs([3])) | {"x": torch.zeros(3, 4, 3, dtype=torch.int32, device=device)}
    with pytest.raises(DtypeError):
        call(ssd_scan_bidirectional, tensors, JaggedLayout.from_lengths([3], device))


def test_state_too_large_for_a_tile_is_refused(device):
    tensors = on(device, bidirectional_inputs([3], heads=1, channels=65, state=65))
    with pytest.raises(ShapeError, match="64 x 128, got 65 channels and state 65"):
        call(KERNELS, tensors, JaggedLayout.from_lengths([3], device))
