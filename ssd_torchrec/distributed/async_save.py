"""Save a checkpoint while training goes on: steps wait for a copy in memory, not for the disk.

A copy of this rank's tensors is made on the host, and a thread writes it as `save_checkpoint` would, with collectives
of its own. One save is under way at a time: the next one waits for it. What fails in the thread is raised on every rank
where training next meets the saver.
"""

from collections.abc import Mapping
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata
from torch.distributed._shard.sharded_tensor.shard import Shard
from torch.distributed.remote_device import _remote_device

from ssd_torchrec.distributed.checkpoint import (
    CheckpointInfo,
    TrainState,
    check_keep,
    describe,
    values_of,
    write_checkpoint,
)
from ssd_torchrec.distributed.shard import Trainable
from ssd_torchrec.distributed.state import Value


class AsyncSaver:
    """Checkpoints of one run, written in the background. Every method is collective.

    The host must hold this rank's weights and optimizer state once more while a save is under way.
    """

    def __init__(self, timeout_s: float = 600.0) -> None:
        """Make a gloo group for the threads of all ranks.

        Args:
            timeout_s: what a rank may take to write its part.
        """
        self._group: Any = None
        if dist.is_initialized():
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def save(self, folder: Path, trainable: Trainable, state: TrainState, *, keep: int = 2, best: bool = False) -> None:
        """Begin to write a checkpoint of the model as it is now; waits for the one before.

        Args:
            as of `save_checkpoint`.

        Raises:
            CheckpointError: on every rank, when the save before failed; the checkpoints before that are as they were.
        """
        check_keep(keep)
        self.wait()
        values = on_host(values_of(trainable))
        self._thread = Thread(
            target=self._write, args=(folder, values, describe(trainable, state), keep, best), daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Until the checkpoint under way is there.

        Raises:
            CheckpointError: on every rank, when a rank could not write it.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, folder: Path, values: Mapping[str, Value], info: CheckpointInfo, keep: int, best: bool) -> None:
        try:
            write_checkpoint(folder, dict(values), info, keep=keep, best=best, group=self._group)
        except BaseException as error:  # to be raised where somebody waits
            self._error = error


def on_host(values: Mapping[str, Value]) -> dict[str, Value]:
    """Copies of whole and sharded tensors in memory of their own."""
    return {name: _sharded_copy(v) if isinstance(v, ShardedTensor) else _copy(v) for name, v in values.items()}


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _sharded_copy(value: ShardedTensor) -> ShardedTensor:
    metadata: ShardedTensorMetadata = deepcopy(value.metadata())
    metadata.shards_metadata = [_placed_on_host(shard) for shard in metadata.shards_metadata]
    local = [Shard(_copy(shard.tensor), _placed_on_host(shard.metadata)) for shard in value.local_shards()]
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        local, metadata, process_group=value._process_group, init_rrefs=False
    )


def _placed_on_host(shard: ShardMetadata) -> ShardMetadata:
    assert shard.placement is not None
    place = _remote_device(f"rank:{shard.placement.rank()}/cpu")
    return ShardMetadata(list(shard.shard_offsets), list(shard.shard_sizes), place)
