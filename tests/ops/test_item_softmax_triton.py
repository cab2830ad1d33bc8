"""The kernels of the item softmax: accuracy in tiles and splits, and what an operator owes PyTorch."""

import pytest
import torch
from torch import Tensor, nn

from ssd_torchrec.errors import ShapeError
from ssd_torchrec.ops import item_softmax_triton as module
from ssd_torchrec.ops.item_softmax import item_softmax_definition
from ssd_torchrec.ops.item_softmax_triton import item_softmax_triton
from tests.numerics import assert_as_accurate_as_eager
from tests.ops.test_item_softmax import OPTIONS, LargestTensor, call, in_fp64, results, softmax_inputs

SIZES = {"several-tiles": (150, 200), "part-of-a-tile": (9, 70), "no-queries": (0, 7), "no-candidates": (3, 0)}


def assert_accurate(tensors: dict[str, Tensor]) -> None:
    truth = results(item_softmax_definition, in_fp64(tensors))
    eager = results(item_softmax_definition, tensors)
    got = results(item_softmax_triton, tensors)
    assert got["loss"].dtype == torch.float32
    for name in truth:
        assert_as_accurate_as_eager(name, got[name], eager[name], truth[name])


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_are_as_accurate_as_eager(dtype, options, sizes, device, monkeypatch):
    monkeypatch.setattr(module, "PROGRAMS", 4)  # splits of several tiles
    assert_accurate(softmax_inputs(*sizes, *options, dtype=dtype, device=device))


