"""What must hold of the selective scan for every batch, and of its operators wherever they are called from."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.ops import selective_triton as kernels
from ssd_torchrec.ops.launch import INTERPRETED
from ssd_torchrec.ops.selective_scan import selective_scan_stepped
from ssd_torchrec.ops.selective_triton import selective_scan_triton
from tests.ops.scans import POSITIONAL, call, results
from tests.ops.test_selective_scan import FAST, on, selective_inputs

EVENTS = ("x", "dt", "B", "C", "z")
DIRECTIONS = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
WAYS = pytest.mark.parametrize(("reverse", "piece"), [(False, 0), (True, 2)], ids=["forward", "reverse-in-pieces"])
SCANS = pytest.mark.parametrize(
    ("scan", "reverse", "piece"),
    [
        (selective_scan_stepped, False, 0),
        (selective_scan_stepped, True, 0),
        (selective_scan_triton, False, 2),
        (selective_scan_triton, True, 0),
    ],
    ids=["stepped-forward", "stepped-reverse", "triton-forward-in-pieces", "triton-reverse"],
)
few = settings(max_examples=12, derandomize=True, deadline=None)
row_lengths = st.lists(st.integers(0, 20), max_size=5)


@pytest.fixture(autouse=True)
def chunks_take_few_events(monkeypatch):
    if INTERPRETED:
        monkeypatch.setattr(kernels, "CHUNK", 2)


def cut(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """Cut rows into pieces of so many events, whatever there is to gain, or none."""
    if piece:
        monkeypatch.setattr(kernels, "CHUNK", 2)
        monkeypatch.setattr(kernels, "PIECE", piece)
        monkeypatch.setattr(kernels, "LINKED_AT_ONCE", 2)  # of which an empty place costs the interpreter the same
    monkeypatch.setattr(kernels, "_piece", lambda *_: piece)


def reorder(tensors: dict[str, Tensor], event: Tensor, row: Tensor) -> dict[str, Tensor]:
    moved = {name: t[event.to(t.device)] for name, t in tensors.items() if name in EVENTS}
    return tensors | moved | {"initial_state": tensors["initial_state"][row.to(event.device)]}


def of_rows(results: dict[str, Tensor], events: Any, rows: Any) -> dict[str, Tensor]:
    """What belongs to events and rows, that is all but the gradients of parameters."""
    by_event = {name: results[name][events] for name in ("y", *(f"d{name}" for name in EVENTS))}
    return by_event | {name: results[name][rows] for name in ("final_state", "dinitial_state")}


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@few
@given(lengths=row_lengths, more=row_lengths, reverse=st.booleans())
def test_a_row_does_not_know_its_batch(lengths, more, reverse):
    tensors, both = selective_inputs([*lengths, *more]), JaggedLayout.from_lengths([*lengths, *more])
    events, rows = sum(lengths), len(lengths)
    alone = {n: t[:events] if n in EVENTS else t for n, t in tensors.items()}
    alone["initial_state"] = tensors["initial_state"][:rows]
    got = results(selective_scan_stepped, tensors, both, reverse=reverse)
    expected = results(selective_scan_stepped, alone, JaggedLayout.from_lengths(lengths), reverse=reverse)
    for name in ("y", "final_state"):
        assert_same({name: got[name][: len(expected[name])]}, {name: expected[name]})


@WAYS
def test_kernels_know_nothing_of_other_rows(reverse, piece, device, monkeypatch):
    """To the last bit."""
    cut(monkeypatch, piece)
    lengths, more = [5, 0, 1], [4, 2]
    tensors = on(device, selective_inputs([*lengths, *more]))
    layout = JaggedLayout.from_lengths([*lengths, *more], device)
    together = of_rows(_gradients(tensors, layout, reverse), slice(6), slice(3))
    alone = {n: t[:6] if n in EVENTS else t for n, t in tensors.items()}
    alone["initial_state"] = tensors["initial_state"][:3]
    layout = JaggedLayout.from_lengths(lengths, device)
    assert_equal(together, of_rows(_gradients(alone, layout, reverse), slice(None), slice(None)))


@WAYS
def test_rows_may_come_in_any_order(reverse, piece, device, monkeypatch):
    cut(monkeypatch, piece)
    lengths, row = [3, 5, 0, 2], torch.tensor([2, 1, 3, 0])
    starts = JaggedLayout.from_lengths(lengths).offsets
    event = torch.cat([torch.arange(int(starts[r]), int(starts[r + 1])) for r in row])
    tensors = on(device, selective_inputs(lengths))
    layout, moved = (JaggedLayout.from_lengths(order, device) for order in (lengths, [lengths[r] for r in row]))
    expected = of_rows(_gradients(tensors, layout, reverse), event, row)
    got = _gradients(reorder(tensors, event, row), moved, reverse)
    assert_equal(of_rows(got, slice(None), slice(None)), expected)


def _gradients(tensors: dict[str, Tensor], layout: JaggedLayout, reverse: bool) -> dict[str, Tensor]:
    """As `results`, with a cotangent that follows its event and its row wherever they lie."""
    tensors = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    outputs = call(selective_scan_triton, tensors, layout, reverse=reverse, return_final_state=True)
    cotangents = [tensors["z"].detach().sign(), tensors["initial_state"].detach().sign()]
    grads = torch.autograd.grad(outputs, list(tensors.values()), cotangents)
    named = {f"d{name}": grad for name, grad in zip(tensors, grads, strict=True)}
    return {"y": outputs[0].detach(), "final_state": outputs[1].detach(), **named}


@pytest.mark.parametrize("scan", FAST.values(), ids=FAST)
def test_backwards_is_forwards_on_turned_rows(scan, device):
    lengths = [5, 0, 1, 4]
    layout = JaggedLayout.from_lengths(lengths)
    ends = layout.offsets[layout.row_of_event] + layout.offsets[layout.row_of_event + 1] - 1
    event, layout = ends - torch.arange(sum(lengths)), layout.to(device)
    tensors = on(device, selective_inputs(lengths))
    y, final = call(scan, tensors, layout, reverse=True, return_final_state=True)
    turned = reorder(tensors, event, torch.arange(len(lengths)))
    y_turned, final_turned = call(scan, turned, layout, return_final_state=True)
    torch.testing.assert_close(y_turned[event], y)
    torch.testing.assert_close(final_turned, final)


@pytest.mark.parametrize("scan", FAST.values(), ids=FAST)
@DIRECTIONS
def test_every_split_resumes_where_it_stopped(reverse, scan, device):
    """Two rows, cut at every point: the first part's final state is all that the second part needs."""
    length = 5
    tensors = on(device, selective_inputs([length, length]))
    layout = JaggedLayout.from_lengths([length, length], device)
    y, final = call(scan, tensors, layout, reverse=reverse, return_final_state=True)
    for split in range(length + 1):
        parts = [range(split), range(split, length)]
        events = [torch.tensor([*part, *(length + t for t in part)], dtype=torch.int64) for part in parts]
        state, pieces = tensors["initial_state"], {}
        for part in [1, 0] if reverse else [0, 1]:
            given_now = {n: t[events[part]] if n in EVENTS else t for n, t in tensors.items()}
            layout = JaggedLayout.from_lengths([len(parts[part])] * 2, device)
            given_now["initial_state"] = state
            pieces[part], state = call(scan, given_now, layout, reverse=reverse, return_final_state=True)
        got = torch.empty_like(y).index_copy(0, torch.cat(events).to(device), torch.cat([pieces[0], pieces[1]]))
        torch.testing.assert_close(got, y)
        torch.testing.assert_close(state, final)


