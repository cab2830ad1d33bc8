"""Checks of the doors: before any work, and only what the host knows."""

from torch import Tensor

from ssd_torchrec.errors import ShapeError


def check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...], hint: str) -> None:
    """Refuse `tensor`, if there is one, unless it has this shape.

    Args:
        hint: what to do about it, for the message.

    Raises:
        ShapeError: the shape is another one.
    """
    if tensor is not None and tensor.shape != shape:
        raise ShapeError(f"{name} must be {shape}, got {tuple(tensor.shape)}; {hint}")
