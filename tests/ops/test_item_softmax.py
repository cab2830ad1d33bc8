from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ssd_torchrec.errors import DoubleBackwardError, DtypeError, ShapeError
from ssd_torchrec.ops import item_softmax as module
from ssd_torchrec.ops import item_sweep
from ssd_torchrec.ops.item_softmax import item_softmax, item_softmax_definition
from ssd_torchrec.ops.item_softmax_triton import item_softmax_triton
from ssd_torchrec.ops.item_sweep import item_softmax_sweep
from tests.golden import gradients
from tests.numerics import assert_as_accurate_as_eager

SIZES = {"several-blocks": (13, 21), "one-candidate": (5, 1), "no-queries": (0, 7), "no-candidates": (3, 0)}
OPTIONS = {"plain": (), "log-q": ("log_q",), "items": ("item",), "both": ("log_q", "item")}


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(item_sweep, "HELD", 60)
    monkeypatch.setattr(item_sweep, "FEWEST_QUERIES", 2)


@pytest.fixture(params=["its-own-way", "kernels"])
def door(request, monkeypatch, small_blocks, device) -> Callable[..., Tensor]:
    """The public function, on the CPU also with the kernels behind it."""
    if request.param == "kernels":
        if device.type == "cuda":
            pytest.skip("the way of CUDA are the kernels")
        monkeypatch.setattr(module, "item_softmax_sweep", item_softmax_triton)
    return item_softmax


