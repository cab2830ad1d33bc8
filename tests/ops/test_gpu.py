"""What no interpreter shows: the kernels at the sizes they are for, on the GPU itself.

The truth is the CPU path in fp64, which other tests hold against the definition. Tolerances are three times the errors
of products whose operands are rounded to bf16, and of results that are, by root mean square. The loss is half the sum
of the squared outputs: with signs at random a parameter's gradient would cancel over the events, and its error not.
"""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.ops.gated_norm import gated_norm, gated_norm_definition
from ssd_torchrec.ops.item_softmax import item_softmax, item_softmax_definition
from ssd_torchrec.ops.selective_scan import selective_scan, selective_scan_stepped
from ssd_torchrec.ops.short_conv import short_conv, short_conv_stream
from ssd_torchrec.ops.ssd_bidirectional import ssd_scan_bidirectional_chunked
from ssd_torchrec.ops.ssd_scan import ssd_scan, ssd_scan_chunked
from ssd_torchrec.ops.ssd_triton import ssd_scan_bidirectional_triton, ssd_scan_triton

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation"),  # of PyTorch's, in the truth
]
MANY_PROCESSES = importlib.util.find_spec("xdist") is not None
one_at_a_time = pytest.mark.xdist_group("large") if MANY_PROCESSES else lambda test: test  # each takes much memory

LENGTHS = {"mean-9": (5, 4), "mean-47": (5, 43), "mean-165": (20, 400)}  # shortest row, scale beyond it; 200 at most
SIZES = {
    "narrow": (4, 32, 32),
    "wide": (32, 16, 64),
    "large": (4, 64, 64),
    "largest": (2, 64, 128),
}  # heads, channels, state
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BF16 = {
    **dict.fromkeys(["y", "x", "B", "C", "z", "queries", "candidates"], 1.1e-2),
    "dt": 7e-3,
    "A": 1.3e-2,
    "dt_bias": 2.1e-3,
    "loss": 6e-3,
}
FP32, PARAMETERS_FP32 = 3e-5, 1e-4
OF_PARAMETERS = ("A", "D", "dt_bias", "weight", "bias")

Tensors = dict[str, Tensor]
Run = Callable[[Tensors, JaggedLayout], Tensor]


@pytest.fixture(autouse=True)
def memory_comes_back() -> Iterator[None]:
    """To the other processes that test on the same GPU."""
    yield
    torch.cuda.empty_cache()


def row_lengths(kind: str, rows: int = 256) -> list[int]:
    shortest, scale = LENGTHS[kind]
    beyond = -torch.rand(rows, generator=torch.Generator().manual_seed(0)).log() * scale
    return (shortest + beyond).long().clamp(max=200).tolist()


