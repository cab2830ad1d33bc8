"""How fast all encoders train, and how much memory that takes: forward and backward, on histories of many lengths.

    python -m benchmarks.encoders              the CPU, one thread; writes benchmarks/results/encoders-cpu.md
    python -m benchmarks.encoders --device cuda

All meet the same batches in turn, so that a busy machine slows them alike; figures are medians over rounds. Those that
have a longest length are built for the longest history of the batch, so that all see the same events, whole. Memory is
the peak of one step beyond what was held before it: on the CPU what the system had to give the process.
"""

import argparse
import ctypes
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import processor, slug
from ssd_torchrec.encoders.encoder import Encoder, EncoderConfig
from ssd_torchrec.encoders.registry import SYSTEMS
from ssd_torchrec.jagged import JaggedLayout

RESULTS = Path(__file__).parent / "results"
BASE = "sasrec"  # ratios are to it: what RecMamba's paper compares with
LONGEST = {"tisasrec": 500}  # it has numbers for each pair of events


@dataclass(frozen=True, kw_only=True)
class Histories:
    """Lengths of the rows of one batch."""

    name: str
    lengths: list[int]


def log_normal(name: str, shortest: int, median_beyond: float, sigma: float, tokens: int) -> Histories:
    """Rows as a data set has them, until there are so many events."""
    drawn = np.random.default_rng(0).standard_normal(tokens)
    lengths = shortest + (median_beyond * np.exp(sigma * drawn)).astype(np.int64)
    return Histories(name=name, lengths=lengths[: np.searchsorted(lengths.cumsum(), tokens)].tolist())


def histories(tokens: int) -> list[Histories]:
    return [
        log_normal("like Beauty", 4, 2.75, 1.2, tokens),
        log_normal("like KuaiRand", 5, 28.0, 0.9, tokens),
        log_normal("like MovieLens-1M", 18, 78.0, 1.135, tokens),
        Histories(name="of 2,000 events", lengths=[2000] * max(1, tokens // 2000)),
        Histories(name="of 10,000 events", lengths=[10_000] * max(1, tokens // 10_000)),
    ]


def contenders(longest: int) -> dict[str, EncoderConfig]:
    """All systems in their small shape, as long as the histories are."""
    configs: dict[str, EncoderConfig] = {}
    for name, system in SYSTEMS.items():
        if longest > LONGEST.get(name, longest):
            continue
        config = system.small
        if config.length_cap:
            config = dataclasses.replace(config, **{_cap_field(config): longest})
        configs[name] = config
    return configs


def _cap_field(config: EncoderConfig) -> str:
    return next(field.name for field in dataclasses.fields(config) if field.name in ("max_length", "window_length"))


def step_of(encoder: Encoder, rows: Histories, device: torch.device) -> Callable[[], None]:
    """Forward and backward to parameters and events; on a GPU in bf16, as one trains there."""
    layout = JaggedLayout.from_lengths(rows.lengths, device)
    seeded = torch.Generator().manual_seed(0)
    timestamps = torch.randn(layout.num_events, generator=seeded).mul(3.5).add(9).exp().long().cumsum(0).to(device)
    events = torch.randn(layout.num_events, encoder.width, generator=seeded).to(device).requires_grad_()

    def run() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            out = encoder(events, timestamps, layout)
        out.backward(torch.ones_like(out))
        events.grad = None
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def peak_mib(step: Callable[[], None], device: torch.device) -> float:
    """Memory of one step beyond what was there."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status_kib("VmRSS")
    step()
    return (status_kib("VmHWM") - before) / 2**10


def status_kib(name: str) -> int:
    """A figure of this process as the kernel has it, such as VmRSS or VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def measure(rows: Histories, rounds: int, device: torch.device) -> list[str]:
    """Lines of the table, one a system."""
    torch.manual_seed(0)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    steps = {n: step_of(c.build().to(device), rows, device) for n, c in contenders(max(rows.lengths)).items()}
    memory = {}
    for name, step in steps.items():
        step()  # compiles, and allocates what stays
        memory[name] = peak_mib(step, device)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            begin = clock()
            step()
            seconds[name].append(clock() - begin)
    return [_line(n, sum(rows.lengths), s, seconds[BASE], memory[n], memory[BASE]) for n, s in seconds.items()]


def _line(name: str, events: int, seconds: list[float], base: list[float], mib: float, base_mib: float) -> str:
    ratio = statistics.median(own / other for own, other in zip(seconds, base, strict=True))
    rate = events / statistics.median(seconds)
    return f"| {name} | {rate:,.0f} | {ratio:.2f}x | {mib:,.0f} | {mib / base_mib:.2f}x |"


def section(rows: Histories, rounds: int, device: torch.device) -> str:
    lengths: Tensor = torch.tensor(rows.lengths, dtype=torch.float64)
    head = f"{len(rows.lengths)} rows, mean length {lengths.mean():.0f}, longest {lengths.max():,.0f}."
    table = ["| | events/s | time over SASRec's | peak MiB | over SASRec's |", "|---|---|---|---|---|"]
    return "\n".join([f"## Histories {rows.name}\n", f"{head}\n", *table, *measure(rows, rounds, device), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch, on the CPU")
    parser.add_argument("--rounds", type=int, default=5, help="of all encoders in turn")
    parser.add_argument("--tokens", type=int, help="events of a batch, or one history; 8,192, and 131,072 on a GPU")
    parser.add_argument("--only", default="", help="histories whose name holds this, printed alone")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the table")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    device = torch.device(asked.device)
    tokens = asked.tokens or (8192 if device.type == "cpu" else 131_072)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{processor()}, {asked.threads} thread(s)"
    parts = [
        f"# All encoders on {'a GPU' if device.type == 'cuda' else 'the CPU'}\n",
        f"Printed by `python -m benchmarks.encoders --device {asked.device}`: {machine}, torch {torch.__version__}, "
        f"{'fp32' if device.type == 'cpu' else 'bf16'}, batches of {tokens:,} events or one history, medians of "
        f"{asked.rounds} rounds; {'processor time' if device.type == 'cpu' else 'time'}.",
        "Forward and backward of the encoder alone in its small shape, 64 wide (`ssd-torchrec models`), whole "
        "histories. SASRec is ours, with fused attention. TiSASRec has numbers for each pair of events: left out "
        f"beyond {LONGEST['tisasrec']:,} events.\n",
    ]
    name = "cpu" if device.type == "cpu" else slug(torch.cuda.get_device_name())
    for rows in histories(tokens):
        if asked.only not in rows.name:
            continue
        parts.append(section(rows, asked.rounds, device))
        print(parts[-1], flush=True)
        if asked.only:
            continue
        asked.output.joinpath(f"encoders-{name}.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()