def softmax_inputs(
    queries: int, candidates: int, *options: str, width: int = 6, dtype=torch.float64, device="cpu"
) -> dict[str, Tensor]:
    """Numbers that are exact in `dtype`, logits as spread at every width; neighbours are one item, two by two."""
    rng = torch.Generator().manual_seed(0)
    shapes = {"queries": (queries, width), "candidates": (candidates, width)}
    shapes |= {"log_q": (candidates,)} if "log_q" in options else {}
    drawn = {name: torch.randn(shape, generator=rng, dtype=torch.float64) for name, shape in shapes.items()}
    drawn["candidates"] *= (6 / width) ** 0.5
    tensors = {name: t.to(device, dtype) for name, t in drawn.items()}
    target = torch.randint(-1, candidates, (queries,), generator=rng) if candidates else torch.full((queries,), -1)
    tensors["target"] = target.to(device)
    if "item" in options:
        tensors["item_of_candidate"] = 5 + (torch.arange(candidates) // 2).to(device)
    return tensors


def call(softmax: Any, tensors: dict[str, Tensor]) -> Tensor:
    return softmax(
        tensors["queries"],
        tensors["candidates"],
        tensors["target"],
        log_q=tensors.get("log_q"),
        item_of_candidate=tensors.get("item_of_candidate"),
    )


def in_fp64(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}


def results(softmax: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss, and gradients where each query weighs something else."""
    wanted = {name: t.detach().clone().requires_grad_() for name, t in tensors.items() if t.is_floating_point()}
    loss = call(softmax, tensors | wanted)
    cotangent = (torch.arange(loss.numel(), device=loss.device) % 5 - 2).view_as(loss)
    grads = gradients([loss], [cotangent], wanted)
    return {"loss": loss.detach(), **{f"d{name}": grad for name, grad in grads.items()}}


def full(
    queries: Tensor, candidates: Tensor, target: Tensor, *, log_q: Tensor | None, item_of_candidate: Tensor | None
) -> Tensor:
    logits = queries @ candidates.T - (0 if log_q is None else log_q)
    left_out = torch.zeros_like(logits, dtype=torch.bool)
    if item_of_candidate is not None:
        for i, right in enumerate(target.tolist()):
            for k in range(len(candidates)):
                left_out[i, k] = k != right and right >= 0 and bool(item_of_candidate[k] == item_of_candidate[right])
    return F.cross_entropy(logits.masked_fill(left_out, -torch.inf), target, ignore_index=-1, reduction="none")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("softmax", [item_softmax_definition, item_softmax_sweep, item_softmax])
def test_loss_is_the_cross_entropy_of_all_logits(softmax, options, small_blocks):
    tensors = softmax_inputs(40, 33, *options)
    expected = results(full, tensors)
    for name, got in results(softmax, tensors).items():
        torch.testing.assert_close(got, expected[name], rtol=1e-9, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sweep_is_as_accurate_as_eager(dtype, options, sizes, small_blocks):
    tensors = softmax_inputs(*sizes, *options, dtype=dtype)
    truth = results(item_softmax_definition, in_fp64(tensors))
    eager = results(item_softmax_definition, tensors)
    got = results(item_softmax_sweep, tensors)
    for name in truth:
        assert_as_accurate_as_eager(name, got[name], eager[name], truth[name])


@pytest.mark.parametrize("softmax", [item_softmax_definition, item_softmax_sweep])
def test_derivative_is_the_derivative(softmax, small_blocks):
    tensors = softmax_inputs(7, 8, "log_q", "item", width=3)
    wanted = {name: t.requires_grad_() for name, t in tensors.items() if t.is_floating_point()}
    assert torch.autograd.gradcheck(
        lambda *inputs: call(softmax, tensors | dict(zip(wanted, inputs, strict=True))), tuple(wanted.values())
    )


class LargestTensor(TorchDispatchMode):
    """Remembers how many numbers the largest result held."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


def test_the_table_of_logits_is_never_held():
    tensors = softmax_inputs(1100, 2500, "log_q", "item", dtype=torch.float32)
    with LargestTensor() as largest:
        results(item_softmax, tensors)
    assert 2500 * 6 <= largest.numbers <= item_sweep.HELD < 1100 * 2500
    with LargestTensor() as largest:
        results(item_softmax_definition, tensors)
    assert largest.numbers == 1100 * 2500  # so that the watch is known to see


@pytest.mark.parametrize("candidates_too", [True, False], ids=["both", "queries-alone"])
@pytest.mark.parametrize("cotangent", [2.5, [2.5] * 12 + [1.0]], ids=["one-weight", "weights"])
def test_weights_of_the_losses_are_those_of_the_gradient(cotangent, candidates_too, door, device):
    """One weight for all takes another way than several."""
    tensors = softmax_inputs(13, 21, "item", *(["log_q"] if candidates_too else []), dtype=torch.float32, device=device)
    tensors["target"] = tensors["target"].abs()
    wanted = [n for n, t in tensors.items() if n == "queries" or (candidates_too and t.is_floating_point())]
    inputs = {n: t.requires_grad_(n in wanted) for n, t in tensors.items()}
    weights = torch.tensor(cotangent, device=device).expand(13)
    got, expected = (
        torch.autograd.grad(call(softmax, inputs), [inputs[n] for n in wanted], weights)
        for softmax in (door, item_softmax_definition)
    )
    for name, ours, truth in zip(wanted, got, expected, strict=True):
        torch.testing.assert_close(ours, truth, msg=lambda text, n=name: f"{n}: {text}")


def test_extreme_logits_stay_finite(door, device):
    tensors = softmax_inputs(13, 21, "log_q", "item", dtype=torch.float32, device=device)
    tensors |= {name: 1e3 * t for name, t in tensors.items() if t.is_floating_point()}
    for name, value in results(door, tensors).items():
        assert value.isfinite().all(), name


def test_a_query_that_asks_nothing_may_be_anything(door, device):
    tensors = softmax_inputs(13, 21, "log_q", "item", dtype=torch.float32, device=device)
    tensors["target"][4] = -1
    clean = results(door, tensors)
    tensors["queries"][4] = torch.nan
    dirty = results(door, tensors)
    assert dirty["loss"][4] == 0
    assert not dirty["dqueries"][4].any()
    for name in clean:
        assert torch.equal(clean[name], dirty[name]), name


def test_a_chance_shared_by_all_changes_nothing(door, device):
    tensors = softmax_inputs(13, 21, dtype=torch.float32, device=device)
    corrected = call(door, tensors | {"log_q": torch.full((21,), -3.0, device=device)})
    torch.testing.assert_close(corrected, call(door, tensors))


def test_candidates_that_are_the_target_do_not_count(door, device):
    """Drawn beside it by chance, they might as well not be there; and so for their gradient."""
    tensors = softmax_inputs(3, 21, "log_q", dtype=torch.float32, device=device)
    tensors["target"] = torch.tensor([20, 20, 2], device=device)
    item = torch.arange(21, device=device)
    item[:2] = 20
    got = results(door, tensors | {"item_of_candidate": item})
    expected = results(
        door,
        {n: t[2:] if n in ("candidates", "log_q") else t for n, t in tensors.items()}
        | {"target": tensors["target"] - 2},
    )
    torch.testing.assert_close(got["loss"][:2], expected["loss"][:2])
    torch.testing.assert_close(got["dqueries"][:2], expected["dqueries"][:2])
    other = results(door, {n: t[2:] if n in ("queries", "target") else t for n, t in tensors.items()})
    torch.testing.assert_close(got["loss"][2:], other["loss"])  # another target counts them


def test_with_all_others_left_out_nothing_is_lost(door, device):
    """Even in tiles and splits that hold no target, so that nothing of them counts."""
    tensors = softmax_inputs(13, 200, "log_q", dtype=torch.float32, device=device)
    tensors["item_of_candidate"] = torch.full((200,), 7, device=device)
    for name, value in results(door, tensors).items():
        torch.testing.assert_close(value, torch.zeros_like(value), msg=lambda text, n=name: f"{n}: {text}")


def test_a_lone_candidate_costs_nothing(door, device):
    tensors = softmax_inputs(13, 1, "log_q", dtype=torch.float32, device=device)
    lost = results(door, tensors)
    assert not lost.pop("loss").any()
    for name, value in lost.items():
        torch.testing.assert_close(value, torch.zeros_like(value), msg=lambda text, n=name: f"{n}: {text}")


def test_autocast_rounds_operands_and_nothing_else(door, device):
    tensors = softmax_inputs(13, 21, "log_q", dtype=torch.float32, device=device)
    rounded = tensors | {name: tensors[name].bfloat16().float() for name in ("queries", "candidates")}
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = call(door, tensors)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, call(door, rounded))


def test_second_backward_is_refused(door, device):
    tensors = softmax_inputs(3, 4, dtype=torch.float32, device=device)
    tensors["queries"].requires_grad_()
    loss = call(door, tensors)
    with pytest.raises(DoubleBackwardError, match=r"item_softmax.*pass float64"):
        torch.autograd.grad(loss.sum(), tensors["queries"], create_graph=True)


@pytest.mark.parametrize("wrong", [-2, 4])
def test_a_target_that_is_no_candidate_is_refused(wrong):
    tensors = softmax_inputs(3, 4)
    tensors["target"][1] = wrong
    with pytest.raises(ShapeError, match=r"target must lie in -1\.\.3"):
        call(item_softmax, tensors)


def test_what_does_not_fit_is_refused():
    tensors = softmax_inputs(3, 4, "log_q", "item", dtype=torch.float32)

    def refused(error: type[Exception], match: str, **changed: Tensor) -> None:
        with pytest.raises(error, match=match):
            call(item_softmax, tensors | changed)

    refused(ShapeError, r"candidates must be \(4, 6\)", candidates=tensors["candidates"][:, :5])
    refused(ShapeError, r"target must be \(3,\)", target=tensors["target"][:2])
    refused(ShapeError, "target int64", target=tensors["target"].int())
    refused(ShapeError, r"log_q must be \(4,\)", log_q=tensors["log_q"][:3])
    refused(ShapeError, r"item_of_candidate must be \(4,\)", item_of_candidate=tensors["item_of_candidate"][:3])
    refused(DtypeError, "item_of_candidate must be int64", item_of_candidate=tensors["item_of_candidate"].int())
    refused(DtypeError, "log_q of item_softmax must be a floating point", log_q=tensors["log_q"].long())
