"""A training of any model from its data to its best weights: one folder, checkpoints, and an end whatever happens.

runs/NAME/config.json  metrics.jsonl  checkpoints/step-00001200/  checkpoints/best
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ssd_torchrec.distributed.async_save import AsyncSaver
from ssd_torchrec.distributed.checkpoint import (
    BEST,
    TrainState,
    latest_checkpoint,
    load_checkpoint,
    load_weights,
    read_info,
    save_checkpoint,
)
from ssd_torchrec.distributed.checkpoint_files import INFO_FILE
from ssd_torchrec.distributed.collectives import sum_over_ranks
from ssd_torchrec.distributed.pipeline import pipelined
from ssd_torchrec.distributed.process import World, all_or_none
from ssd_torchrec.distributed.shard import DenseOptimizerConfig, Trainable, set_learning_rate
from ssd_torchrec.errors import CheckpointError, ConfigError, DivergedError, Interrupted
from ssd_torchrec.training.config import TrainingConfig
from ssd_torchrec.training.loop import Position, Steps, TrainingLoop
from ssd_torchrec.training.metrics import SELECTION_METRIC
from ssd_torchrec.training.observer import RunObserver
from ssd_torchrec.training.report import print_results, write_report
from ssd_torchrec.training.run_folder import as_json, claim, from_json, write_json

C = TypeVar("C")
_TELLING = {"objective", "model"}  # of a next-item run's config, and of a ranking one's


class JobConfig(Protocol):
    """What every run's config has."""

    @property
    def training(self) -> TrainingConfig: ...

    @property
    def dense(self) -> DenseOptimizerConfig: ...


class Job(ABC):
    """One training of one model. Collective, all of it.

    Args:
        config: noted in the folder and in every checkpoint.
        folder: runs/NAME.
        trainable: the model; its forward returns the loss, and this rank's (2,) summed loss in nats and targets.
        vocabulary: hash of what the rows of its tables are.
        total_steps: of the whole run.
    """

    selection: str = SELECTION_METRIC
    """The validation figure that the best weights have the most of."""

    def __init__(
        self, config: JobConfig, folder: Path, trainable: Trainable, vocabulary: str, total_steps: int, world: World
    ) -> None:
        self.config = config
        self.folder = folder
        self.trainable = trainable
        self.vocabulary = vocabulary
        self.total_steps = total_steps
        self.world = world
        self.saver = AsyncSaver() if config.training.async_save else None

    @abstractmethod
    def batches(self, epoch: int, first: int) -> Iterator[Any]:
        """This rank's share of an epoch's global batches from number `first` on."""

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Validation figures."""

    @abstractmethod
    def announcement(self) -> str:
        """What is about to be trained on, and how, in a few lines."""

    @property
    def checkpoints(self) -> Path:
        """Where this run's checkpoints are."""
        return checkpoints_of(self.folder)

    def run(self, description: str) -> tuple[Position, float]:
        """Train to the end and go back to the best weights; where it ended, and targets trained a second.

        Raises:
            DivergedError: the loss is not finite; the message names the last good checkpoint.
            Interrupted: SIGTERM came; the run is saved.
        """
        position = self._begin()
        speaks = self.world.rank == 0
        if speaks:
            print(self.announcement())
        observer = RunObserver(
            self.folder, description, position, self.total_steps, speaks=speaks, selection=self.selection
        )
        loop = TrainingLoop(
            self.config.training,
            self._steps(),
            observer,
            learning_rate=self.config.dense.learning_rate,
            total_steps=self.total_steps,
            rank=self.world.rank,
        )
        with observer:
            try:
                position = loop.run(position)
            except DivergedError as error:
                self._wait()
                good = latest_checkpoint(self.checkpoints)
                raise DivergedError(f"{error}; last good checkpoint: {good or 'none yet'}") from error
            except Interrupted:
                self._wait()
                raise
            self._wait()
        load_weights(self.checkpoints / BEST, self.trainable, vocabulary=self.vocabulary)
        return position, loop.targets_per_s

    def _begin(self) -> Position:
        """Claim the folder, and load what the run is to go on from; where it begins."""
        training = self.config.training
        start = start_of(training, self.folder)
        position = Position()
        if start is not None:
            info = load_checkpoint(
                start, self.trainable, vocabulary=self.vocabulary, reset_optimizer=training.reset_optimizer
            )
            position = Position(**info.state.position)
            if start.parent.resolve() != self.checkpoints.resolve():  # another run's best weights are not this one's
                position = replace(position, best_epoch=0, best_score=-1.0, since_best=0)
        with all_or_none(f"claiming {self.folder}", ConfigError):
            if self.world.rank == 0:
                claim(self.folder, self.config, resume=training.resume == "auto")
        if start is not None and self.world.rank == 0:
            print(f"going on from {start}: epoch {position.epoch}, batch {position.batches}, step {position.step}")
        return position

    def _steps(self) -> Steps:
        def save_at(position: Position, best: bool) -> None:
            state = TrainState(
                step=position.step,
                vocabulary=self.vocabulary,
                position=asdict(position),
                config=as_json(self.config),
            )
            save = self.saver.save if self.saver else save_checkpoint
            keep = self.config.training.keep_checkpoints
            save(self.checkpoints, self.trainable, state, keep=keep, best=best)

        return Steps(
            pipeline=lambda: pipelined(self.trainable, self.world.device),
            batches=self.batches,
            set_rate=partial(set_learning_rate, self.trainable.optimizer),
            validate=self.validate,
            save=save_at,
            reduce_sum=partial(sum_over_ranks, world=self.world),
            selection=self.selection,
        )

    def _wait(self) -> None:
        """Until what is being saved is there."""
        if self.saver:
            self.saver.wait()


