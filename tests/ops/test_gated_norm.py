from typing import Any

import pytest
import torch
from torch import Tensor

from ssd_torchrec.errors import DoubleBackwardError, DtypeError, ShapeError
from ssd_torchrec.ops import gated_norm_triton as kernels
from ssd_torchrec.ops.gated_norm import gated_norm, gated_norm_by_hand, gated_norm_definition
from ssd_torchrec.ops.gated_norm_triton import gated_norm_triton
from tests.golden import assert_golden, golden_cases, golden_tensors, gradients
from tests.numerics import assert_as_accurate_as_eager

NO_DEFINITION = [gated_norm_by_hand, gated_norm_triton]
IN_FP64 = [gated_norm_definition, gated_norm_by_hand]
TOLERANCES = {torch.float64: (1e-9, 1e-8), torch.float32: (1e-6, 1e-6)}  # of the output, of gradients


def named(value: Any) -> str:
    return getattr(value, "__name__", str(value))


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


def on(device: torch.device, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.to(device, torch.float32) for name, t in tensors.items()}


def judge(norm, tensors: dict[str, Tensor], **options) -> None:
    truth = results(gated_norm_definition, {n: t.double() for n, t in tensors.items()}, **options)
    eager = results(gated_norm_definition, tensors, **options)
    got = results(norm, tensors, **options)
    for name in truth:
        assert_as_accurate_as_eager(name, got[name], eager[name], truth[name])


@pytest.mark.parametrize("case", golden_cases("R"))
@pytest.mark.parametrize(
    ("norm", "dtype"),
    [
        *((norm, torch.float64) for norm in IN_FP64),
        *((norm, torch.float32) for norm in (gated_norm_definition, *NO_DEFINITION)),
    ],
    ids=named,
)
def test_norm_is_the_published_one(norm, dtype, case, device):
    golden = golden_tensors(case)
    inputs = {n: golden[f"input.{n}"].to(device, dtype).requires_grad_() for n in ("y", "z", "weight")}
    out = norm(*inputs.values(), eps=case["config"]["eps"])
    assert_golden("out", out, golden["expected.out"].to(device), TOLERANCES[dtype][0])
    for name, grad in gradients([out], [golden["input.grad_out"]], inputs).items():
        assert_golden(f"d{name}", grad, golden[f"grad.{name}"].to(device), TOLERANCES[dtype][1])


@pytest.mark.parametrize("events", [0, 1, 7])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", NO_DEFINITION)
def test_norm_is_as_accurate_as_eager(norm, dtype, groups, events, device):
    tensors = {name: t.to(device, dtype) for name, t in norm_inputs(events, width=64).items()}
    judge(norm, tensors, eps=1e-5, groups=groups)


@pytest.mark.parametrize(("events", "width", "groups"), [(33, 200, 1), (9, 60, 5), (3, 1100, 1), (2, 8192, 1)], ids=str)
def test_kernels_take_any_width(events, width, groups, device):
    judge(gated_norm_triton, on(device, norm_inputs(events, width)), eps=1e-5, groups=groups)


def test_programs_walk_over_more_events_than_they_take_at_once(device, monkeypatch):
    monkeypatch.setattr(kernels, "BACKWARD_WARPS", 16)  # four programs, two for each group
    judge(gated_norm_triton, on(device, norm_inputs(90, 200)), eps=1e-5, groups=2)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("norm", IN_FP64)
def test_derivative_is_the_derivative(norm, groups):
    inputs = tuple(t.requires_grad_() for t in norm_inputs(3, width=4).values())
    assert torch.autograd.gradcheck(lambda *tensors: norm(*tensors, eps=1e-5, groups=groups), inputs)


@pytest.mark.parametrize("norm", NO_DEFINITION)
def test_second_backward_is_refused(norm, device):
    y, z, weight = (t.requires_grad_() for t in on(device, norm_inputs(3)).values())
    with pytest.raises(DoubleBackwardError, match=r"gated_norm.*pass float64"):
        torch.autograd.grad(norm(y, z, weight, eps=1e-5).sum(), y, create_graph=True)


@pytest.mark.parametrize("norm", NO_DEFINITION)
def test_each_group_has_its_own_norm(norm, device):
    tensors = on(device, norm_inputs(5))
    whole = norm(*tensors.values(), eps=1e-5, groups=2)
    halves = [norm(*(t[..., half] for t in tensors.values()), eps=1e-5) for half in (slice(4), slice(4, 8))]
    torch.testing.assert_close(whole, torch.cat(halves, dim=1))


@pytest.mark.parametrize("norm", NO_DEFINITION)
def test_bf16_is_rounded_once(norm, device):
    tensors = {name: t.to(device, torch.bfloat16) for name, t in norm_inputs(5).items()}
    wide = norm(*(t.float() for t in tensors.values()), eps=1e-5)
    assert torch.equal(norm(*tensors.values(), eps=1e-5), wide.bfloat16())


