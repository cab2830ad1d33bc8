"""From a config and a data set to a model that can be trained."""

import torch

from ssd_torchrec.data.schema import DatasetMeta
from ssd_torchrec.distributed.plan import resolve
from ssd_torchrec.distributed.process import World
from ssd_torchrec.distributed.scoring import num_candidates, scores_in_place
from ssd_torchrec.distributed.shard import Trainable, Workload, shard
from ssd_torchrec.distributed.tables import seed_of, tables_of
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
LOSSES = {"softmax": FullSoftmaxLoss, "bce": BinaryCrossEntropyLoss, "sampled_softmax": SampledSoftmaxLoss}


def build(config: RunConfig, meta: DatasetMeta, world: World) -> Trainable:
    """Make the model of a run, its tables split over the ranks as the config says. Collective.

    The first weights depend on the seed alone, not on the world.

    Raises:
        ConfigError: the config does not fit the device, the number of processes, the tables or the data set.
    """
    if config.training.precision == "bf16" and world.device.type != "cuda":
        raise ConfigError("training.precision bf16 is for CUDA, this run is on the CPU; take fp32")
    meta = meta.with_event_columns(config.data.event_columns)
    tables = TablesConfig(
        num_item_rows=meta.num_table_rows,
        first_item=meta.first_item,
        context=meta.context,
        event_columns=meta.event_columns,
    )
    torch.manual_seed(seed_of("weights", config.training.seed))
    model = NextItemModel(
        tables,
        config.encoder.build(),
        LOSSES[config.objective.loss](world.size),
        table_device="meta",  # `shard` allocates and fills them; real ones would draw from the generator meanwhile
        autocast_dtype=AUTOCAST[config.training.precision],
    )
    resolved = resolve(config.sharding, tables_of(model), world.size, world.device, world.local_size)
    in_place = scores_in_place(config.objective, resolved, meta.num_items)
    workload = _workload(config, meta, world, in_place)
    trainable = shard(model, resolved, config.dense, world, seed=config.training.seed, workload=workload)
    if in_place:
        model.loss = VocabParallelSoftmaxLoss(world.size)
        model.loss.bind(trainable, ITEM_WEIGHT, meta.first_item)
    return trainable


def _workload(config: RunConfig, meta: DatasetMeta, world: World, in_place: bool) -> Workload:
    mean_length = max(meta.num_events / max(meta.num_users, 1), 1.0)
    rows = max(1, round(config.data.tokens_per_batch / mean_length / world.size))
    targets = config.data.tokens_per_batch
    listed = num_candidates(config.objective, meta.num_items, targets, -(-targets // world.size))
    candidates = 0 if in_place else listed
    of_events = dict.fromkeys(["item", *meta.event_columns], mean_length)
    return Workload(rows_per_rank=rows, ids_per_row=of_events | {"candidate": candidates / rows})
