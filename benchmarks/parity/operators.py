"""The operators on published inputs, each against outputs and, by the given cotangents, gradients."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.parity.case import Case, Computed
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.ops.gated_norm import gated_norm
from ssd_torchrec.ops.selective_scan import selective_scan
from ssd_torchrec.ops.short_conv import short_conv
from ssd_torchrec.ops.ssd_scan import ssd_scan


def ssd(case: Case, dtype: torch.dtype) -> Computed:
    """`ssd_scan`, its raw step gated outside."""
    inputs = _inputs(case, dtype)
    raw = inputs["dt"] * inputs.get("gate", 1)
    y, final = ssd_scan(
        *(inputs["x"], raw, inputs["A"], inputs["B"], inputs["C"], _layout(case)),
        dt_bias=inputs["dt_bias"],
        D=inputs["D"],
        initial_state=inputs.get("initial_states"),
        return_final_state=True,
    )
    return _computed(case, inputs, {"y": y, "final_states": final, "delta": F.softplus(raw + inputs["dt_bias"])})


def selective(case: Case, dtype: torch.dtype) -> Computed:
    """`selective_scan`."""
    inputs = _inputs(case, dtype)
    y, final = selective_scan(
        *(inputs["u"], inputs["delta"], inputs["A"], inputs["B"], inputs["C"], _layout(case)),
        dt_bias=inputs["delta_bias"],
        D=inputs["D"],
        z=inputs.get("z"),
        initial_state=inputs.get("initial_states"),
        return_final_state=True,
    )
    return _computed(case, inputs, {"y": y, "final_states": final})


def conv(case: Case, dtype: torch.dtype) -> Computed:
    """`short_conv`."""
    inputs = _inputs(case, dtype)
    y = short_conv(inputs["x"], inputs["weight"], inputs["bias"], _layout(case), activation=case.config["activation"])
    return _computed(case, inputs, {"y": y})


def norm(case: Case, dtype: torch.dtype) -> Computed:
    """`gated_norm`."""
    inputs, options = _inputs(case, dtype), {name: case.config[name] for name in ("eps", "groups")}
    return _computed(case, inputs, {"out": gated_norm(inputs["y"], inputs["z"], inputs["weight"], **options)})


def _layout(case: Case) -> JaggedLayout:
    return JaggedLayout.from_lengths(case.inputs("offsets").diff())


def _inputs(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """All that is differentiated by: neither integers nor cotangents."""
    names = [name.removeprefix("input.") for name in case.tensors if name.startswith("input.")]
    floats = [name for name in names if case.inputs(name).is_floating_point() and not name.startswith("grad_")]
    return {name: case.inputs(name).to(dtype).requires_grad_() for name in floats}


def _computed(case: Case, inputs: dict[str, Tensor], found: dict[str, Tensor]) -> Computed:
    """Ours beside each output and gradient of the case: none is left out."""
    outputs = _beside(case, "expected.", found)
    seen = {name: out for name, out in found.items() if f"input.grad_{name}" in case.tensors}
    cotangents = [case.inputs(f"grad_{name}").to(out.dtype) for name, out in seen.items()]
    gradients = torch.autograd.grad([*seen.values()], [*inputs.values()], cotangents)
    return Computed(outputs, _beside(case, "grad.", dict(zip(inputs, gradients, strict=True))))


def _beside(case: Case, prefix: str, found: dict[str, Tensor]) -> list[tuple[str, Tensor, Any]]:
    return [
        (full, found[full.removeprefix(prefix)], theirs)
        for full, theirs in case.tensors.items()
        if full.startswith(prefix)
    ]
