"""From a config and a data set to a model that can be trained."""

import torch

from ssd_torchrec.data.schema import DatasetMeta
from ssd_torchrec.distributed.process import World
from ssd_torchrec.distributed.shard import Trainable, Workload, shard
from ssd_torchrec.distributed.tables import seed_of
from ssd_torchrec.errors import ConfigError
from ssd_torchrec.models.next_item import BinaryCrossEntropyLoss, FullSoftmaxLoss, NextItemModel, TablesConfig
from ssd_torchrec.training.config import RunConfig

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16}
LOSSES = {"softmax": FullSoftmaxLoss, "bce": BinaryCrossEntropyLoss}


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
    return shard(
        model, config.sharding, config.dense, world, seed=config.training.seed, workload=_workload(config, meta, world)
    )


def _workload(config: RunConfig, meta: DatasetMeta, world: World) -> Workload:
    mean_length = max(meta.num_events / max(meta.num_users, 1), 1.0)
    rows = max(1, round(config.data.tokens_per_batch / mean_length / world.size))
    return Workload(rows_per_rank=rows, ids_per_row={"item": mean_length, "candidate": meta.num_items / rows})