@pytest.mark.parametrize("programs", [1, 512], ids=["no-splits", "a-tile-a-split"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_splits_do_not_matter(dtype, programs, device, monkeypatch):
    monkeypatch.setattr(module, "PROGRAMS", programs)
    assert_accurate(softmax_inputs(150, 200, "log_q", "item", dtype=dtype, device=device))


@pytest.mark.parametrize("width", [1, 16, 65, 200, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_width_is_as_accurate_as_eager(dtype, width, device):
    assert_accurate(softmax_inputs(37, 45, "log_q", width=width, dtype=dtype, device=device))


def test_fp16_is_as_accurate_as_eager(device):
    assert_accurate(softmax_inputs(37, 45, "log_q", "item", dtype=torch.float16, device=device))


def test_small_chances_count_in_fp16(device):
    """A thousand candidates with p = 1e-9 each, which is 0 in fp16, pull a query by the sum of their chances."""
    tensors = softmax_inputs(3, 1001, width=2, dtype=torch.float16, device=device)
    for name in ("queries", "candidates"):
        tensors[name][:] = torch.tensor([1, 0] if name == "queries" else [0, 1])
    tensors["candidates"][0] = torch.tensor([20.75, 0])
    tensors["target"][:] = 0
    got, truth = (
        results(softmax, t)["dqueries"][:, 1]
        for softmax, t in ((item_softmax_triton, tensors), (item_softmax_definition, in_fp64(tensors)))
    )
    assert truth[0] < -1e-6
    torch.testing.assert_close(got, truth.half(), rtol=0, atol=2**-24)  # the next number of fp16


def test_rows_may_lie_apart(device):
    tensors = softmax_inputs(20, 30, "log_q", dtype=torch.float32, device=device)
    apart = {name: torch.randn(len(tensors[name]), 9, device=device) for name in ("queries", "candidates")}
    for name, wide in apart.items():
        wide[:, :6] = tensors[name]
    packed = call(item_softmax_triton, tensors)
    strided = call(item_softmax_triton, tensors | {name: wide[:, :6] for name, wide in apart.items()})
    assert torch.equal(packed, strided)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_runs_agree_to_the_bit(dtype, device):
    tensors = softmax_inputs(70, 90, "log_q", "item", dtype=dtype, device=device)
    first, second = (results(item_softmax_triton, tensors) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("wrong", [-2, 4, 2**32])
def test_a_wrong_target_makes_its_own_loss_nan_and_no_gradient(wrong, device):
    tensors = softmax_inputs(3, 4, "log_q", "item", dtype=torch.float32, device=device)
    tensors["target"][:] = torch.tensor([0, -1, 2])
    expected = results(item_softmax_triton, tensors)
    tensors["target"][1] = wrong
    got = results(item_softmax_triton, tensors)
    assert got["loss"].isnan().tolist() == [False, True, False]
    for name in expected:
        if name != "loss":
            assert torch.equal(got[name], expected[name]), name


def test_the_table_of_logits_is_never_held(device, monkeypatch):
    """Looks into the launches, since a dispatch mode does not see what an operator allocates."""
    monkeypatch.setattr(module, "PROGRAMS", 4)
    tensors = softmax_inputs(300, 400, "log_q", "item", dtype=torch.float32, device=device)
    operands = [tensors[name] for name in ("queries", "candidates", "target", "log_q", "item_of_candidate")]
    with LargestTensor() as largest:
        loss, log_sum_exp = module._launch_forward(*operands)
        module._launch_dqueries(loss, *operands, log_sum_exp)
        module._launch_dcandidates(loss, *operands, log_sum_exp)
    assert 400 * 6 <= largest.numbers <= 2 * 4 * 400 * 6 < 300 * 400  # two splits, whose bytes the interpreter copies


def test_rows_wider_than_a_tile_are_refused(device):
    tensors = softmax_inputs(3, 4, width=257, dtype=torch.float32, device=device)
    with pytest.raises(ShapeError, match="width at most 256 on CUDA, got 257"):
        call(item_softmax_triton, tensors)


@pytest.mark.parametrize("options", [(), ("log_q", "item")], ids=["plain", "both"])
def test_kernels_are_sound_operators(options, device):
    tensors = softmax_inputs(20, 30, *options, dtype=torch.float32, device=device)
    operands = [tensors.get(name) for name in ("queries", "candidates", "target", "log_q", "item_of_candidate")]
    ops = torch.ops.ssd_torchrec
    loss, log_sum_exp = ops.item_softmax(*operands)
    torch.library.opcheck(ops.item_softmax.default, tuple(operands))
    for backward in (ops.item_softmax_dqueries.default, ops.item_softmax_dcandidates.default):
        torch.library.opcheck(backward, (loss, *operands, log_sum_exp))


def test_kernels_compile_whole_for_sizes_to_come(device):
    compiled = torch.compile(
        lambda *args, **options: item_softmax_triton(*args, **options),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for sizes in [(20, 30), (33, 47)]:
        tensors = softmax_inputs(*sizes, "log_q", "item", dtype=torch.float32, device=device)
        got, expected = results(compiled, tensors), results(item_softmax_triton, tensors)
        for name in expected:
            assert torch.equal(got[name], expected[name]), name


class _Loss(nn.Module):
    def forward(self, queries: Tensor, candidates: Tensor, target: Tensor, log_q: Tensor, item: Tensor) -> Tensor:
        return item_softmax_triton(queries, candidates, target, log_q=log_q, item_of_candidate=item)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not-strict"])
def test_kernels_export_with_sizes_to_come(strict, device):
    def inputs(*sizes: int) -> tuple[Tensor, ...]:
        tensors = softmax_inputs(*sizes, "log_q", "item", dtype=torch.float32, device=device)
        return tuple(tensors[name] for name in ("queries", "candidates", "target", "log_q", "item_of_candidate"))

    M, K = torch.export.Dim("M", min=2), torch.export.Dim("K", min=2)
    exported = torch.export.export(
        _Loss(), inputs(20, 30), dynamic_shapes=({0: M}, {0: K}, {0: M}, {0: K}, {0: K}), strict=strict
    )
    other = inputs(33, 47)
    assert torch.equal(exported.module()(*other), _Loss()(*other))
