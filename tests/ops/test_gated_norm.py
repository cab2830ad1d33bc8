import pytest
import torch
from torch import Tensor

from ssd_torchrec.errors import DoubleBackwardError, ShapeError
from ssd_torchrec.ops.gated_norm import gated_norm, gated_norm_by_hand, gated_norm_definition
from tests.golden import assert_golden, golden_cases, golden_tensors, gradients
from tests.numerics import assert_as_accurate_as_eager


def norm_inputs(events: int, width: int = 8) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    shapes = {"y": (events, width), "z": (events, width), "weight": (width,)}
    return {name: torch.randn(shape, generator=rng, dtype=torch.float64) for name, shape in shapes.items()}


def results(norm, tensors: dict[str, Tensor], **options) -> dict[str, Tensor]:
    tensors = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    out = norm(*tensors.values(), **options)
    cotangent = (torch.arange(out.numel(), device=out.device) % 5 - 2).view_as(out)
    grads = gradients([out], [cotangent], tensors)
    return {"out": out.detach(), **{f"d{name}": grad for name, grad in grads.items()}}


@pytest.mark.parametrize("case", golden_cases("R"))
@pytest.mark.parametrize(
    ("dtype", "tolerances"), [(torch.float64, (1e-9, 1e-8)), (torch.float32, (1e-6, 1e-6))], ids=str
)
@pytest.mark.parametrize("norm", [gated_norm_definition, gated_norm])
def test_norm_is_the_published_one(norm, dtype, tolerances, case, device):
    golden = golden_tensors(case)
    inputs = {n: golden[f"input.{n}"].to(device, dtype).requires_grad_() for n in ("y", "z", "weight")}
    out = norm(*inputs.values(), eps=case["config"]["eps"])
    assert_golden("out", out, golden["expected.out"].to(device), tolerances[0])
    for name, grad in gradients([out], [golden["input.grad_out"]], inputs).items():
        assert_golden(f"d{name}", grad, golden[f"grad.{name}"].to(device), tolerances[1])


@pytest.mark.parametrize("events", [0, 1, 7])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm_is_as_accurate_as_eager(dtype, groups, events, device):
    tensors = {name: t.to(device, dtype) for name, t in norm_inputs(events).items()}
    truth = results(gated_norm_definition, {n: t.double() for n, t in tensors.items()}, eps=1e-5, groups=groups)
    eager = results(gated_norm_definition, tensors, eps=1e-5, groups=groups)
    got = results(gated_norm, tensors, eps=1e-5, groups=groups)
    for name in truth:
        assert_as_accurate_as_eager(name, got[name], eager[name], truth[name])


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("norm", [gated_norm_definition, gated_norm_by_hand])
def test_derivative_is_the_derivative(norm, groups):
    inputs = tuple(t.requires_grad_() for t in norm_inputs(3, width=4).values())
    assert torch.autograd.gradcheck(lambda *tensors: norm(*tensors, eps=1e-5, groups=groups), inputs)


def test_second_backward_is_refused():
    y, z, weight = (t.float().requires_grad_() for t in norm_inputs(3).values())
    with pytest.raises(DoubleBackwardError, match=r"gated_norm.*pass float64"):
        torch.autograd.grad(gated_norm(y, z, weight, eps=1e-5).sum(), y, create_graph=True)


def test_each_group_has_its_own_norm():
    tensors = {name: t.float() for name, t in norm_inputs(5).items()}
    whole = gated_norm(*tensors.values(), eps=1e-5, groups=2)
    halves = [gated_norm(*(t[..., half] for t in tensors.values()), eps=1e-5) for half in (slice(4), slice(4, 8))]
    torch.testing.assert_close(whole, torch.cat(halves, dim=1))


def test_bf16_is_rounded_once():
    tensors = {name: t.bfloat16() for name, t in norm_inputs(5).items()}
    wide = gated_norm(*(t.float() for t in tensors.values()), eps=1e-5)
    assert torch.equal(gated_norm(*tensors.values(), eps=1e-5), wide.bfloat16())


def test_an_event_of_zeros_stays_zero():
    tensors = norm_inputs(3) | {"y": torch.zeros(3, 8, dtype=torch.float64)}
    for name, value in results(gated_norm, tensors, eps=1e-12).items():
        assert value.isfinite().all(), name


def test_what_does_not_fit_is_refused():
    y, z, weight = norm_inputs(3).values()
    with pytest.raises(ShapeError, match="E a multiple of groups"):
        gated_norm(y, z, weight, eps=1e-5, groups=3)
    with pytest.raises(ShapeError, match=r"z must be \(3, 8\)"):
        gated_norm(y, z[:2], weight, eps=1e-5)
    with pytest.raises(ShapeError, match=r"weight must be \(8,\)"):
        gated_norm(y, z, weight[:4], eps=1e-5)
