"""What must hold for every batch, whichever way its rows are cut into chunks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.ops.ssd_scan import ssd_scan_chunked
from tests.ops.scans import call, results, scan_inputs

few = settings(max_examples=12, derandomize=True, deadline=None)
row_lengths = st.lists(st.integers(0, 40), max_size=5)
directions = st.booleans()
EVENTS = ("x", "dt", "B", "C", "z")


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def reorder(tensors: dict[str, Tensor], event: Tensor, row: Tensor) -> dict[str, Tensor]:
    moved = {name: t[event] for name, t in tensors.items() if name in EVENTS}
    return tensors | moved | {"initial_state": tensors["initial_state"][row]}


@few
@given(lengths=row_lengths, chunk=st.integers(1, 70), reverse=directions)
def test_chunk_size_does_not_matter(lengths, chunk, reverse):
    tensors, layout = scan_inputs(lengths, groups=2), JaggedLayout.from_lengths(lengths)
    whole = results(ssd_scan_chunked, tensors, layout, reverse=reverse, chunk=128)
    assert_same(results(ssd_scan_chunked, tensors, layout, reverse=reverse, chunk=chunk), whole)


@few
@given(lengths=row_lengths, more=row_lengths, reverse=directions)
def test_a_row_does_not_know_its_batch(lengths, more, reverse):
    tensors = scan_inputs([*lengths, *more])
    events, rows = sum(lengths), len(lengths)
    alone = {n: t[:events] if n in EVENTS else t for n, t in tensors.items()}
    alone["initial_state"] = tensors["initial_state"][:rows]
    y, final = call_chunked(tensors, [*lengths, *more], reverse)
    y_alone, final_alone = call_chunked(alone, lengths, reverse)
    assert_same({"y": y[:events], "final_state": final[:rows]}, {"y": y_alone, "final_state": final_alone})


def call_chunked(
    tensors: dict[str, Tensor], lengths: list[int], reverse: bool, chunk: int = 8
) -> tuple[Tensor, Tensor]:
    layout = JaggedLayout.from_lengths(lengths)
    return call(ssd_scan_chunked, tensors, layout, reverse=reverse, return_final_state=True, chunk=chunk)


@few
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5), seed=st.integers(0, 99), reverse=directions)
def test_rows_may_come_in_any_order(lengths, seed, reverse):
    tensors = scan_inputs(lengths)
    row = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    starts = JaggedLayout.from_lengths(lengths).offsets
    event = torch.cat([torch.arange(int(starts[r]), int(starts[r + 1])) for r in row])
    y, final = call_chunked(tensors, lengths, reverse)
    y_moved, final_moved = call_chunked(reorder(tensors, event, row), [lengths[r] for r in row], reverse)
    assert_same({"y": y_moved, "final_state": final_moved}, {"y": y[event], "final_state": final[row]})


@few
@given(lengths=row_lengths, chunk=st.integers(1, 40))
def test_backwards_is_forwards_on_turned_rows(lengths, chunk):
    tensors, layout = scan_inputs(lengths), JaggedLayout.from_lengths(lengths)
    event = (
        layout.offsets[layout.row_of_event] + layout.offsets[layout.row_of_event + 1] - 1 - torch.arange(sum(lengths))
    )
    turned = reorder(tensors, event, torch.arange(len(lengths)))
    y, final = call_chunked(tensors, lengths, True, chunk)
    y_turned, final_turned = call_chunked(turned, lengths, False, chunk)
    assert_same({"y": y_turned[event], "final_state": final_turned}, {"y": y, "final_state": final})


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_every_split_resumes_where_it_stopped(reverse):
    """Two rows, cut at every point: the first part's final state is all that the second part needs."""
    length = 11
    tensors = scan_inputs([length, length])
    y, final = call_chunked(tensors, [length, length], reverse, chunk=4)
    for split in range(length + 1):
        parts = [range(split), range(split, length)]
        events = [torch.tensor([*part, *(length + t for t in part)], dtype=torch.int64) for part in parts]
        order = [1, 0] if reverse else [0, 1]
        state, pieces = tensors["initial_state"], {}
        for part in order:
            given_now = {n: t[events[part]] if n in EVENTS else t for n, t in tensors.items()} | {
                "initial_state": state
            }
            pieces[part], state = call_chunked(given_now, [len(parts[part])] * 2, reverse, chunk=4)
        got = torch.empty_like(y).index_copy(0, torch.cat(events), torch.cat([pieces[0], pieces[1]]))
        assert_same({"y": got, "final_state": state}, {"y": y, "final_state": final})


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=["nan", "inf"])
def test_nothing_crosses_rows(poison, reverse):
    """In values and in gradients, even where another row holds no numbers."""
    lengths = [5, 40, 3]
    tensors = {n: t.float() for n, t in scan_inputs(lengths).items()}
    poisoned = {n: t.clone() for n, t in tensors.items()}
    for name in EVENTS:
        poisoned[name][5:45] = poison
    poisoned["initial_state"][1] = poison
    clean, dirty = (
        results(ssd_scan_chunked, t, JaggedLayout.from_lengths(lengths), reverse=reverse) for t in (tensors, poisoned)
    )
    for name in ("y", *(f"d{n}" for n in EVENTS)):
        for rows in (slice(5), slice(45, None)):
            assert torch.equal(dirty[name][rows], clean[name][rows]), name
    for name in ("final_state", "dinitial_state"):
        assert torch.equal(dirty[name][::2], clean[name][::2]), name


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_an_output_knows_its_past_only(reverse):
    tensors = {n: t.requires_grad_() for n, t in scan_inputs([2, 21, 2]).items()}
    y, _ = call_chunked(tensors, [2, 21, 2], reverse, chunk=4)
    for t in (2, 5, 10, 22):
        past = slice(t, 23) if reverse else slice(2, t + 1)
        for name, grad in zip(
            EVENTS, torch.autograd.grad(y[t].sum(), [tensors[n] for n in EVENTS], retain_graph=True), strict=True
        ):
            other = torch.ones(25, dtype=torch.bool)
            other[past] = False
            assert not grad[other].any(), name
            assert grad[~other].flatten(1).any(1).sum() == (1 if name in ("C", "z") else len(y[past])), name


def test_rows_of_one_event_need_no_state():
    tensors = scan_inputs([1, 1, 1], states=False, gate=False)
    y = call(ssd_scan_chunked, tensors, JaggedLayout.from_lengths([1, 1, 1]))
    delta = torch.nn.functional.softplus(tensors["dt"] + tensors["dt_bias"])[..., None]
    expected = ((tensors["B"] * tensors["C"]).sum(-1, keepdim=True) * delta + tensors["D"][:, None]) * tensors["x"]
    torch.testing.assert_close(y, expected)
