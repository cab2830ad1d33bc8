"""The training loop: steps, validations, checkpoints, and an end that all ranks agree on.

What a step does depends on (seed, step, rank) and the weights alone: batches are formed from (seed, epoch), dropout is
seeded anew each step, the learning rate is a function of the step. So a position (epoch, batches completed), weights
and optimizer state are all there is to resume. Batches count when they are completed, not when they are drawn: the
pipeline and the reader are always some batches ahead.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ssd_torchrec.data.batch import Batch
from ssd_torchrec.distributed.tables import seed_of
from ssd_torchrec.errors import Interrupted
from ssd_torchrec.training.config import TrainingConfig
from ssd_torchrec.training.interrupt import StopRequest
from ssd_torchrec.training.metrics import SELECTION_METRIC
from ssd_torchrec.training.schedule import learning_rate_factor


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far a run is, in all that is not weights or optimizer state."""

    epoch: int = 0
    """Epochs completed."""

    batches: int = 0
    """Global batches completed in the current epoch."""

    step: int = 0
    """Optimizer steps since the beginning."""

    best_epoch: int = 0
    """Epochs completed when validation was best; 0 before the first validation."""

    best_score: float = -1.0
    """What selects the best weights, then: validation NDCG@10, or the AUC of a ranking model."""

    since_best: int = 0
    """Validations since then."""


class Pipeline(Protocol):
    """What the loop needs of TorchRec's train pipelines."""

    def progress(self, dataloader_iter: Iterator[Batch]) -> Tensor: ...


class Observer(Protocol):
    """Where progress is told; on other ranks than 0 it does nothing."""

    def step(self, position: Position, loss_nats: float, learning_rate: float, targets_per_s: float) -> None: ...

    def validated(self, position: Position, figures: dict[str, float]) -> None: ...


@dataclass(frozen=True, eq=False)
class Steps:
    """The parts of a run that the loop drives; each callable is collective over the ranks.

    # pipeline       ()                        a pipeline over the model for one epoch; after it the model is as before
    # batches        (epoch, first)            this rank's share of an epoch's global batches from number `first` on
    # set_rate       (factor)                  learning rates to this factor of their peaks
    # validate       ()                        validation figures
    # save           (position, best)          write a checkpoint, and mark it as the best
    # reduce_sum     (tensor)                  sum over ranks

    `selection` names the validation figure that the best weights have the most of.
    """

    pipeline: Callable[[], AbstractContextManager[Pipeline]]
    batches: Callable[[int, int], Iterator[Batch]]
    set_rate: Callable[[float], None]
    validate: Callable[[], dict[str, float]]
    save: Callable[[Position, bool], Any]
    reduce_sum: Callable[[Tensor], Tensor]
    selection: str = SELECTION_METRIC


class TrainingLoop:
    """Drives `steps` through all epochs.

    Args:
        config: epochs, schedule, how often to validate and save.
        learning_rate: peak rate of the dense part, to tell the observer.
        total_steps: steps of the whole run, for the schedule.
        rank: of this process; with the seed and the step it decides dropout.
    """

    def __init__(
        self,
        config: TrainingConfig,
        steps: Steps,
        observer: Observer,
        *,
        learning_rate: float,
        total_steps: int,
        rank: int,
    ) -> None:
        self.config = config
        self.steps = steps
        self.observer = observer
        self.learning_rate = learning_rate
        self.total_steps = total_steps
        self.rank = rank
        self._seconds = 0.0
        self._targets = 0.0

    @property
    def targets_per_s(self) -> float:
        """Targets trained a second, over all ranks, what lies between epochs not counted; 0 before the first."""
        return self._targets / self._seconds if self._seconds else 0.0

    def run(self, position: Position) -> Position:
        """Train from `position` to the end, or to where patience ends.

        Raises:
            Interrupted: SIGTERM came; a checkpoint of the agreed step is written.
            DivergedError: the loss of some rank is not finite; raised on all ranks, before any table has stepped.
        """
        with StopRequest(self.steps.reduce_sum) as stop:
            while position.epoch < self.config.epochs and not self._out_of_patience(position):
                position = self._validated(self._epoch(position, stop))
        return position

    def _epoch(self, position: Position, stop: StopRequest) -> Position:
        batches = self.steps.batches(position.epoch, position.batches)
        window = _Window(self.steps.reduce_sum)
        started = time.perf_counter()
        with self.steps.pipeline() as pipeline:
            while True:
                factor = self._prepare(position.step)
                try:
                    local = pipeline.progress(batches)
                except StopIteration:
                    break
                position = replace(position, batches=position.batches + 1, step=position.step + 1)
                window.add(local)
                if position.step % self.config.log_every == 0:
                    loss_nats, targets, targets_per_s = window.close()
                    self._targets += targets
                    self.observer.step(position, loss_nats, factor * self.learning_rate, targets_per_s)
                self._maybe_save(position, stop)
        self._targets += window.close()[1]
        self._seconds += time.perf_counter() - started
        return replace(position, epoch=position.epoch + 1, batches=0)

    def _prepare(self, step: int) -> float:
        """Set the rates and the dropout of this step; returns the factor of the rates."""
        factor = learning_rate_factor(step, self.total_steps, self.config.warmup_steps, self.config.decay)
        self.steps.set_rate(factor)
        torch.manual_seed(seed_of("dropout", self.config.seed, step, self.rank))
        return factor

    def _maybe_save(self, position: Position, stop: StopRequest) -> None:
        if stop.agreed(position.step):
            self.steps.save(position, False)
            raise Interrupted(
                f"asked to stop at step {position.step}, saved; run again under the same --name to go on from there"
            )
        if self.config.checkpoint_every and position.step % self.config.checkpoint_every == 0:
            self.steps.save(position, False)

    def _validated(self, position: Position) -> Position:
        if position.epoch % self.config.evaluate_every and position.epoch < self.config.epochs:
            return position
        figures = self.steps.validate()
        score = figures[self.steps.selection]
        best = score > position.best_score
        if best:
            position = replace(position, best_epoch=position.epoch, best_score=score, since_best=0)
        else:
            position = replace(position, since_best=position.since_best + 1)
        self.observer.validated(position, figures)
        self.steps.save(position, best)
        return position

    def _out_of_patience(self, position: Position) -> bool:
        return bool(self.config.patience) and position.since_best >= self.config.patience


class _Window:
    """Loss and speed since the last line of the log; the sums stay on the device until it is closed."""

    def __init__(self, reduce_sum: Callable[[Tensor], Tensor]) -> None:
        self._reduce_sum = reduce_sum
        self._open()

    def _open(self) -> None:
        self._local: Tensor | None = None
        self._since = time.perf_counter()

    def add(self, local: Tensor) -> None:
        self._local = local.double() if self._local is None else self._local + local

    def close(self) -> tuple[float, float, float]:
        """Mean loss in nats, targets, targets a second, over all ranks; starts anew."""
        local = torch.zeros(2, dtype=torch.float64) if self._local is None else self._local
        total, targets = self._reduce_sum(local).tolist()
        seconds = time.perf_counter() - self._since
        self._open()
        return total / max(targets, 1.0), targets, targets / seconds
