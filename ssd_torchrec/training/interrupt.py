"""SIGTERM ends a run at a step that all ranks agree on, so that the checkpoint written then is whole."""

import signal
from collections.abc import Callable
from types import FrameType

import torch
from torch import Tensor

AGREE_EVERY = 4  # steps between agreements: a job has seconds to stop, and each agreement is one small all-reduce


class StopRequest:
    """Notes SIGTERM, or the same asked for by `request`; `agreed` tells whether any rank was asked to stop."""

    def __init__(self, reduce_sum: Callable[[Tensor], Tensor]) -> None:
        self._reduce_sum = reduce_sum
        self._asked = False
        self._previous = signal.SIG_DFL

    def __enter__(self) -> "StopRequest":
        self._previous = signal.signal(signal.SIGTERM, self.request)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def request(self, _signal: int = 0, _frame: FrameType | None = None) -> None:
        """Ask to stop at the next agreed step; safe to call from a signal handler."""
        self._asked = True

    def agreed(self, step: int) -> bool:
        """Collective at every `AGREE_EVERY`-th step, when it returns the same on all ranks; False between them."""
        if step % AGREE_EVERY:
            return False
        return bool(self._reduce_sum(torch.tensor([float(self._asked)], dtype=torch.float64)) > 0)
