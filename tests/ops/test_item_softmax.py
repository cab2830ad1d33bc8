import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ssd_torchrec.errors import DoubleBackwardError, ShapeError
from ssd_torchrec.ops import item_softmax as module
from ssd_torchrec.ops import item_sweep
from ssd_torchrec.ops.item_softmax import item_softmax, item_softmax_definition, item_softmax_tiled
from ssd_torchrec.ops.item_sweep import item_softmax_sweep
from tests.golden import gradients
from tests.numerics import assert_as_accurate_as_eager

SIZES = {"several-tiles": (13, 21), "one-candidate": (5, 1), "no-queries": (0, 7), "no-candidates": (3, 0)}


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(module, "TILE", (4, 5))
    monkeypatch.setattr(item_sweep, "HELD", 60)
    monkeypatch.setattr(item_sweep, "FEWEST_QUERIES", 2)


def softmax_inputs(
    queries: int, candidates: int, log_q: bool = True, width: int = 6
) -> tuple[dict[str, Tensor], Tensor]:
    rng = torch.Generator().manual_seed(0)
    shapes = {"queries": (queries, width), "candidates": (candidates, width)}
    shapes |= {"log_q": (candidates,)} if log_q else {}
    tensors = {name: torch.randn(shape, generator=rng, dtype=torch.float64) for name, shape in shapes.items()}
    target = torch.randint(-1, max(candidates, 1), (queries,), generator=rng)
    return tensors, target if candidates else torch.full_like(target, -1)


def call(softmax, tensors: dict[str, Tensor], target: Tensor) -> Tensor:
    return softmax(tensors["queries"], tensors["candidates"], target, log_q=tensors.get("log_q"))


def results(softmax, tensors: dict[str, Tensor], target: Tensor) -> dict[str, Tensor]:
    tensors = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    loss = call(softmax, tensors, target)
    cotangent = (torch.arange(loss.numel(), device=loss.device) % 5 - 2).view_as(loss)
    grads = gradients([loss], [cotangent], tensors)
    return {"loss": loss.detach(), **{f"d{name}": grad for name, grad in grads.items()}}


def full(queries: Tensor, candidates: Tensor, target: Tensor, *, log_q: Tensor | None = None) -> Tensor:
    logits = queries @ candidates.T - (0 if log_q is None else log_q)
    return F.cross_entropy(logits, target, ignore_index=-1, reduction="none")


