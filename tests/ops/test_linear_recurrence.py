from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ssd_torchrec.errors import DoubleBackwardError, DtypeError, JaggedLayoutError, ShapeError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.ops import linear_recurrence as module
from ssd_torchrec.ops.linear_recurrence import (
    linear_recurrence,
    linear_recurrence_chunked,
    linear_recurrence_definition,
)
from tests.numerics import assert_as_accurate_as_eager

ROWS = {
    "one-row": [5],
    "empty-and-short-rows": [3, 0, 7, 1, 2],
    "long-rows": [70, 0, 1, 33, 64],
    "only-empty-rows": [0, 0],
    "no-rows": [],
}
PATHS = {"definition": linear_recurrence_definition, "chunked": linear_recurrence_chunked}


def inputs(lengths: list[int], *, channels: int = 16, slowest: float = 0.99, states: bool = True) -> dict[str, Tensor]:
    """By parameter name, in complex128; decays lie anywhere in the circle of the slowest."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.complex128)

    radius, turn = torch.rand(2, channels, generator=rng, dtype=torch.float64)
    decay = torch.polar(slowest * radius.sqrt(), 2 * torch.pi * turn)
    tensors = {"x": normal(sum(lengths), channels), "decay": decay}
    return tensors | ({"initial_state": normal(len(lengths), channels)} if states else {})


def on(device: torch.device, tensors: dict[str, Tensor], dtype: torch.dtype = torch.complex64) -> dict[str, Tensor]:
    return {name: t.to(device, dtype) for name, t in tensors.items()}


def call(recurrence: Callable[..., Any], tensors: dict[str, Tensor], layout: JaggedLayout, **options: Any) -> Any:
    return recurrence(**tensors, layout=layout, **options)


def results(recurrence: Callable[..., Any], tensors: dict[str, Tensor], layout: JaggedLayout) -> dict[str, Tensor]:
    """States, final states and the gradient of every input; cotangents are exact in every dtype. Pairs of reals."""
    tensors = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    outputs = call(recurrence, tensors, layout, return_final_state=True)
    whole = [(torch.arange(o.numel(), device=o.device) % 5 - 2).view_as(o) for o in outputs]
    cotangents = [torch.complex(w.double(), w.double().flip(-1)).to(o) for w, o in zip(whole, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, list(tensors.values()), cotangents)
    named = dict(zip(["h", "final"], outputs, strict=True)) | {
        f"d{name}": g for name, g in zip(tensors, gradients, strict=True)
    }
    return {name: torch.view_as_real(t.detach()) for name, t in named.items()}


def judge(tensors: dict[str, Tensor], lengths: list[int]) -> None:
    layout = JaggedLayout.from_lengths(lengths, tensors["x"].device)
    wide = {name: t.to(torch.complex128) for name, t in tensors.items()}
    truth = results(linear_recurrence_definition, wide, layout)
    eager = results(linear_recurrence_definition, tensors, layout)
    for name, got in results(linear_recurrence_chunked, tensors, layout).items():
        assert_as_accurate_as_eager(name, got, eager[name], truth[name])


@pytest.mark.parametrize("recurrence", PATHS.values(), ids=PATHS)
def test_it_sums_what_came_before_decayed(recurrence):
    x, decay = (
        torch.tensor([[1.0], [2.0], [4.0], [8.0]]).to(torch.complex128),
        torch.tensor([0.5j]).to(torch.complex128),
    )
    h = recurrence(x, decay, JaggedLayout.from_lengths([3, 1]))
    assert h[:, 0].tolist() == [1, 2 + 0.5j, 4 + 1j - 0.25, 8]


@pytest.mark.parametrize("states", [True, False], ids=["resumed", "from-nothing"])
@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS)
def test_chunks_are_as_accurate_as_eager(lengths, states, device):
    judge(on(device, inputs(lengths, states=states)), lengths)


@pytest.mark.parametrize("slots", [1, 2, 3, 8, 100])
def test_chunks_of_any_length_are_as_accurate_as_eager(slots, device, monkeypatch):
    monkeypatch.setattr(module, "_slots", lambda layout: slots)
    judge(on(device, inputs([9, 0, 17, 1])), [9, 0, 17, 1])


@pytest.mark.parametrize("slowest", [0.0, 1e-20, 0.999999], ids=["nothing-stays", "fast", "slow"])
def test_extreme_decays_are_as_accurate_as_eager(slowest, device):
    judge(on(device, inputs([40, 3], slowest=slowest)), [40, 3])


@pytest.mark.parametrize(("lengths", "slots"), [([1], 1), ([100], 10), ([100, 0, 0, 0], 10), ([4] * 9 + [400], 20)])
def test_chunks_grow_as_the_root_of_the_longest_row(lengths, slots):
    assert module._slots(JaggedLayout.from_lengths(lengths)) == slots


def test_chunks_are_no_longer_than_a_row_is_on_average():
    assert module._slots(JaggedLayout.from_lengths([400] + [2] * 400)) == 2


@pytest.mark.parametrize("recurrence", PATHS.values(), ids=PATHS)
def test_derivative_is_the_derivative(recurrence):
    lengths = [3, 0, 5]
    layout, tensors = JaggedLayout.from_lengths(lengths), inputs(lengths, channels=2)

    def named(*values):
        return call(recurrence, dict(zip(tensors, values, strict=True)), layout, return_final_state=True)

    assert torch.autograd.gradcheck(named, tuple(t.requires_grad_() for t in tensors.values()))


@pytest.mark.parametrize("recurrence", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("lengths", [[], [0, 0], [0, 2, 0]], ids=str)
def test_nothing_in_still_reaches_every_input(recurrence, lengths, device):
    tensors = on(device, inputs(lengths))
    for name, value in results(recurrence, tensors, JaggedLayout.from_lengths(lengths, device)).items():
        assert value.isfinite().all()
        assert not name.startswith("d") or value.shape[:-1] == tensors[name[1:]].shape


@pytest.mark.parametrize("recurrence", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("lengths", [[0, 2], [0, 0]], ids=str)
def test_empty_row_keeps_its_state(recurrence, lengths, device):
    tensors, layout = on(device, inputs(lengths)), JaggedLayout.from_lengths(lengths, device)
    _, final = call(recurrence, tensors, layout, return_final_state=True)
    assert torch.equal(final[0], tensors["initial_state"][0])
    del tensors["initial_state"]
    _, final = call(recurrence, tensors, layout, return_final_state=True)
    assert not final[0].any()


def test_rows_without_numbers_spoil_no_others(device):
    lengths = [7, 5, 6, 0]
    tensors, layout = on(device, inputs(lengths)), JaggedLayout.from_lengths(lengths, device)
    clean, spoilt = (call(linear_recurrence, tensors | {"x": x}, layout) for x in _with_and_without(tensors["x"]))
    others = layout.row_of_event != 1
    assert torch.equal(spoilt[others], clean[others])


def _with_and_without(x: Tensor) -> tuple[Tensor, Tensor]:
    return x, x.index_fill(0, torch.tensor([8], device=x.device), torch.nan)


def test_complex128_takes_the_definition_and_the_rest_chunks(device):
    layout = JaggedLayout.from_lengths([9, 2], device)
    for dtype, recurrence in {torch.complex128: PATHS["definition"], torch.complex64: PATHS["chunked"]}.items():
        tensors = on(device, inputs([9, 2]), dtype)
        assert torch.equal(call(linear_recurrence, tensors, layout), call(recurrence, tensors, layout))


def test_the_same_input_gives_the_same_bits(device):
    tensors, layout = on(device, inputs([9, 0, 21])), JaggedLayout.from_lengths([9, 0, 21], device)
    once, again = (results(linear_recurrence, tensors, layout) for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_second_backward_is_refused():
    tensors = {name: t.requires_grad_() for name, t in on(torch.device("cpu"), inputs([3])).items()}
    h = call(linear_recurrence, tensors, JaggedLayout.from_lengths([3]))
    with pytest.raises(DoubleBackwardError, match=r"linear_recurrence.*pass float64"):
        torch.autograd.grad(h.abs().sum(), tensors["x"], create_graph=True)


BROKEN = {
    "x": (torch.zeros(3, 4, 4, dtype=torch.complex64), ShapeError, r"x must be \(T, N\), got \(3, 4, 4\)"),
    "decay": (torch.zeros(5, dtype=torch.complex64), ShapeError, r"decay must be \(16,\), got \(5,\)"),
    "initial_state": (torch.zeros(2, 16, dtype=torch.complex64), ShapeError, r"initial_state must be \(1, 16\)"),
    "reals": (torch.zeros(3, 16), DtypeError, "must be given complex64 or complex128 throughout.*view_as_complex"),
    "wide": (
        torch.zeros(3, 16, dtype=torch.complex128),
        DtypeError,
        "must be given complex64 or complex128 throughout",
    ),
    "events": (torch.zeros(4, 16, dtype=torch.complex64), JaggedLayoutError, r"events must be \(3, ...\)"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_what_does_not_fit_is_refused(broken):
    value, error, message = BROKEN[broken]
    tensors = on(torch.device("cpu"), inputs([3])) | {broken if broken in ("decay", "initial_state") else "x": value}
    with pytest.raises(error, match=message):
        call(linear_recurrence, tensors, JaggedLayout.from_lengths([3]))
