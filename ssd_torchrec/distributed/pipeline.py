"""Training steps with the next batch's lookups already under way.

While a batch computes, TorchRec's pipeline copies the one after next to the device and sends the next one's ids to the
ranks that hold their rows. It traces the model to find the collections whose input comes straight from the batch; the
others are looked up without overlap and without an error, so `pipelined_collections` tells which they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist

from ssd_torchrec.distributed.process import agree_finite
from ssd_torchrec.distributed.shard import Trainable


class _AgreesFirst:
    """Before backward, in which fused tables step, all ranks learn whether every rank's loss is finite."""

    def _backward(self, losses: Tensor) -> None:
        agree_finite(losses)
        super()._backward(losses)  # type: ignore[misc]  # TorchRec's pipelines have it


class WholePipeline(_AgreesFirst, TrainPipelineBase):
    """For whole tables: copies the next batch to the device meanwhile."""


class SplitPipeline(_AgreesFirst, TrainPipelineSparseDist):
    """For split tables: also sends the next batch's ids around meanwhile.

    Between two steps `detach()` gives the model back to be called directly, say for an evaluation, and `attach()` goes
    on with the batches already drawn. Both are collective.
    """

    def attach(self, model: nn.Module | None = None, sparse_dist: bool = True) -> None:
        super().attach(model, sparse_dist)
        if self.contexts:  # TorchRec sends the next batch's ids anew, but would not wait for their number
            self.wait_sparse_data_dist(self.contexts[0])


@contextmanager
def pipelined(trainable: Trainable, device: torch.device) -> Iterator[WholePipeline | SplitPipeline]:
    """A pipeline over a model in training mode; after the block the model is called as before.

    Its `progress(batches)` takes one step (gradients to zero, forward, backward, optimizer) and returns the second
    thing that the model's forward returned. It raises StopIteration after the last batch, and DivergedError on every
    rank, with no weight changed by the step, when the loss of one rank is not finite. All ranks must bring equally many
    batches. It draws up to two batches more than it has completed.
    """
    kind = SplitPipeline if trainable.sharding.split else WholePipeline
    pipeline = kind(trainable.model, trainable.optimizer, device)
    try:
        yield pipeline
    finally:
        if isinstance(pipeline, SplitPipeline):
            pipeline.detach()


def pipelined_collections(pipeline: WholePipeline | SplitPipeline) -> dict[str, str]:
    """Which sharded collections have their lookups overlapped: path in the model and class; complete after one step."""
    modules: list[Any] = getattr(pipeline, "_pipelined_modules", [])
    return {module.forward.name: type(module).__name__ for module in modules}