@pytest.mark.parametrize("log_q", [False, True], ids=["uncorrected", "corrected"])
@pytest.mark.parametrize("softmax", [item_softmax_definition, item_softmax_tiled, item_softmax_sweep, item_softmax])
def test_loss_is_the_cross_entropy_of_all_logits(softmax, log_q, small_tiles):
    tensors, target = softmax_inputs(40, 33, log_q)
    expected = results(full, tensors, target)
    for name, got in results(softmax, tensors, target).items():
        torch.testing.assert_close(got, expected[name], rtol=1e-9, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("log_q", [False, True], ids=["uncorrected", "corrected"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_is_as_accurate_as_eager(dtype, log_q, sizes, device, small_tiles):
    tensors, target = softmax_inputs(*sizes, log_q)
    tensors, target = {name: t.to(device, dtype) for name, t in tensors.items()}, target.to(device)
    truth = results(item_softmax_definition, {n: t.double() for n, t in tensors.items()}, target)
    eager = results(item_softmax_definition, tensors, target)
    got = results(item_softmax_tiled, tensors, target)
    assert got["loss"].dtype == torch.float32
    for name in truth:
        assert_as_accurate_as_eager(name, got[name], eager[name], truth[name])


@pytest.mark.parametrize("softmax", [item_softmax_definition, item_softmax_tiled, item_softmax_sweep])
def test_derivative_is_the_derivative(softmax, small_tiles):
    tensors, target = softmax_inputs(7, 8, width=3)
    inputs = tuple(t.requires_grad_() for t in tensors.values())
    assert torch.autograd.gradcheck(lambda q, c, log_q: softmax(q, c, target, log_q=log_q), inputs)


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
    tensors, target = softmax_inputs(1100, 2500)
    tensors = {name: t.float() for name, t in tensors.items()}
    with LargestTensor() as largest:
        results(item_softmax, tensors, target)
    assert 2500 * 6 <= largest.numbers <= item_sweep.HELD < 1100 * 2500
    with LargestTensor() as largest:
        results(item_softmax_definition, tensors, target)
    assert largest.numbers == 1100 * 2500  # so that the watch is known to see


@pytest.mark.parametrize("candidates_too", [True, False], ids=["both", "queries-alone"])
@pytest.mark.parametrize("cotangent", [2.5, [2.5] * 12 + [1.0]], ids=["one-weight", "weights"])
def test_weights_of_the_losses_are_those_of_the_gradient(cotangent, candidates_too, small_tiles):
    """One weight for all takes another way than several."""
    tensors, target = softmax_inputs(13, 21, log_q=candidates_too)
    target = target.abs()
    inputs = {n: t.float().requires_grad_(n == "queries" or candidates_too) for n, t in tensors.items()}
    wanted = [n for n in inputs if n == "queries" or candidates_too]
    weights = torch.tensor(cotangent).expand(13)
    got, expected = (
        torch.autograd.grad(call(softmax, inputs, target), [inputs[n] for n in wanted], weights)
        for softmax in (item_softmax, item_softmax_definition)
    )
    for name, ours, truth in zip(wanted, got, expected, strict=True):
        torch.testing.assert_close(ours, truth, msg=lambda text, n=name: f"{n}: {text}")


def test_extreme_logits_stay_finite(small_tiles):
    tensors, target = softmax_inputs(13, 21)
    tensors = {name: 1e3 * t.float() for name, t in tensors.items()}
    for name, value in results(item_softmax, tensors, target).items():
        assert value.isfinite().all(), name


def test_a_query_that_asks_nothing_may_be_anything(small_tiles):
    tensors, target = softmax_inputs(13, 21)
    tensors = {name: t.float() for name, t in tensors.items()}
    target[4] = -1
    clean = results(item_softmax, tensors, target)
    tensors["queries"][4] = torch.nan
    dirty = results(item_softmax, tensors, target)
    assert dirty["loss"][4] == 0
    assert not dirty["dqueries"][4].any()
    for name in clean:
        assert torch.equal(clean[name], dirty[name]), name


def test_a_chance_shared_by_all_changes_nothing(small_tiles):
    tensors, target = softmax_inputs(13, 21)
    tensors = {name: t.float() for name, t in tensors.items()} | {"log_q": torch.full((21,), -3.0)}
    corrected = call(item_softmax, tensors, target)
    del tensors["log_q"]
    torch.testing.assert_close(corrected, call(item_softmax, tensors, target))


def test_autocast_rounds_operands_and_nothing_else(small_tiles):
    tensors, target = softmax_inputs(13, 21)
    tensors = {name: t.float() for name, t in tensors.items()}
    rounded = tensors | {name: tensors[name].bfloat16().float() for name in ("queries", "candidates")}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = call(item_softmax, tensors, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, call(item_softmax, rounded, target))


def test_second_backward_is_refused():
    tensors, target = softmax_inputs(3, 4)
    queries = tensors["queries"].float().requires_grad_()
    loss = item_softmax(queries, tensors["candidates"].float(), target)
    with pytest.raises(DoubleBackwardError, match=r"item_softmax.*pass float64"):
        torch.autograd.grad(loss.sum(), queries, create_graph=True)


@pytest.mark.parametrize("wrong", [-2, 4])
def test_a_target_that_is_no_candidate_is_refused(wrong):
    tensors, target = softmax_inputs(3, 4)
    target[1] = wrong
    with pytest.raises(ShapeError, match=r"target must lie in -1\.\.3"):
        call(item_softmax, tensors, target)


@pytest.mark.parametrize("wrong", [-2, 4])
def test_a_target_that_could_not_be_looked_at_makes_its_loss_nan(wrong):
    tensors, target = softmax_inputs(3, 4)
    target[1] = wrong
    assert call(item_softmax_tiled, tensors, target).isnan().tolist() == [False, True, False]


def test_what_does_not_fit_is_refused():
    tensors, target = softmax_inputs(3, 4)
    queries, candidates, log_q = tensors.values()
    with pytest.raises(ShapeError, match=r"candidates must be \(4, 6\)"):
        item_softmax(queries, candidates[:, :5], target)
    with pytest.raises(ShapeError, match=r"target must be \(3,\)"):
        item_softmax(queries, candidates, target[:2])
    with pytest.raises(ShapeError, match="target int64"):
        item_softmax(queries, candidates, target.int())
    with pytest.raises(ShapeError, match=r"log_q must be \(4,\)"):
        item_softmax(queries, candidates, target, log_q=log_q[:3])
