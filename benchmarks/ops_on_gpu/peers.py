"""The kernels that ours are measured against, called as their authors mean them to be.

mamba-ssm computes the same recurrence, from rows packed side by side: `seq_idx` says which row an event is of. Its
rows are cut into chunks, and chunks of one packed row follow each other, so that a batch is packed into 64 of them.
flash-linear-attention's simple GLA takes jagged events as they are. It has no step, no groups and no skip: those are
passes of PyTorch around it. Neither has a direction: what runs backwards is flipped before and after.
Sources: Dao & Gu 2024, arXiv:2405.21060, mamba-ssm 2.3.2; Yang et al. 2024, arXiv:2312.06635, fla-core 0.6.0.
"""

import functools
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops_on_gpu.contenders import Batch, Call, Contender, Tensors, as_it_is, leaves, of_way

PACKED_ROWS = 64


@functools.cache
def mamba_ssm(module: str) -> Any:
    """A Triton module of mamba-ssm, whose package refuses to be imported without its CUDA extension."""
    if "mamba_ssm" not in sys.modules:
        spec = importlib.util.find_spec("mamba_ssm")
        if spec is None:
            raise ModuleNotFoundError("mamba-ssm is not installed")
        package = types.ModuleType("mamba_ssm")
        package.__path__ = list(spec.submodule_search_locations or ())
        sys.modules["mamba_ssm"] = package
    return importlib.import_module(f"mamba_ssm.ops.triton.{module}")


@functools.cache
def fla(module: str) -> Any:
    """A module of flash-linear-attention. On Hopper it refuses gradients of `chunk_simple_gla` that Triton before 3.7.1
    got wrong at some sizes; they are let through here, since every contender is held against the definition first."""
    chunk_o: Any = importlib.import_module("fla.ops.common.chunk_o")
    chunk_o.TRITON_ABOVE_3_4_0 = False
    return importlib.import_module(f"fla.{module}")