@SCANS
@pytest.mark.parametrize("poison", [torch.nan, pytest.param(torch.inf, marks=pytest.mark.slow)])
def test_nothing_crosses_rows(poison, reverse, scan, piece, device, monkeypatch):
    """In values and in gradients, even where another row holds no numbers."""
    cut(monkeypatch, piece)
    lengths = [3, 5, 2]
    tensors = on(device, selective_inputs(lengths))
    poisoned = {n: t.clone() for n, t in tensors.items()}
    for name in EVENTS:
        poisoned[name][3:8] = poison
    poisoned["initial_state"][1] = poison
    layout = JaggedLayout.from_lengths(lengths, device)
    clean, dirty = (results(scan, t, layout, reverse=reverse) for t in (tensors, poisoned))
    for rows, row in ((slice(3), 0), (slice(8, None), 2)):
        assert_equal(of_rows(dirty, rows, row), of_rows(clean, rows, row))


@SCANS
def test_an_output_knows_its_past_only(reverse, scan, piece, device, monkeypatch):
    cut(monkeypatch, piece)
    tensors = {n: t.requires_grad_() for n, t in on(device, selective_inputs([1, 5, 1])).items()}
    y = call(scan, tensors, JaggedLayout.from_lengths([1, 5, 1], device), reverse=reverse)
    inputs = [tensors[name] for name in EVENTS]
    for t in (1, 3, 5):
        past = slice(t, 6) if reverse else slice(1, t + 1)
        for name, grad in zip(EVENTS, torch.autograd.grad(y[t].sum(), inputs, retain_graph=True), strict=True):
            reached = grad.any(1)
            assert reached[past].sum() == reached.sum() == (1 if name in ("C", "z") else len(y[past])), name


