"""Where the time of a step goes: its kernels by time, and what the host does meanwhile.

    python -m benchmarks.step_profile        on a GPU; prints a table a step; under a minute
    python -m benchmarks.step_profile --rehearse

Steps: next items of a large catalogue under sampled softmax and exact softmax in place, a DLRM with histories, TiM4Rec
alone. Wall and device are apart where the host is too slow to keep the device busy.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import dlrm, scale
from benchmarks.scale_gpu import fill
from ssd_torchrec.distributed.process import World, process_group
from ssd_torchrec.encoders.registry import SYSTEMS
from ssd_torchrec.encoders.tim4rec import TiM4Rec
from ssd_torchrec.jagged import JaggedLayout

STEPS, SHOWN = 3, 16
Step = Callable[[], object]


def profiled(step: Step, device: torch.device) -> Iterator[str]:
    """Lines of a table, in ms a step."""
    on_gpu = device.type == "cuda"
    wait = torch.cuda.synchronize if on_gpu else (lambda: None)
    for _ in range(3):
        step()
    wait()
    began = time.perf_counter()
    for _ in range(STEPS):
        step()
    wait()
    wall_ms = 1e3 * (time.perf_counter() - began) / STEPS
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as recorded:
        for _ in range(STEPS):
            step()
        wait()
    averages = recorded.key_averages()
    on_device = [e for e in averages if str(e.device_type).endswith("CUDA")]
    kernels = [e for e in on_device if not e.is_user_annotation]  # from a range's first kernel to its last
    device_ms = sum(e.self_device_time_total for e in kernels) / STEPS / 1e3
    launches = sum(e.count for e in kernels) / STEPS
    yield f"wall {wall_ms:.2f} ms, device {device_ms:.2f} ms in {launches:,.0f} launches"
    for e in sorted(kernels, key=lambda e: -e.self_device_time_total)[:SHOWN]:
        yield f"  {e.self_device_time_total / STEPS / 1e3:8.3f} device  x{e.count / STEPS:6.1f}  {e.key[:90]}"
    calls = [e for e in averages if e not in on_device]
    for e in sorted(calls, key=lambda e: -e.self_cpu_time_total)[:SHOWN]:
        yield f"  {e.self_cpu_time_total / STEPS / 1e3:8.3f} host    x{e.count / STEPS:6.1f}  {e.key[:90]}"


def catalogue_steps(world: World, items: int, tokens: int) -> Iterator[tuple[str, Step]]:
    for loss, of in (("sampled", tokens), ("in place", min(tokens, 4096))):
        case = scale.Case(loss=loss, items=items, tokens=of, rounds=1)
        with mock.patch("ssd_torchrec.distributed.shard.init_table", fill):
            trainable = scale.build(case, world)
        batch = scale.batch(case, world).to(world.device)
        yield f"{loss} softmax, {items:,} items, {of:,} events, fp32", scale.step_of(trainable, batch)


def dlrm_steps(world: World, rows: int) -> Iterator[tuple[str, Step]]:
    trainable = dlrm.build(TiM4Rec(dlrm.ENCODER), 200, world)
    batches = [dlrm.batch(200, seed, rows) for seed in range(4)]
    for name, pipeline in dlrm.PIPELINES.items():
        yield f"DLRM, 4 batches of {rows:,} rows, {name}", dlrm.trained_by(pipeline, trainable, batches, world)


def encoder_steps(device: torch.device, rows: int) -> Iterator[tuple[str, Step]]:
    encoder = SYSTEMS["tim4rec"].small.build().to(device)
    layout = JaggedLayout.from_lengths([157] * rows, device)
    events = torch.randn(layout.num_events, encoder.width, device=device, requires_grad=True)
    timestamps = 1000 * torch.arange(layout.num_events, device=device)
    leaves = [events, *encoder.parameters()]

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            out = encoder(events, timestamps, layout)
        out.backward(torch.ones_like(out))
        for leaf in leaves:
            leaf.grad = None

    yield f"TiM4Rec, {layout.num_events:,} events, bf16", step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="small, on the CPU")
    small = parser.parse_args().rehearse
    device = torch.device("cpu") if small else torch.device("cuda", 0)
    os.environ.setdefault("LOCAL_WORLD_SIZE", "1")
    world = World(device=device, meeting_point=f"127.0.0.1:{20_000 + os.getpid() % 20_000}")
    with process_group(world):
        for name, step in (
            *catalogue_steps(world, 10**4 if small else 10**6, 1024 if small else 65_536),
            *dlrm_steps(world, 8 if small else 1024),
            *encoder_steps(device, 8 if small else 835),
        ):
            print(f"\n{name}")
            for line in profiled(step, device):
                print(line, flush=True)


if __name__ == "__main__":
    main()