@pytest.mark.parametrize("norm", NO_DEFINITION)
def test_an_event_of_zeros_stays_zero(norm, device):
    tensors = norm_inputs(3) | {"y": torch.zeros(3, 8, dtype=torch.float64)}
    for name, value in results(norm, on(device, tensors), eps=1e-12).items():
        assert value.isfinite().all(), name


@pytest.mark.filterwarnings("ignore:.*(divide|multiply):RuntimeWarning")  # of NumPy, beyond the last event
@pytest.mark.parametrize("norm", NO_DEFINITION)
def test_eps_may_be_zero(norm, device):
    judge(norm, on(device, norm_inputs(7, width=64)), eps=0.0)


@pytest.mark.parametrize("norm", NO_DEFINITION)
def test_nothing_crosses_events(norm, device):
    tensors = on(device, norm_inputs(7))
    poisoned = tensors | {"y": tensors["y"].clone()}
    poisoned["y"][3] = torch.nan
    clean, dirty = (results(norm, t, eps=1e-5) for t in (tensors, poisoned))
    for name in ("out", "dy", "dz"):
        for events in (slice(3), slice(4, None)):
            assert torch.equal(dirty[name][events], clean[name][events]), name


def test_kernels_read_a_part_of_wider_events_where_it_lies(device):
    y, z, weight = on(device, norm_inputs(7)).values()
    wide = torch.full((2, 7, 13), torch.nan, device=device)
    wide[..., 2:10] = torch.stack([y, z])
    out = torch.ops.ssd_torchrec.gated_norm(*wide[..., 2:10], weight, 1e-5, 2)
    assert torch.equal(out, gated_norm_triton(y, z, weight, eps=1e-5, groups=2))


def test_kernels_mix_dtypes_as_autocast_leaves_them(device):
    tensors = on(device, norm_inputs(7))
    mixed = tensors | {"y": tensors["y"].bfloat16(), "z": tensors["z"].bfloat16()}
    got, wide = (results(gated_norm_triton, t, eps=1e-5) for t in (mixed, {n: t.float() for n, t in mixed.items()}))
    assert torch.equal(got["out"], wide["out"].bfloat16())
    assert [got[name].dtype for name in ("dy", "dz", "dweight")] == [torch.bfloat16, torch.bfloat16, torch.float32]


def test_kernels_are_sound_operators(device):
    y, z, weight = on(device, norm_inputs(3)).values()
    checks = ("test_schema", "test_faketensor")  # the gradient is outside the operators
    ops = torch.ops.ssd_torchrec
    torch.library.opcheck(ops.gated_norm.default, (y, z, weight, 1e-5, 2), test_utils=checks)
    torch.library.opcheck(ops.gated_norm_backward.default, (y, y, z, weight, 1e-5, 2), test_utils=checks)


class Norm(torch.nn.Module):
    def forward(self, y: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        return gated_norm_triton(y, z, weight, eps=1e-5, groups=2)


def test_kernels_compile_whole_for_any_size(device):
    compiled: Any = torch.compile(Norm(), fullgraph=True, dynamic=True, backend="aot_eager")
    for events in (3, 9, 17):
        tensors = [t.requires_grad_() for t in on(device, norm_inputs(events)).values()]
        got, expected = (
            (out, *torch.autograd.grad(out.cos().sum(), tensors)) for out in (compiled(*tensors), Norm()(*tensors))
        )
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_kernels_export_for_any_size(strict, device):
    events = {0: torch.export.Dim("events", min=2)}
    example, other = (tuple(on(device, norm_inputs(count)).values()) for count in (5, 12))
    program = torch.export.export(Norm(), example, dynamic_shapes=(events, events, None), strict=strict)
    assert torch.equal(program.module()(*other), Norm()(*other))


def test_what_does_not_fit_is_refused():
    y, z, weight = norm_inputs(3).values()
    with pytest.raises(ShapeError, match="E a multiple of groups"):
        gated_norm(y, z, weight, eps=1e-5, groups=3)
    with pytest.raises(ShapeError, match=r"z must be \(3, 8\)"):
        gated_norm(y, z[:2], weight, eps=1e-5)
    with pytest.raises(ShapeError, match=r"weight must be \(8,\)"):
        gated_norm(y, z, weight[:4], eps=1e-5)


def test_wider_groups_than_kernels_hold_are_refused(device):
    tensors = on(device, norm_inputs(1, width=8194))
    with pytest.raises(ShapeError, match="at most 8192 channels on the GPU, got 8194"):
        gated_norm_triton(*tensors.values(), eps=1e-5)


def test_what_is_no_floating_point_number_is_refused(device):
    y, z, weight = on(device, norm_inputs(3)).values()
    with pytest.raises(DtypeError, match=r"float32, bfloat16 or float16, got torch\.int64"):
        gated_norm(y.long(), z, weight, eps=1e-5)
    with pytest.raises(DtypeError, match=r"z of gated_norm must be a floating point tensor, got torch\.int64"):
        gated_norm(y, z.long(), weight, eps=1e-5)
    with pytest.raises(DtypeError, match="weight on meta"):
        gated_norm(y, z, weight.to("meta"), eps=1e-5)
