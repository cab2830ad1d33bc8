"""A whole run: data set in, result.json out; and the evaluation of a checkpoint."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ssd_torchrec.data.batch import Batch
from ssd_torchrec.data.split import Stage
from ssd_torchrec.data.statistics import log_gap_statistics, unknown_targets
from ssd_torchrec.distributed.checkpoint import installed_versions, load_weights
from ssd_torchrec.distributed.collectives import sum_over_ranks
from ssd_torchrec.distributed.process import World
from ssd_torchrec.distributed.scoring import scores_in_place
from ssd_torchrec.distributed.shard import Trainable
from ssd_torchrec.distributed.vocab_parallel import CatalogueShard
from ssd_torchrec.encoders.bi_tim4rec import BiTiM4RecConfig
from ssd_torchrec.encoders.registry import name_of
from ssd_torchrec.encoders.tim4rec import TiM4RecConfig
from ssd_torchrec.models.next_item import ITEM_WEIGHT, NextItemModel
from ssd_torchrec.training.build import build
from ssd_torchrec.training.config import EvaluationConfig, RunConfig
from ssd_torchrec.training.evaluate import evaluate
from ssd_torchrec.training.histories import Histories
from ssd_torchrec.training.job import Job, checkpoint_at, leave, start_of, trained_with
from ssd_torchrec.training.loop import Position
from ssd_torchrec.training.provenance import git_commit, peak_memory_gib
from ssd_torchrec.training.report import print_results

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
        gaps = start and trained_with(RunConfig, start).encoder.gaps  # what its weights know
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
        leave(folder, result)
    return result


class Run(Job):
    """One training of one next-item model, and what is left when it ends."""

    config: RunConfig

    def __init__(self, config: RunConfig, folder: Path, data: Histories, world: World) -> None:
        self.data = data
        self.training = data.training(config, world)
        total_steps = sum(self.training.count(epoch) for epoch in range(config.training.epochs))
        meta = data.histories.meta
        super().__init__(config, folder, build(config, meta, world), meta.item_vocabulary_hash, total_steps, world)

    def train(self, description: str) -> dict[str, Any]:
        """Train to the end, go back to the best weights and evaluate them; what result.json says of this one model."""
        position, targets_per_s = self.run(description)
        return self._result(position, targets_per_s)

    def announcement(self) -> str:
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

    def batches(self, epoch: int, first: int) -> Iterator[Batch]:
        return self.training.epoch(epoch, first, with_candidates=not self._in_place)

    def validate(self) -> dict[str, float]:
        return self._assess("valid")[0]

    @property
    def _in_place(self) -> bool:
        return scores_in_place(self.config.objective, self.trainable.sharding, self.data.histories.meta.num_items)

    def _assess(self, stage: Stage) -> tuple[dict[str, float], dict[str, float]]:
        return assess(self.trainable, self.data, stage, self.config, self.config.evaluation, self.world)

    def _result(self, position: Position, targets_per_s: float) -> dict[str, Any]:
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
            "train_events_per_s": targets_per_s,
            "epoch_s": self.training_targets / max(targets_per_s, 1e-9),
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


def config_of(checkpoint: Path, data_path: str, world: World) -> RunConfig:
    """What a checkpoint was trained with, to be used here: on a CPU in fp32, tables split or whole as they come.

    Args:
        data_path: another data set; empty for the one it was trained on.

    Raises:
        CheckpointError: it is of no next-item model.
    """
    config = trained_with(RunConfig, checkpoint)
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
