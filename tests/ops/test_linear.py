import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_torchrec.errors import DoubleBackwardError
from ssd_torchrec.ops import linear as module
from ssd_torchrec.ops.linear import linear
from tests.golden import gradients
from tests.numerics import assert_as_accurate_as_eager

SIZES = {"widening": (9, 4, 7), "narrowing": (9, 7, 4), "one-event": (1, 3, 5), "no-events": (0, 4, 3)}


def linear_inputs(events: int, width: int, out: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    shapes = {"x": (events, width), "weight": (out, width), "bias": (out,)}
    return {name: torch.randn(shape, generator=rng, dtype=torch.float64) for name, shape in shapes.items()}


def results(tensors: dict[str, Tensor], apply=linear) -> dict[str, Tensor]:
    tensors = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    y = apply(*tensors.values())
    cotangent = (torch.arange(y.numel(), device=y.device) % 5 - 2).view_as(y)
    return {"y": y.detach(), **{f"d{n}": grad for n, grad in gradients([y], [cotangent], tensors).items()}}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("onednn", [True, False], ids=["onednn", "without"])
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no-bias"])
def test_it_is_as_accurate_as_eager(biased, onednn, sizes, device, monkeypatch):
    monkeypatch.setattr(module, "HAS_ONEDNN", onednn and module.HAS_ONEDNN)
    tensors = {n: t for n, t in linear_inputs(*sizes).items() if biased or n != "bias"}
    narrow = {name: t.to(device, torch.float32) for name, t in tensors.items()}
    truth = results({name: t.double() for name, t in narrow.items()}, F.linear)
    eager = results(narrow, F.linear)
    for name, got in results(narrow).items():
        assert_as_accurate_as_eager(name, got, eager[name], truth[name])


def test_parts_of_wider_tensors_are_read_where_they_lie():
    tensors = {name: t.float() for name, t in linear_inputs(9, 12, 7).items()}
    part = tensors["x"][:, 2:6], tensors["weight"][:, 5:9], tensors["bias"]
    torch.testing.assert_close(linear(*part), F.linear(*part))


def test_only_what_is_asked_for_gets_a_gradient():
    x, weight, bias = (t.float() for t in linear_inputs(5, 3, 4).values())
    linear(x, weight.requires_grad_(), bias).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(4, 3))
    assert x.grad is None
    assert bias.grad is None


def test_autocast_is_pytorchs():
    x, weight, bias = (t.float() for t in linear_inputs(5, 3, 4).values())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))


def test_fp64_has_a_second_derivative_and_fp32_refuses_one():
    x, weight, bias = (t.requires_grad_() for t in linear_inputs(3, 2, 2).values())
    assert torch.autograd.gradgradcheck(linear, (x, weight, bias))
    narrow = x.detach().float().requires_grad_()
    with pytest.raises(DoubleBackwardError, match=r"linear.*pass float64"):
        torch.autograd.grad(linear(narrow, weight.float(), None).sum(), narrow, create_graph=True)
