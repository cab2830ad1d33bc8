"""What all kernel launches share: which tensors kernels take, and how those are handed over."""

from collections.abc import Mapping
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs

from ssd_torchrec.errors import DtypeError

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED: bool = knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter, on the CPU: decided when they are imported."""


def architecture() -> int:
    """Compute capability of the current GPU; in the interpreter 90, Hopper, which it stands in for."""
    if INTERPRETED:
        return 90
    target: Any = triton.runtime.driver.active.get_current_target()
    return int(target.arch)


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of `tl.dot`: fp32 as three products in tf32, since exact ones leave the tensor cores."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def inner_contiguous(events: Tensor) -> Tensor:
    """(T, ...) with the numbers of an event side by side; events may lie apart, as the parts of a split do."""
    packed = 1
    for size, stride in zip(reversed(events.shape[1:]), reversed(events.stride()[1:]), strict=True):
        if size != 1 and stride != packed:
            return events.contiguous()
        packed *= size
    return events


def check_tensors(op: str, like: Tensor, others: Mapping[str, Tensor | None]) -> None:
    """Refuse, before a launch, what no kernel takes.

    Args:
        like: the operator's first input, whose device all tensors must share.

    Raises:
        DtypeError: `like` is none of fp32, bf16 and fp16, another tensor is no floating point one, or lies elsewhere.
    """
    if like.dtype not in KERNEL_DTYPES:
        raise DtypeError(f"{op} must be given float32, bfloat16 or float16, got {like.dtype}; convert its inputs")
    for name, tensor in others.items():
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise DtypeError(f"{name} of {op} must be a floating point tensor, got {tensor.dtype}; convert it")
        if tensor.device != like.device:
            raise DtypeError(
                f"tensors of {op} must be on one device, got {name} on {tensor.device} beside {like.device}; move it"
            )
