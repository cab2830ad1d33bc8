"""A whole run of a ranking model: impressions in, result.json out."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torchrec.datasets.utils import Batch
from torchrec.models.dlrm import DLRM, DLRM_DCN, DLRM_Projection

from ssd_torchrec.data.batches import Share
from ssd_torchrec.data.distribution import gaps_of
from ssd_torchrec.data.ranking.batches import RankingBatches
from ssd_torchrec.data.ranking.clicks import ClicksConfig, generate_clicks
from ssd_torchrec.data.ranking.folder import RankingPart
from ssd_torchrec.data.ranking.schema import META_FILE, PARTS, Part, RankingMeta, times_of
from ssd_torchrec.distributed.checkpoint import installed_versions, load_weights
from ssd_torchrec.distributed.process import World, all_or_none
from ssd_torchrec.distributed.shard import Trainable, Workload, shard
from ssd_torchrec.distributed.tables import seed_of
from ssd_torchrec.encoders.encoder import EncoderConfig
from ssd_torchrec.encoders.registry import name_of
from ssd_torchrec.errors import ConfigError, DataError
from ssd_torchrec.models.ranking import RankingModel, tables_for, with_histories
from ssd_torchrec.training.build import AUTOCAST
from ssd_torchrec.training.job import Job, checkpoint_at, leave, start_of, trained_with
from ssd_torchrec.training.loop import Position
from ssd_torchrec.training.provenance import git_commit, peak_memory_gib
from ssd_torchrec.training.ranking_config import RankingModelConfig, RankingRunConfig
from ssd_torchrec.training.ranking_metrics import SELECTION, assess
from ssd_torchrec.training.report import print_results

DEFAULT_DATA = "data/clicks"  # below the output folder
EVALUATED: tuple[Part, Part] = ("valid", "test")


def train_ranking(config: RankingRunConfig, world: World) -> dict[str, Any]:
    """Train as `config` says, evaluate the best weights, and leave all of it in runs/NAME/. Collective.

    Returns:
        The content of result.json: AUC, normalised entropy and calibration by part, with logits corrected for negatives
        that were left out of training.

    Raises:
        ConfigError, DataError: what is asked for contradicts itself or the data; before anything is trained.
        CheckpointError: the run's checkpoint is of another model, vocabulary or optimizer, or damaged.
        DivergedError: the loss is not finite; the message names the last good checkpoint.
        Interrupted: SIGTERM came; the run is saved.
    """
    data = _data_folder(config, world)
    folder = Path(config.output) / config.name
    if config.model.history == "encoder" and config.encoder.reads_time:
        start = start_of(config.training, folder)
        gaps = start and trained_with(RankingRunConfig, start).encoder.gaps
        gaps = gaps or _gap_statistics(RankingPart(data, "train"))
        config = replace(config, encoder=config.encoder.with_gaps(*gaps))
    run = RankingRun(config, folder, data, world)
    position, rows_per_s = run.run("training")
    result = run.result(position, rows_per_s)
    if world.rank == 0:
        leave(folder, result)
    return result


def evaluate_ranking(path: Path, data_path: str, world: World) -> dict[str, Any]:
    """Judge a checkpoint on the validation and test parts, and print the table. Collective.

    Args:
        path: a checkpoint or a run.
        data_path: the data set; empty for the one of the run. Its ids must be the checkpoint's.

    Returns:
        "model", "data", and figures by part, as in result.json.

    Raises:
        CheckpointError: there is none, it is of no ranking model, of another data set's ids, or damaged.
    """
    checkpoint = checkpoint_at(path)
    config = trained_with(RankingRunConfig, checkpoint)
    training = replace(config.training, async_save=False)
    if world.device.type == "cpu":
        training = replace(training, precision="fp32")
    config = replace(config, training=training, data=replace(config.data, path=data_path or config.data.path))
    run = RankingRun(config, path, _data_folder(config, world), world)
    load_weights(checkpoint, run.trainable, vocabulary=run.vocabulary)
    result = {"model": _model_name(config), "data": run.meta.name, **run.figures()}
    if world.rank == 0:
        print_results(result)
    return result


class RankingRun(Job):
    """One training of one ranking model."""

    selection = SELECTION
    config: RankingRunConfig

    def __init__(self, config: RankingRunConfig, folder: Path, data: Path, world: World) -> None:
        share = Share(rank=world.rank, world_size=world.size)
        self.parts = {part: RankingPart(data, part) for part in PARTS}
        self.meta = self.parts["train"].meta
        rows = config.data.rows_per_batch
        self.of_part = {
            part: RankingBatches(opened, rows, share, config.training.seed) for part, opened in self.parts.items()
        }
        total_steps = config.training.epochs * self.of_part["train"].count()
        super().__init__(
            config, folder, build_ranking(config, self.meta, world), _identity(self.meta), total_steps, world
        )

    def batches(self, epoch: int, first: int) -> Iterator[Batch]:
        return self.of_part["train"].epoch(epoch, first)

    def validate(self) -> dict[str, float]:
        return self._assess("valid")

    def announcement(self) -> str:
        meta, counts = self.meta, self.meta.num_rows
        lines = [
            f"data    {meta.name}: {counts['train']:,} impressions to train on, {counts['valid']:,} to validate, "
            f"{counts['test']:,} to test",
            f"        {self.of_part['train'].count()} batches of {self.config.data.rows_per_batch} an epoch",
        ]
        for table, place in (self.trainable.plan or {"all": "whole, in this process"}).items():
            lines.append(f"table   {table}: {place}, {self.trainable.sharding.optimizer}")
        return "\n".join(lines)

    def result(self, position: Position, rows_per_s: float) -> dict[str, Any]:
        """What result.json says."""
        return {
            "model": _model_name(self.config),
            "data": self.meta.name,
            "seed": self.config.training.seed,
            "epochs": position.epoch,
            "best_epoch": position.best_epoch,
            "world_size": self.world.size,
            "device": self.world.device.type,
            "selection": self.selection,
            **self.figures(),
            "train_rows_per_s": rows_per_s,
            "epoch_s": self.meta.num_rows["train"] / max(rows_per_s, 1e-9),
            "peak_memory_gib": peak_memory_gib(self.world.device),
            "sharding": self.trainable.plan,
            "table_optimizer": self.trainable.sharding.optimizer,
            "versions": installed_versions(),
            "git_commit": git_commit(),
        }

    def figures(self) -> dict[str, dict[str, float]]:
        """Of the validation and the test part."""
        return {part: self._assess(part) for part in EVALUATED}

    def _assess(self, part: Part) -> dict[str, float]:
        module = self.trainable.module
        assert isinstance(module, RankingModel)
        rows = self.config.data.rows_per_batch
        return assess(
            module.dlrm,
            self.of_part[part].in_order(),
            rows_per_rank=rows // self.world.size,
            num_rows=self.meta.num_rows[part],
            shift=log(self.meta.negative_share),
            world=self.world,
        )


def build_ranking(config: RankingRunConfig, meta: RankingMeta, world: World) -> Trainable:
    """Make the model of a run, its tables split over the ranks as the config says. Collective.

    Raises:
        ConfigError: the config does not fit the device, the number of processes or the tables.
    """
    if config.training.precision == "bf16" and world.device.type != "cuda":
        raise ConfigError("training.precision bf16 is for CUDA, this run is on the CPU; take fp32")
    torch.manual_seed(seed_of("weights", config.training.seed))
    model = ranking_model(config.model, config.encoder, meta, AUTOCAST[config.training.precision])
    workload = ranking_workload(meta, config.data.rows_per_batch // world.size)
    return shard(model, config.sharding, config.dense, world, seed=config.training.seed, workload=workload)


def ranking_model(
    config: RankingModelConfig, encoder: EncoderConfig, meta: RankingMeta, autocast_dtype: torch.dtype | None = None
) -> RankingModel:
    """Make a model with tables on "meta", for `shard` to split.

    Args:
        encoder: reads histories; its width is the width of all tables.
        meta: of the data set.
        autocast_dtype: run the encoder in this dtype (bf16 on CUDA); None for full precision.

    Raises:
        ConfigError: the data set has no features for it, or names no target that it is to have.
    """
    use, target = config.history, config.target
    if target and not meta.targets:
        raise ConfigError(
            f"model.target is for data sets that name the item shown, got {meta.name} without targets; prepare or "
            "generate it again, or name one in ranking.json"
        )
    bags, items = tables_for(meta, encoder.width, use, target=target)
    if not bags.embedding_bag_configs() or not meta.dense:
        raise ConfigError(
            f"a DLRM must have dense and categorical features, got {meta.dense} and {sorted(meta.categorical)}; "
            "prepare the data set with some of each"
        )
    dlrm = _dlrm(config, encoder.width, len(meta.dense), bags)
    if use == "encoder":
        with_histories(dlrm, items, encoder.build(), meta, autocast_dtype, target=target)
    return RankingModel(dlrm)


def ranking_workload(meta: RankingMeta, rows_per_rank: int) -> Workload:
    """What a rank looks up in a step at most, which is what the planner is told."""
    return Workload(rows_per_rank=rows_per_rank, ids_per_row={name: float(n) for name, n in meta.longest.items()})


def _dlrm(model: RankingModelConfig, width: int, dense_features: int, bags: nn.Module) -> DLRM:
    shared: dict[str, Any] = {
        "embedding_bag_collection": bags,
        "dense_in_features": dense_features,
        "dense_arch_layer_sizes": [*model.dense_layers, width],
        "over_arch_layer_sizes": [*model.over_layers, 1],
    }
    if model.interaction == "dcn":
        return DLRM_DCN(**shared, dcn_num_layers=model.cross_layers, dcn_low_rank_dim=model.cross_rank)
    if model.interaction == "projection":
        branch = [*model.branch_layers, model.branch_features * width]
        shared |= {"interaction_branch1_layer_sizes": branch, "interaction_branch2_layer_sizes": branch}
        return DLRM_Projection(**shared)
    return DLRM(**shared)


def _data_folder(config: RankingRunConfig, world: World) -> Path:
    """The run's data set; the generated default is made first if none is named."""
    if config.data.path:
        return Path(config.data.path)
    folder = Path(config.output) / DEFAULT_DATA
    with all_or_none(f"generating {folder}", DataError):
        if world.rank == 0 and not (folder / META_FILE).is_file():
            generate_clicks(ClicksConfig(), folder)
    return folder


def _gap_statistics(part: RankingPart) -> tuple[float, float]:
    """Mean and standard deviation of log1p(seconds between neighbours) over the histories of a part."""
    count, total, squares = 0, 0.0, 0.0
    for group in range(len(part.group_sizes)):
        rows = part.read(group)
        for name in part.meta.histories:
            times = rows.jagged[times_of(name)]
            logs = np.log1p(gaps_of(times.values, times.offsets).astype(np.float64))
            count, total, squares = count + len(logs), total + logs.sum(), squares + (logs**2).sum()
    variance = squares / count - (total / count) ** 2 if count else 0.0
    if variance <= 1e-12:
        raise DataError(
            f"histories must have different times between events for a time-aware encoder, got {count} gaps all alike; "
            'take time_mode="none", or an encoder that reads no times'
        )
    return total / count, float(np.sqrt(variance))


def _identity(meta: RankingMeta) -> str:
    """What the rows of all tables are."""
    content = [meta.vocabulary, meta.dense, meta.categorical, meta.histories]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _model_name(config: RankingRunConfig) -> str:
    history = name_of(config.encoder) if config.model.history == "encoder" else config.model.history
    return f"dlrm-{config.model.interaction}, history: {history}{' and target' if config.model.target else ''}"