def checkpoints_of(folder: Path) -> Path:
    """Where the checkpoints of a run are."""
    return folder / "checkpoints"


def start_of(training: TrainingConfig, folder: Path) -> Path | None:
    """The checkpoint that a run is to go on from: its own latest, another, or none.

    Raises:
        CheckpointError: the other one is not there.
    """
    if training.resume in ("auto", "none"):
        return latest_checkpoint(checkpoints_of(folder)) if training.resume == "auto" else None
    return checkpoint_at(Path(training.resume))


def checkpoint_at(path: Path) -> Path:
    """A checkpoint from its own folder, or the best one of a run from the run's.

    Raises:
        CheckpointError: there is none.
    """
    for folder in (path, checkpoints_of(path) / BEST):
        if (folder / INFO_FILE).is_file():
            return folder
    raise CheckpointError(
        f"{path} must be a checkpoint or a run that has one; give runs/NAME or a folder in its checkpoints/"
    )


def is_of(kind: type, checkpoint: Path) -> bool:
    """Whether a checkpoint was trained with a config of this class, by the fields that only one class has."""
    return _TELLING.intersection(read_info(checkpoint).state.config) == _TELLING.intersection(_names(kind))


def trained_with(kind: type[C], checkpoint: Path) -> C:
    """The config of a checkpoint.

    Raises:
        CheckpointError: it is of another kind of model, or of another version.
    """
    if not is_of(kind, checkpoint):
        raise CheckpointError(
            f"{checkpoint} must be of a run that has a {kind.__name__}, got one with other fields: next-item and "
            "ranking models do not take each other's checkpoints; give a run of the same kind"
        )
    return from_json(kind, read_info(checkpoint).state.config)


def leave(folder: Path, result: dict[str, Any]) -> None:
    """Write result.json and report.html of a run, and print its figures."""
    write_json(folder / "result.json", result)
    write_report(folder)
    print_results(result)
    print(f"{folder}/ holds result.json, report.html and checkpoints/")


def _names(kind: Any) -> set[str]:
    return {field.name for field in fields(kind)}
