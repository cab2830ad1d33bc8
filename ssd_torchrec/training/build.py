"""From a config and a data set to a model that can be trained."""

import torch

from ssd_torchrec.data.schema import DatasetMeta
from ssd_torchrec.distributed.merged_step import is_row_wise
from ssd_torchrec.distributed.process import World
from ssd_torchrec.distributed.shard import Trainable, Workload, shard
from ssd_torchrec.distributed.tables import seed_of
from ssd_torchrec.distributed.vocab_parallel import VocabParallelSoftmaxLoss
from ssd_torchrec.errors import ConfigError
from ssd_torchrec.models.next_item import (
    ITEM_WEIGHT,
    BinaryCrossEntropyLoss,
    FullSoftmaxLoss,
    NextItemModel,
    SampledSoftmaxLoss,
    TablesConfig,
)
from ssd_torchrec.training.config import RunConfig

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16}
IN_PLACE_ABOVE = 100_000  # items; fewer are quicker looked up
LOSSES = {"softmax": FullSoftmaxLoss, "bce": BinaryCrossEntropyLoss, "sampled_softmax": SampledSoftmaxLoss}


def build(config: RunConfig, meta: DatasetMeta, world: World) -> Trainable:
    """Make the model of a run, its tables split over the ranks as the config says. Collective.

    The first weights depend on the seed alone, not on the world.

    Raises:
        ConfigError: the config does not fit the device, the number of processes or the tables.
    """
    if config.training.precision == "bf16" and world.device.type != "cuda":
        raise ConfigError("training.precision bf16 is for CUDA, this run is on the CPU; take fp32")
    tables = TablesConfig(num_item_rows=meta.num_table_rows, first_item=meta.first_item, context=meta.context)
    torch.manual_seed(seed_of("weights", config.training.seed))
    model = NextItemModel(
        tables,
        config.encoder.build(),
        LOSSES[config.objective.loss](world.size),
        table_device="meta",  # `shard` allocates and fills them; real ones would draw from the generator meanwhile
        autocast_dtype=AUTOCAST[config.training.precision],
    )
    trainable = shard(
        model, config.sharding, config.dense, world, seed=config.training.seed, workload=_workload(config, meta, world)
    )
    if scores_in_place(config, trainable, meta.num_items):
        model.loss = VocabParallelSoftmaxLoss(world.size)
        model.loss.bind(trainable, ITEM_WEIGHT, meta.first_item)
    return trainable


def scores_in_place(config: RunConfig, trainable: Trainable, num_items: int) -> bool:
    """Whether the softmax scores the catalogue where it lies, so that batches need not list it."""
    if config.objective.loss != "softmax" or config.objective.scored == "looked_up":
        return False
    if config.objective.scored == "in_place":
        return True
    return num_items > IN_PLACE_ABOVE and is_row_wise(trainable, ITEM_WEIGHT)


def _workload(config: RunConfig, meta: DatasetMeta, world: World) -> Workload:
    mean_length = max(meta.num_events / max(meta.num_users, 1), 1.0)
    rows = max(1, round(config.data.tokens_per_batch / mean_length / world.size))
    candidates = _candidates(config, meta, world)
    return Workload(rows_per_rank=rows, ids_per_row={"item": mean_length, "candidate": candidates / rows})


def _candidates(config: RunConfig, meta: DatasetMeta, world: World) -> float:
    """How many candidates a rank's batch lists, about and at most."""
    if config.objective.scored == "in_place":
        return 0
    if config.objective.loss != "sampled_softmax":
        return meta.num_items
    targets = config.data.tokens_per_batch
    in_batch = config.objective.negatives == "in_batch"
    return min(meta.num_items, targets if in_batch else config.objective.num_negatives + targets / world.size)
