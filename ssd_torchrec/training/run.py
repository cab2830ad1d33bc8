"""A whole run: data set in, result.json out; and the evaluation of a checkpoint."""

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from ssd_torchrec.data.split import Stage
from ssd_torchrec.data.statistics import log_gap_statistics, unknown_targets
from ssd_torchrec.distributed.async_save import AsyncSaver
from ssd_torchrec.distributed.checkpoint import (
    BEST,
    TrainState,
    installed_versions,
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
from ssd_torchrec.distributed.scoring import scores_in_place
from ssd_torchrec.distributed.shard import Trainable, set_learning_rate
from ssd_torchrec.distributed.vocab_parallel import CatalogueShard
from ssd_torchrec.encoders.bi_tim4rec import BiTiM4RecConfig
from ssd_torchrec.encoders.registry import name_of
from ssd_torchrec.encoders.tim4rec import TiM4RecConfig
from ssd_torchrec.errors import CheckpointError, ConfigError, DivergedError, Interrupted
from ssd_torchrec.models.next_item import ITEM_WEIGHT, NextItemModel
from ssd_torchrec.training.build import build
from ssd_torchrec.training.config import EvaluationConfig, RunConfig, TrainingConfig
from ssd_torchrec.training.evaluate import evaluate
from ssd_torchrec.training.histories import Histories
from ssd_torchrec.training.loop import Position, Steps, TrainingLoop
from ssd_torchrec.training.observer import RunObserver
from ssd_torchrec.training.provenance import git_commit, peak_memory_gib
from ssd_torchrec.training.report import print_results, write_report
from ssd_torchrec.training.run_folder import as_json, claim, from_json, write_json

STAGES: tuple[Stage, Stage] = ("valid", "test")
WITHOUT_TIME = "without-time"  # folder of the second training, in the run's


def train(config: RunConfig, world: World) -> dict[str, Any]:
    """Train as `config` says, evaluate the best weights, and leave all of it in runs/NAME/. Collective.

    Returns:
        The content of result.json.

    Raises:
        ConfigError, DataError: what is asked for contradicts itself or the data; before anything is trained.
        CheckpointError: the run's checkpoint is of another model, vocabulary or optimizer, or damaged.
        DivergedError: the loss is not finite; the message names the last good checkpoint.
        Interrupted: SIGTERM came; the run is saved.
    """
    data = Histories.open(config, world)
    folder = Path(config.output) / config.name
    if config.encoder.reads_time:
        start = start_of(config.training, folder)
        gaps = start and from_json(RunConfig, read_info(start).state.config).encoder.gaps  # what its weights know
        gaps = gaps or log_gap_statistics(data.histories, data.spans)
        config = replace(config, encoder=config.encoder.with_gaps(*gaps))
    result = Run(config, folder, data, world).train("with time" if config.also_without_time else "training")
    if config.also_without_time:
        assert isinstance(config.encoder, TiM4RecConfig | BiTiM4RecConfig)
        blind = replace(config, encoder=replace(config.encoder, time_mode="none"), also_without_time=False)
        other = Run(blind, folder / WITHOUT_TIME, data, world).train("without time")
        result["without_time"] = {stage: other[stage] for stage in STAGES}
        result["attainable_without_time"] = data.attainable(config.data, config.evaluation, timed=False)
    if world.rank == 0:
        write_json(folder / "result.json", result)
        write_report(folder)
        print_results(result)
        print(f"{folder}/ holds result.json, report.html and checkpoints/")
    return result


class Run:
    """One training of one model: what the loop drives, and what is left when it ends."""

    def __init__(self, config: RunConfig, folder: Path, data: Histories, world: World) -> None:
        self.config = config
        self.folder = folder
        self.data = data
        self.world = world
        self.trainable = build(config, data.histories.meta, world)
        self.training = data.training(config, world)
        self.total_steps = sum(self.training.count(epoch) for epoch in range(config.training.epochs))
        self.saver = AsyncSaver() if config.training.async_save else None

    def train(self, description: str) -> dict[str, Any]:
        """Train to the end, go back to the best weights and evaluate them; what result.json says of this one model."""
        position = self._begin()
        if self.world.rank == 0:
            print(self._announcement())
        observer = RunObserver(self.folder, description, position, self.total_steps, speaks=self.world.rank == 0)
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
        load_weights(self.checkpoints / BEST, self.trainable, vocabulary=self._vocabulary)
        return self._result(position, loop)

    def _announcement(self) -> str:
        """What is about to be trained on, and how, in a few lines."""
        meta, batches = self.data.histories.meta, self.training.count(0)
        lines = [
            f"data    {meta.name}: {meta.num_users:,} users, {meta.num_items:,} items, {meta.num_events:,} events",
            f"        {self.training_targets:,.0f} training targets an epoch, in about {batches} batches",
        ]
        unknown = unknown_targets(self.data.histories, self.data.spans)
        if any(unknown.values()):
            numbers = ", ".join(f"{count:,} of {stage}" for stage, count in unknown.items())
            lines.append(f"        not asked for, since their items are unknown: {numbers}")
        plan = self.trainable.plan or {"all": "whole, in this process"}
        for table, place in plan.items():
            lines.append(f"table   {table}: {place}, {self.trainable.sharding.optimizer}")
        return "\n".join(lines)

    @property
    def checkpoints(self) -> Path:
        """Where this run's checkpoints are."""
        return checkpoints_of(self.folder)

    @property
    def _vocabulary(self) -> str:
        return self.data.histories.meta.item_vocabulary_hash

    def _begin(self) -> Position:
        """Claim the folder, and load what the run is to go on from; where it begins."""
        start = start_of(self.config.training, self.folder)
        position = Position()
        if start is not None:
            info = load_checkpoint(
                start,
                self.trainable,
                vocabulary=self._vocabulary,
                reset_optimizer=self.config.training.reset_optimizer,
            )
            position = Position(**info.state.position)
            if start.parent.resolve() != self.checkpoints.resolve():  # another run's best weights are not this one's
                position = replace(position, best_epoch=0, best_score=-1.0, since_best=0)
        with all_or_none(f"claiming {self.folder}", ConfigError):
            if self.world.rank == 0:
                claim(self.folder, self.config, resume=self.config.training.resume == "auto")
        if start is not None and self.world.rank == 0:
            print(f"going on from {start}: epoch {position.epoch}, batch {position.batches}, step {position.step}")
        return position

    def _steps(self) -> Steps:
        def save_at(position: Position, best: bool) -> None:
            state = TrainState(
                step=position.step,
                vocabulary=self._vocabulary,
                position=asdict(position),
                config=as_json(self.config),
            )
            save = self.saver.save if self.saver else save_checkpoint
            keep = self.config.training.keep_checkpoints
            save(self.checkpoints, self.trainable, state, keep=keep, best=best)

        return Steps(
            pipeline=lambda: pipelined(self.trainable, self.world.device),
            batches=partial(self.training.epoch, with_candidates=not self._in_place),
            set_rate=partial(set_learning_rate, self.trainable.optimizer),
            validate=lambda: self._assess("valid")[0],
            save=save_at,
            reduce_sum=partial(sum_over_ranks, world=self.world),
        )

    def _wait(self) -> None:
        """Until what is being saved is there."""
        if self.saver:
            self.saver.wait()

    @property
    def _in_place(self) -> bool:
        return scores_in_place(self.config.objective, self.trainable.sharding, self.data.histories.meta.num_items)

    def _assess(self, stage: Stage) -> tuple[dict[str, float], dict[str, float]]:
        return assess(self.trainable, self.data, stage, self.config, self.config.evaluation, self.world)

    def _result(self, position: Position, loop: TrainingLoop) -> dict[str, Any]:
        figures, popular = {}, {}
        for stage in STAGES:
            figures[stage], popular[stage] = self._assess(stage)
        return {
            "model": name_of(self.config.encoder),
            "data": self.data.histories.meta.name,
            "seed": self.config.training.seed,
            "epochs": position.epoch,
            "best_epoch": position.best_epoch,
            "world_size": self.world.size,
            "device": self.world.device.type,
            **figures,
            "most_popular": popular,
            "attainable": self.data.attainable(self.config.data, self.config.evaluation),
            "train_events_per_s": loop.targets_per_s,
            "epoch_s": self.training_targets / max(loop.targets_per_s, 1e-9),
            "peak_memory_gib": peak_memory_gib(self.world.device),
            "sharding": self.trainable.plan,
            "table_optimizer": self.trainable.sharding.optimizer,
            "versions": installed_versions(),
            "git_commit": git_commit(),
        }

    @property
    def training_targets(self) -> float:
        """Targets of an epoch; those expected, where the objective draws them."""
        return self.config.objective.num_targets(self.data.spans.counts())


def assess(
    trainable: Trainable,
    data: Histories,
    stage: Stage,
    config: RunConfig,
    evaluation: EvaluationConfig,
    world: World,
) -> tuple[dict[str, float], dict[str, float]]:
    """Figures of a model and of the most-popular baseline on a stage's users. Collective."""
    module = trainable.module
    assert isinstance(module, NextItemModel)
    return evaluate(
        module,
        CatalogueShard.of(trainable, ITEM_WEIGHT, module.tables.first_item),
        (batch.to(world.device) for batch in data.asked(stage, config, evaluation, world)),
        data.counts,
        partial(sum_over_ranks, world=world),
        filter_seen=evaluation.filter_seen,
        candidates_per_chunk=evaluation.candidates_per_chunk,
    )


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


def config_of(checkpoint: Path, data_path: str, world: World) -> RunConfig:
    """What a checkpoint was trained with, to be used here: on a CPU in fp32, tables split or whole as they come.

    Args:
        data_path: another data set; empty for the one it was trained on.
    """
    config = from_json(RunConfig, read_info(checkpoint).state.config)
    config = replace(config, objective=replace(config.objective, scored="auto"))  # the way of a split table's loss
    if data_path:
        config = replace(config, data=replace(config.data, path=data_path))
    if world.device.type == "cpu":
        config = replace(config, training=replace(config.training, precision="fp32"))
    return config


def evaluate_checkpoint(path: Path, data_path: str, evaluation: EvaluationConfig, world: World) -> dict[str, Any]:
    """Rank the validation and test targets with a checkpoint, and print the table. Collective.

    Args:
        path: a checkpoint or a run.
        data_path: the data set; empty for the one of the run. Its vocabulary must be the checkpoint's.

    Returns:
        "model", "data", and figures by stage, as in result.json.
    """
    checkpoint = checkpoint_at(path)
    config = config_of(checkpoint, data_path, world)
    data = Histories.open(config, world)
    trainable = build(config, data.histories.meta, world)
    load_weights(checkpoint, trainable, vocabulary=data.histories.meta.item_vocabulary_hash)
    result: dict[str, Any] = {"model": name_of(config.encoder), "data": data.histories.meta.name, "most_popular": {}}
    for stage in STAGES:
        result[stage], result["most_popular"][stage] = assess(trainable, data, stage, config, evaluation, world)
    result["attainable"] = data.attainable(config.data, evaluation)
    if world.rank == 0:
        print_results(result)
    return result
