"""In which dtype operators sum: at least fp32, whatever comes in and whatever autocast would like."""

import torch
from torch import Tensor


def sum_dtype(x: Tensor) -> torch.dtype:
    """fp32, or fp64 if `x` is."""
    return torch.promote_types(x.dtype, torch.float32)


def as_given(x: Tensor) -> torch.autocast:
    """A context in which matrix products keep the dtype of their operands, autocast or not."""
    return torch.autocast(x.device.type, enabled=False)