def test_kernels_repeat_to_the_last_bit(device):
    tensors, layout = on(device, selective_inputs([5, 0, 3])), JaggedLayout.from_lengths([5, 0, 3], device)
    assert_equal(*(results(selective_scan_triton, tensors, layout) for _ in range(2)))


def test_operators_are_sound(device):
    t, offsets = on(device, selective_inputs([3, 0, 2])), JaggedLayout.from_lengths([3, 0, 2], device).offsets
    parameters = [t[name] for name in (*POSITIONAL, "dt_bias", "D", "z")]
    bare = [*(t[name] for name in POSITIONAL), None, None, None]
    checks = ("test_schema", "test_faketensor")  # the gradient is outside the operators
    operators, state = torch.ops.ssd_torchrec, t["initial_state"]
    for operator, arguments in (
        (operators.selective_scan, (*parameters, offsets, state, 3, True, True)),
        (operators.selective_scan, (*bare, offsets, None, 3, False, False)),
        (operators.selective_scan_backward, (t["x"], state, *parameters, offsets, state, 3, True)),
        (operators.selective_scan_backward, (t["x"], None, *bare, offsets, None, 3, False)),
    ):
        torch.library.opcheck(operator.default, arguments, test_utils=checks)


class Scan(torch.nn.Module):
    def forward(self, tensors: dict[str, Tensor], offsets: Tensor) -> Any:
        unused = offsets.new_zeros(tensors["x"].shape[0])
        layout = JaggedLayout(offsets, 9, unused, unused, offsets[1:])
        return call(selective_scan_triton, tensors, layout, return_final_state=True)


def test_scan_compiles_whole_for_any_size(device):
    compiled = torch.compile(Scan(), fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ([3, 0, 4], [2, 2], [1, 3, 0, 1]):
        tensors = {name: t.requires_grad_() for name, t in on(device, selective_inputs(lengths)).items()}
        offsets = JaggedLayout.from_lengths(lengths, device).offsets
        got, expected = compiled(tensors, offsets), Scan()(tensors, offsets)
        grads = [torch.autograd.grad([o.cos().sum() for o in out], list(tensors.values())) for out in (got, expected)]
        for a, b in zip((*got, *grads[0]), (*expected, *grads[1]), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_scan_exports_for_any_size(strict, device):
    events, rows = torch.export.Dim("events", min=2), torch.export.Dim("rows", min=2)
    example = on(device, selective_inputs([3, 0, 9]))
    sizes = {name: {0: events} if name in EVENTS else None for name in example} | {"initial_state": {0: rows}}
    program = torch.export.export(
        Scan(),
        (example, JaggedLayout.from_lengths([3, 0, 9], device).offsets),
        dynamic_shapes={"tensors": sizes, "offsets": {0: rows + 1}},
        strict=strict,
    )
    other = on(device, selective_inputs([1, 7, 2, 4])), JaggedLayout.from_lengths([1, 7, 2, 4], device).offsets
    for got, expected in zip(program.module()(*other), Scan()(*other), strict=True):
        assert torch.equal(got, expected)
