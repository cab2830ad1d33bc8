"""Which process this is, the group it belongs to, and what all of them must know before the next step.

torchrun tells each process its place through environment variables; `__main__` alone reads them and hands them to
`launched`. On CPU the group speaks gloo; on CUDA it speaks NCCL for device tensors and gloo for host objects.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ssd_torchrec.distributed.heap import keep_freed_memory
from ssd_torchrec.errors import ConfigError, DivergedError, LostRankError, SSDTorchRecError

T = TypeVar("T")

BACKEND = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


@dataclass(frozen=True, kw_only=True)
class World:
    """One process's place among all of a run."""

    rank: int = 0
    """This process, 0 to size - 1; rank 0 writes logs and results."""

    size: int = 1
    """Processes of the run, over all machines."""

    local_rank: int = 0
    """This process among those of its machine; picks the GPU."""

    local_size: int = 1
    """Processes on this machine; they share its memory."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where this process computes."""

    meeting_point: str | None = None
    """"host:port" where the processes find each other; None for one process that needs no group."""


def launched(environment: Mapping[str, str], device: Literal["auto", "cpu", "cuda"] = "auto") -> World:
    """Read this process's place from what torchrun set; a process that torchrun did not start is alone.

    Args:
        environment: usually `os.environ`.
        device: "auto" takes CUDA where there is a GPU.

    Raises:
        ConfigError: variables are missing, or this machine has fewer GPUs than processes.
    """
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if "WORLD_SIZE" not in environment:
        return World(device=_device(kind, 0, 1))
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in names if name not in environment]:
        raise ConfigError(f"WORLD_SIZE is set but {', '.join(missing)} not; start with torchrun, which sets them all")
    rank, size, local_rank, local_size = (int(environment[name]) for name in names[:4])
    return World(
        rank=rank,
        size=size,
        local_rank=local_rank,
        local_size=local_size,
        device=_device(kind, local_rank, local_size),
        meeting_point=f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}",
    )


def _device(kind: str, local_rank: int, local_size: int) -> torch.device:
    if kind == "cpu":
        return torch.device("cpu")
    if (gpus := torch.cuda.device_count()) < local_size:
        raise ConfigError(
            f"each process needs a GPU of its own, got {local_size} processes and {gpus} GPUs on this machine; "
            "start fewer processes per machine or compute on the CPU"
        )
    return torch.device("cuda", local_rank)


@contextmanager
def process_group(world: World, timeout_s: float = 600.0, answer_s: float = 30.0) -> Iterator[None]:
    """Join the run's process group for the length of the block; a process that is alone needs none.

    Also readies the process: its GPU, or on the CPU its allocator.

    Args:
        timeout_s: how long a collective waits for the other ranks before it raises.
        answer_s: how long, once it has raised, the ranks wait for each other's sign of life.

    Raises:
        LostRankError: a collective of the block gave up waiting, or lost a connection; rank 0 names those who do not
            answer. NCCL's watchdog ends the process instead where one of its own collectives hangs.
    """
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    else:
        keep_freed_memory()
    if world.meeting_point is None:
        yield
        return
    dist.init_process_group(
        BACKEND[world.device.type],
        init_method=f"tcp://{world.meeting_point}",
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(seconds=timeout_s),
    )
    roll = dist.new_group(backend="gloo") if world.size > 1 else None
    try:
        yield
    except RuntimeError as error:
        if roll is None or not _gave_up(error):
            raise
        raise LostRankError(f"{_call_the_roll(roll, answer_s)}: {error}") from error
    finally:
        dist.destroy_process_group()


def _gave_up(error: RuntimeError) -> bool:
    """Whether a collective ended without the others."""
    if isinstance(error, SSDTorchRecError):
        return False
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def _call_the_roll(roll: Any, answer_s: float) -> str:
    """Who is still there, in a sentence."""
    try:
        dist.monitored_barrier(roll, timeout=timedelta(seconds=answer_s), wait_all_ranks=True)
    except RuntimeError as silence:
        words = str(silence).partition("\n")[0].rstrip(".")
        return f"every rank must answer within {answer_s:g} s, but {words}; look at that rank's log and machine"
    return "a collective did not end although every rank answers; start again from the last checkpoint"


def ranks_where(condition: bool | Tensor, device: torch.device | str = "cpu") -> list[int]:
    """Which ranks say yes: the same answer on every rank. Collective, and waits for the device.

    Args:
        condition: () bool, this rank's answer; a tensor may lie on `device`.
        device: where the group's collectives run.
    """
    if not dist.is_initialized():
        return [0] if bool(condition) else []
    answers = torch.zeros(dist.get_world_size(), dtype=torch.int32, device=device)
    answers[dist.get_rank()] = condition
    dist.all_reduce(answers)
    return answers.nonzero().flatten().tolist()


def agree_finite(loss: Tensor) -> None:
    """Stop all ranks at the same step when any rank's loss is not finite; to be called before backward.

    Fused optimizers step inside backward: afterwards it is too late to keep the tables clean. Collective, and waits for
    the device.

    Args:
        loss: this rank's loss, any shape.

    Raises:
        DivergedError: on every rank, naming the ranks whose loss is not finite.
    """
    loss = loss.detach()
    if ranks := ranks_where(~loss.isfinite().all(), loss.device):
        raise DivergedError(
            f"the loss must be finite on every rank, it is not on rank {', '.join(map(str, ranks))} "
            f"(here: {loss.sum().item()}); resume from the last checkpoint with a lower learning rate or with clipping"
        )


def from_all_ranks(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """What every rank passed, in order of rank, on every rank; `value` must pickle. Collective."""
    if not dist.is_initialized():
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


@contextmanager
def all_or_none(what: str, kind: type[SSDTorchRecError], group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """If the block fails on one rank, raise on every rank, so that none waits for it. Collective at its end.

    The block must not hold collectives. A rank whose own error is of class `kind` raises that error.

    Args:
        what: the action, as the subject of the message.
        kind: what the other ranks raise.
        group: of all ranks; None for the default one.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    told = str(error) if isinstance(error, kind) else f"{type(error).__name__}: {error}"
    messages = from_all_ranks(told if error is not None else None, group)
    if isinstance(error, kind):
        raise error
    failed = [(rank, message) for rank, message in enumerate(messages) if message is not None]
    if failed:
        raise kind(f"{what} failed on rank {failed[0][0]}: {failed[0][1]}") from error
