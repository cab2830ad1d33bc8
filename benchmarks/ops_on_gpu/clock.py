"""Time and memory of calls on one device."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

COLD_BYTES = 256 * 2**20
"""Written before each timed call: more than the second-level cache of any GPU holds."""
CYCLES_OF_MS = 2e6
HELD_MS = 5.0
"""How long the device sleeps at most before a timed call, while the host enqueues its launches."""


@dataclass(frozen=True)
class Timing:
    device_ms: float
    """Median time of the device from a call's first kernel to its last, with nothing of its data in the cache."""

    call_ms: float
    """Mean time of a call among many, one after the other: what a training loop waits if nothing else holds it up."""


class Clock:
    """On the CPU, where kernels are interpreted, one call is timed: that is to rehearse, not to measure."""

    def __init__(self, device: torch.device, patience_ms: float = 40.0) -> None:
        self.on_gpu = device.type == "cuda"
        self.patience_ms = patience_ms
        self._cold = torch.empty(COLD_BYTES, dtype=torch.uint8, device=device) if self.on_gpu else None

    def measure(self, run: Callable[[], object]) -> Timing:
        if not self.on_gpu:
            taken_ms = self._enqueued_ms(run)
            return Timing(taken_ms, taken_ms)
        run()  # brings its memory into the state that a training loop has
        torch.cuda.synchronize()
        start = time.perf_counter()
        enqueue_ms = self._enqueued_ms(run)
        torch.cuda.synchronize()
        repeats = int(self.patience_ms / (1e3 * (time.perf_counter() - start)))
        repeats = max(3, min(repeats, 50))
        spans = [self._span(run, enqueue_ms) for _ in range(repeats)]
        torch.cuda.synchronize()
        device_ms = statistics.median(begin.elapsed_time(end) for begin, end in spans)
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
        return Timing(device_ms, 1e3 * (time.perf_counter() - start) / repeats)

    def _span(self, run: Callable[[], object], enqueue_ms: float) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """Between the two events the device waits for no launch: it sleeps until all of them are in its queue."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        assert self._cold is not None
        self._cold.zero_()
        torch.cuda._sleep(int(CYCLES_OF_MS * min(1.5 * enqueue_ms, HELD_MS)))
        begin.record()
        run()
        end.record()
        return begin, end

    @staticmethod
    def _enqueued_ms(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)

    def peak_bytes(self, run: Callable[[], object]) -> int:
        """Memory allocated at the worst moment of a call, beyond what was before; 0 on the CPU."""
        if not self.on_gpu:
            run()
            return 0
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def copied_bytes_per_s(self) -> float:
        """Bytes read and written by a large copy within the device: no kernel that waits for memory is faster."""
        count = 2**30 if self.on_gpu else 2**20
        source = torch.randint(0, 255, (count,), dtype=torch.uint8, device="cuda" if self.on_gpu else "cpu")
        target = torch.empty_like(source)
        return 2 * count / (1e-3 * self.measure(lambda: target.copy_(source)).device_ms)