class Draw:
    """Random numbers: of events in the dtype, parameters in fp32."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.rng = torch.Generator(device).manual_seed(0)

    def events(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.rng, device=self.device, dtype=self.dtype)

    def between(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.rng, device=self.device)


def scan_tensors(events: int, size: tuple[int, int, int], draw: Draw, *ways: int) -> Tensors:
    H, P, N = size
    return {
        "x": draw.events(events, H, P),
        "dt": draw.events(events, *ways, H),
        "A": draw.between(-8, -1, *ways, H),
        "B": draw.events(events, 1, N),
        "C": draw.events(events, 1, N),
        "dt_bias": draw.between(-6, -2, *ways, H),
        "D": draw.between(0.5, 1.5, H),
    }


def selective_tensors(events: int, size: tuple[int, int, int], draw: Draw) -> Tensors:
    E, N = size[0] * size[1], size[2]
    return {
        "x": draw.events(events, E),
        "dt": draw.events(events, E),
        "A": draw.between(-N, -1, E, N),
        "B": draw.events(events, N),
        "C": draw.events(events, N),
        "dt_bias": draw.between(-6, -2, E),
        "D": draw.between(0.5, 1.5, E),
    }


def conv_tensors(events: int, size: tuple[int, int, int], draw: Draw) -> Tensors:
    channels = size[0] * size[1] + 2 * size[2]
    return {
        "x": draw.events(events, channels),
        "weight": draw.between(-1, 1, channels, 4),
        "bias": draw.between(-1, 1, channels),
    }


def norm_tensors(events: int, size: tuple[int, int, int], draw: Draw) -> Tensors:
    width = size[0] * size[1]
    return {"y": draw.events(events, width), "z": draw.events(events, width), "weight": draw.between(0.5, 1.5, width)}


def scan_with(scan: Callable[..., Any], **options: Any) -> Run:
    def run(t: Tensors, layout: JaggedLayout) -> Tensor:
        return scan(t["x"], t["dt"], t["A"], t["B"], t["C"], layout, dt_bias=t["dt_bias"], D=t["D"], **options)

    return run


def conv_with(conv: Callable[..., Any]) -> Run:
    return lambda t, layout: conv(t["x"], t["weight"], t["bias"], layout, activation="silu")


def norm_with(norm: Callable[..., Tensor]) -> Run:
    return lambda t, layout: norm(t["y"], t["z"], t["weight"], eps=1e-5)


OPERATORS = {
    "ssd_scan": (scan_tensors, scan_with(ssd_scan), scan_with(ssd_scan_chunked)),
    "selective_scan": (selective_tensors, scan_with(selective_scan), scan_with(selective_scan_stepped)),
    "short_conv": (conv_tensors, conv_with(short_conv), conv_with(short_conv_stream)),
    "gated_norm": (norm_tensors, norm_with(gated_norm), norm_with(gated_norm_definition)),
}


def results(run: Run, tensors: Tensors, layout: JaggedLayout, cotangent: Tensor | None = None) -> Tensors:
    """The output and the gradient of every tensor, by its name; without a cotangent that is the output."""
    tensors = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    output = run(tensors, layout)
    cotangent = output.detach() if cotangent is None else cotangent.to(output)
    grads = torch.autograd.grad(output, list(tensors.values()), cotangent)
    return {"output": output.detach(), **dict(zip(tensors, grads, strict=True))}


def assert_accurate(
    run: Run, truth_of: Run, tensors: Tensors, layout: JaggedLayout, dtype: torch.dtype, output: str = "y"
) -> Tensors:
    """The results, none further from the truth than allowed; `output` names the allowance of the output."""
    got = results(run, tensors, layout)
    truth = results(truth_of, {name: t.double() for name, t in tensors.items()}, layout, got["output"])
    for name, value in got.items():
        error = (value.double() - truth[name]).square().mean().sqrt() / truth[name].square().mean().sqrt()
        if dtype == torch.bfloat16:
            allowed = BF16.get(output if name == "output" else name, PARAMETERS_FP32)
        else:
            allowed = PARAMETERS_FP32 if name in OF_PARAMETERS else FP32
        assert error <= allowed, (
            f"{name}: off by {error:.2e} of the truth, allowed {allowed:.1e}"
        )  # a NaN fails this too
    return got


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_are_accurate_at_the_sizes_they_are_for(operator, dtype, lengths, size, device):
    make, run, truth = OPERATORS[operator]
    rows = row_lengths(lengths)
    layout = JaggedLayout.from_lengths(rows, device)
    tensors = make(sum(rows), size, Draw(device, dtype))
    assert_accurate(run, truth, tensors, layout, dtype)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("ways", [1, 2], ids=["one-direction", "both"])
@pytest.mark.parametrize("chunk", [16, 32])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_scans_are_accurate_with_every_chunk(dtype, chunk, ways, size, device):
    rows = row_lengths("mean-47")
    layout = JaggedLayout.from_lengths(rows, device)
    tensors = scan_tensors(sum(rows), size, Draw(device, dtype), *([2] if ways == 2 else []))
    kernels, chunked = {
        1: (ssd_scan_triton, ssd_scan_chunked),
        2: (ssd_scan_bidirectional_triton, ssd_scan_bidirectional_chunked),
    }[ways]
    assert_accurate(scan_with(kernels, chunk=chunk), scan_with(chunked), tensors, layout, dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("operator", ["ssd_scan", "selective_scan"])
def test_scans_are_accurate_over_long_rows(operator, dtype, device):
    make, run, truth = OPERATORS[operator]
    rows = [5000, 0, 3, 9000, 1]
    layout = JaggedLayout.from_lengths(rows, device)
    tensors = make(sum(rows), SIZES["narrow"], Draw(device, dtype))
    assert_accurate(run, truth, tensors, layout, dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_second_run_gives_the_same_bits(operator, dtype, device):
    make, run, _ = OPERATORS[operator]
    rows = row_lengths("mean-47", rows=2048)
    layout = JaggedLayout.from_lengths(rows, device)
    tensors = make(sum(rows), SIZES["narrow"], Draw(device, dtype))
    first = results(run, tensors, layout)
    for _ in range(3):
        for name, again in results(run, tensors, layout).items():
            assert torch.equal(first[name], again), name


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_captured_step_replays_on_other_numbers(operator, device):
    make, run, _ = OPERATORS[operator]
    rows = row_lengths("mean-47")
    layout = JaggedLayout.from_lengths(rows, device)
    tensors = make(sum(rows), SIZES["narrow"], Draw(device, torch.bfloat16))
    side = torch.cuda.Stream(device)
    with torch.cuda.stream(side):  # compiles outside the capture, as PyTorch asks
        results(run, tensors, layout)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(run, tensors, layout)
    for t in tensors.values():
        t.mul_(0.5)
    graph.replay()
    for name, again in results(run, tensors, layout).items():
        assert torch.equal(captured[name], again), name


@one_at_a_time
@pytest.mark.parametrize("operator", OPERATORS)
def test_more_rows_than_a_grid_has_in_its_second_dimension(operator, device):
    make, run, truth = OPERATORS[operator]
    rows = [1, 2] * 35_000
    layout = JaggedLayout.from_lengths(rows, device)
    tensors = make(sum(rows), SIZES["narrow"], Draw(device, torch.bfloat16))
    assert_accurate(run, truth, tensors, layout, torch.bfloat16)


@one_at_a_time
@pytest.mark.parametrize("operator", OPERATORS)
def test_beyond_two_to_the_31_numbers_the_last_row_is_what_it_is_alone(operator, device):
    make, run, _ = OPERATORS[operator]
    size, row = SIZES["wide"], 1000
    rows = [row] * (2**31 // (row * size[0] * size[1]) + 2)
    layout, last = JaggedLayout.from_lengths(rows, device), JaggedLayout.from_lengths([row], device)
    torch.use_deterministic_algorithms(False)  # filling this much memory with NaN takes longer than the kernels
    tensors = make(sum(rows), size, Draw(device, torch.bfloat16))
    of_last = {name: t[-row:] if len(t) == sum(rows) else t for name, t in tensors.items()}
    expected = results(run, of_last, last)
    got = results(run, tensors, layout)
    for name, value in got.items():
        if len(value) == sum(rows):
            error, truth = value[-row:].double() - expected[name].double(), expected[name].double()
            assert error.square().mean().sqrt() <= BF16["y"] * truth.square().mean().sqrt(), name  # a NaN fails this
        else:
            assert value.isfinite().all(), name


@one_at_a_time
def test_softmax_beyond_two_to_the_31_logits_is_what_it_is_for_few_queries(device):
    draw = Draw(device, torch.bfloat16)
    queries, candidates = draw.events(8192, 64), 0.3 * draw.events(300_000, 64)
    target = torch.randint(0, 300_000, (8192,), generator=draw.rng, device=device)
    few = slice(-64, None)
    loss = item_softmax(queries, candidates, target)[few]
    logits = queries[few].double() @ candidates.double().T
    torch.testing.assert_close(loss.double(), F.cross_entropy(logits, target[few], reduction="none"), rtol=1e-2, atol=0)


@pytest.mark.parametrize("items", [10_000, 100_000])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_softmax_is_accurate_at_the_sizes_it_is_for(dtype, items, device):
    draw = Draw(device, dtype)
    tensors = {"queries": draw.events(1024, 64), "candidates": 0.3 * draw.events(items, 64)}
    target = torch.randint(0, items, (1024,), generator=draw.rng, device=device)
    target[::7] = -1
    layout = JaggedLayout.from_lengths([], device)

    def loss_of(softmax: Callable[..., Tensor]) -> Run:
        return lambda t, _: softmax(t["queries"], t["candidates"], target)

    got = assert_accurate(loss_of(item_softmax), loss_of(item_softmax_definition), tensors, layout, dtype, "loss")
    again = results(loss_of(item_softmax), tensors, layout)
    for name in got:
        assert torch.equal(got[name], again[name]), name


def test_memory_of_the_softmax_does_not_grow_with_the_items(device):
    torch.use_deterministic_algorithms(False)
    queries = torch.randn(4096, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    beyond = []
    for items in (100_000, 400_000):
        candidates = torch.randn(items, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
        target = torch.randint(0, items, (4096,), device=device)
        item_softmax(queries[:8], candidates, target[:8]).sum().backward()  # so that nothing is compiled below
        candidates.grad = queries.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        item_softmax(queries, candidates, target).sum().backward()
        torch.cuda.synchronize()
        beyond.append(torch.cuda.max_memory_allocated() - before - candidates.nbytes)
        candidates.grad = queries.grad = None
    assert beyond[1] - beyond[0] < 2**20, [f"{b / 2**20:.1f} MiB" for b in beyond]