class Packed:
    """Where the events of a batch lie in (R, L, ...): rows whole, none much fuller than another."""

    def __init__(self, batch: Batch) -> None:
        lengths, device = batch.lengths, batch.layout.offsets.device
        alike = len(lengths) <= PACKED_ROWS and len(set(lengths)) == 1
        room = [0] * (len(lengths) if alike else min(PACKED_ROWS, max(1, len(lengths) // 4)))
        starts: list[tuple[int, int]] = [(0, 0)] * len(lengths)
        for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
            into = room.index(min(room))
            starts[row] = (into, room[into])
            room[into] += lengths[row]
        self.shape = (len(room), max(room))
        first = torch.tensor([into * self.shape[1] + start for into, start in starts], device=device)
        self.slot = first[batch.layout.row_of_event] + batch.layout.position  # (T,)
        rows = torch.full((self.shape[0] * self.shape[1],), len(lengths), dtype=torch.int32, device=device)
        rows[self.slot] = batch.layout.row_of_event.int()
        self.seq_idx = rows.view(self.shape)

    def pack(self, events: Tensor) -> Tensor:
        slots = events.new_zeros(self.shape[0] * self.shape[1], *events.shape[1:])
        return slots.index_copy(0, self.slot, events).view(*self.shape, *events.shape[1:])

    def unpack(self, slots: Tensor) -> Tensor:
        return slots.flatten(0, 1).index_select(0, self.slot)


OF_EVENTS = ("x", "dt", "B", "C")


def mamba_scan(chunk: int) -> Contender:
    def contender(tensors: Tensors, batch: Batch) -> Call:
        scan = mamba_ssm("ssd_combined").mamba_chunk_scan_combined
        packed = Packed(batch)
        t = leaves({name: packed.pack(t) if name in OF_EVENTS else t for name, t in tensors.items()})
        flipped = packed.seq_idx.flip(1)

        def outputs() -> Tensor:
            x, B, C = (t[name] for name in ("x", "B", "C"))
            dt, A, bias = of_way(t, batch, 0)
            options: dict[str, Any] = {"dt_softplus": True, "seq_idx": packed.seq_idx}
            y = scan(x, dt, A, B, C, chunk, D=t["D"], dt_bias=bias, **options)
            if not batch.both:
                return y
            dt, A, bias = of_way(t, batch, 1)
            options["seq_idx"] = flipped
            x, dt, B, C = (events.flip(1) for events in (x, dt, B, C))
            return y + scan(x, dt, A, B, C, chunk, dt_bias=bias, **options).flip(1)

        return Call(t, outputs, packed.pack, packed.unpack)

    return contender


def fla_scan(name: str) -> Contender:
    def contender(tensors: Tensors, batch: Batch) -> Call:
        scan = getattr(fla("ops.simple_gla"), name)
        t, offsets = leaves(tensors), batch.layout.offsets
        flipped = offsets[-1] - offsets.flip(0)

        def one_way(way: int, turn: Callable[[Tensor], Tensor], offsets: Tensor) -> Tensor:
            dt, A, bias = of_way(t, batch, way)
            x, dt, B, C = (turn(events) for events in (t["x"], dt, t["B"], t["C"]))
            delta = F.softplus(dt.float() + bias)  # (T, H)
            q, k = (shared.expand(-1, x.shape[1], -1)[None] for shared in (C, B))
            v = (x * delta[..., None].to(x.dtype))[None]
            return turn(scan(q, k, v, g=(delta * A)[None], scale=1.0, cu_seqlens=offsets)[0][0])

        def outputs() -> Tensor:
            y = one_way(0, as_it_is, offsets) + t["D"].to(t["x"].dtype)[:, None] * t["x"]
            return y + one_way(1, lambda events: events.flip(0), flipped) if batch.both else y

        return Call(t, outputs)

    return contender


def fla_scan_alone(name: str) -> Contender:
    """Without the passes around it: steps taken, directions repeated for each head, no skip."""

    def contender(tensors: Tensors, batch: Batch) -> Call:
        scan = getattr(fla("ops.simple_gla"), name)
        x, offsets = tensors["x"], batch.layout.offsets
        delta = F.softplus(tensors["dt"].float() + tensors["dt_bias"])
        q, k = (tensors[n].expand(-1, x.shape[1], -1) for n in ("C", "B"))
        t = leaves(
            {"q": q[None], "k": k[None], "v": (x * delta[..., None]).to(x)[None], "g": (delta * tensors["A"])[None]}
        )
        return Call(t, lambda: scan(t["q"], t["k"], t["v"], g=t["g"], scale=1.0, cu_seqlens=offsets)[0])

    return contender


class Padded:
    """Events in (B, longest, ...), zeros after the last of a row."""

    def __init__(self, batch: Batch) -> None:
        layout = batch.layout
        self.shape = (layout.num_rows, layout.longest)
        self.slot = layout.row_of_event * layout.longest + layout.position

    def pad(self, events: Tensor) -> Tensor:
        slots = events.new_zeros(self.shape[0] * self.shape[1], *events.shape[1:])
        return slots.index_copy(0, self.slot, events).view(*self.shape, *events.shape[1:])

    def events(self, slots: Tensor) -> Tensor:
        return slots.flatten(0, 1).index_select(0, self.slot)


def padded_dual(tensors: Tensors, batch: Batch) -> Call:
    """The scan as one masked product over rows padded to the longest, decays in fp32."""
    t, padded = leaves(tensors), Padded(batch)

    def outputs() -> Tensor:
        x = t["x"]
        delta = padded.pad(F.softplus(t["dt"].float() + t["dt_bias"])).transpose(1, 2)  # (B, H, L)
        total = (delta * t["A"][:, None]).cumsum(-1)
        decay = (total[..., None] - total[..., None, :]).clamp(max=0).exp().tril()
        product = (padded.pad(t["C"][:, 0]) @ padded.pad(t["B"][:, 0]).mT)[:, None]
        weights = (product * decay * delta[..., None, :]).to(x.dtype)
        y = padded.events((weights @ padded.pad(x).transpose(1, 2)).transpose(1, 2))
        return y + t["D"].to(x.dtype)[:, None] * x

    return Call(t, outputs)


def padded_steps(tensors: Tensors, batch: Batch) -> Call:
    """The selective scan one position of all padded rows at a time."""
    t, padded = leaves(tensors), Padded(batch)

    def outputs() -> Tensor:
        x = t["x"]
        delta = padded.pad(F.softplus(t["dt"].float() + t["dt_bias"]))  # (B, L, E)
        entering = delta * padded.pad(x)
        B, C = (padded.pad(t[n].float()) for n in ("B", "C"))  # (B, L, N)
        state = x.new_zeros(len(B), x.shape[1], B.shape[-1], dtype=torch.float32)
        y = []
        for i in range(B.shape[1]):
            state = (delta[:, i, :, None] * t["A"]).exp() * state + entering[:, i, :, None] * B[:, i, None]
            y.append((state * C[:, i, None]).sum(-1))
        return (padded.events(torch.stack(y, dim=1)) + t["D"] * x).to(x.dtype)

    return Call(t, outputs)


def fla_conv(tensors: Tensors, batch: Batch) -> Call:
    conv = fla("modules.causal_conv1d").causal_conv1d
    t, offsets = leaves(tensors), batch.layout.offsets
    flipped = offsets[-1] - offsets.flip(0)

    def one_way(x: Tensor, offsets: Tensor) -> Tensor:
        return conv(x[None], t["weight"], t["bias"], activation="silu", cu_seqlens=offsets)[0][0]

    return Call(t, lambda: one_way(t["x"].flip(0), flipped).flip(0) if batch.both else one_way(t["x"], offsets))


def padded_conv(tensors: Tensors, batch: Batch) -> Call:
    t, padded = leaves(tensors), Padded(batch)
    channels, taps = t["weight"].shape

    def outputs() -> Tensor:
        rows = padded.pad(t["x"]).mT
        weight = (t["weight"].flip(1) if batch.both else t["weight"]).to(rows.dtype)
        y = F.conv1d(rows, weight[:, None], t["bias"].to(rows.dtype), padding=taps - 1, groups=channels)
        y = y[..., taps - 1 :] if batch.both else y[..., : rows.shape[-1]]
        return padded.events(F.silu(y).mT)

    return Call(t, outputs)


def mamba_norm(tensors: Tensors, batch: Batch) -> Call:
    norm = mamba_ssm("layernorm_gated").rmsnorm_fn
    t = leaves(tensors)
    return Call(t, lambda: norm(t["y"], t["weight"], None, z=t["z"], eps=1e-5, norm_before_gate=False))


def torch_norm(tensors: Tensors, batch: Batch) -> Call:
    t = leaves(tensors)
    width = t["weight"].shape
    return Call(t, lambda: F.rms_norm(t["y"] * F.silu(t["z"]), width, t["weight"].to(t["y"].dtype), 1e-5))


def softmax(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Contender:
    """Of a function of queries, candidates and targets, its mean over the queries."""

    def contender(tensors: Tensors, batch: Batch) -> Call:
        t = leaves({name: tensors[name] for name in ("queries", "candidates")})
        return Call(t, lambda: loss(t["queries"], t["candidates"], tensors["target"]).mean())

    return contender


def fla_softmax(queries: Tensor, candidates: Tensor, target: Tensor) -> Tensor:
    module = fla("modules.fused_linear_cross_entropy")
    return module.fused_linear_cross_entropy_loss(queries, target, candidates)


def all_logits(queries: Tensor, candidates: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy((queries @ candidates.T).float(), target, reduction="none")
