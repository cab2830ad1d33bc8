"""Numbers of the published programs, run in fp64: one safetensors file a case, beside an index.

The folder is named by SSD_TORCHREC_GOLDEN, or is `../shared/golden` beside the repository; without it these tests skip.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

FOLDER = Path(os.environ.get("SSD_TORCHREC_GOLDEN", Path(__file__).parents[2] / "shared" / "golden"))


def golden_cases(prefix: str) -> list[Any]:
    """Parameters for `pytest.mark.parametrize`: the index entry of each case whose name starts with `prefix`."""
    if not (FOLDER / "index.json").exists():
        reason = "no golden numbers: SSD_TORCHREC_GOLDEN names no folder with an index.json"
        return [pytest.param(None, marks=pytest.mark.skip(reason=reason), id=prefix)]
    cases = json.loads((FOLDER / "index.json").read_text())
    return [pytest.param(case, id=case["case"]) for case in cases if case["case"].startswith(prefix)]


def golden_tensors(case: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors of a case, by their full names: `input.x`, `expected.y`, `grad.x`."""
    load_file = pytest.importorskip("safetensors.torch", reason="golden numbers need safetensors").load_file
    return load_file(FOLDER / case["file"])


def assert_golden(name: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Fail unless |got - expected| <= tolerance * (1 + max |expected|) everywhere."""
    assert got.shape == expected.shape, f"{name}: {tuple(got.shape)}, expected {tuple(expected.shape)}"
    if not got.numel():
        return
    worst = (got.double() - expected).abs().max()
    allowed = tolerance * (1 + expected.abs().max())
    assert worst <= allowed, f"{name}: off by {worst:.3e}, allowed {allowed:.3e}"  # a NaN fails this too


def gradients(outputs: list[Tensor], cotangents: list[Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradient of each input, by its name."""
    cotangents = [c.to(o) for o, c in zip(outputs, cotangents, strict=True)]
    return dict(zip(inputs, torch.autograd.grad(outputs, list(inputs.values()), cotangents), strict=True))
