"""A small next-item model and batches that any number of ranks can share."""

from typing import Any

import torch
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor

from ssd_torchrec.data.batch import Batch
from ssd_torchrec.distributed.process import World
from ssd_torchrec.distributed.shard import DenseOptimizerConfig, ShardingConfig, Trainable, shard
from ssd_torchrec.distributed.tables import global_shape, local_pieces
from ssd_torchrec.encoders.tim4rec import TiM4Rec, TiM4RecConfig
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.models.next_item import FullSoftmaxLoss, NextItemModel, TablesConfig

ITEMS, FIRST_ITEM, SEGMENTS, ACTIONS, WIDTH = 45, 3, 5, 5, 16
SEED = 11
Row = tuple[list[int], list[int], list[int]]  # item rows, timestamps in s, segments

SGD = DenseOptimizerConfig(optimizer="sgd", learning_rate=0.05)
ENCODER = TiM4RecConfig(width=WIDTH, layers=1, head_width=8, state=8, dropout=0.0, time_dropout=0.0, time_hidden=4)


def trainable(world: World, sharding: ShardingConfig, dense: DenseOptimizerConfig = SGD, **shape: Any) -> Trainable:
    return shard(model(world, **shape), sharding, dense, world, seed=SEED)


def model(
    world: World,
    *,
    items: int = ITEMS,
    context: bool = True,
    event_columns: bool = False,
    loss: nn.Module | None = None,
) -> NextItemModel:
    torch.manual_seed(SEED)
    tables = TablesConfig(
        num_item_rows=FIRST_ITEM + items,
        first_item=FIRST_ITEM,
        context={"segment": SEGMENTS} if context else {},
        event_columns={"action": ACTIONS} if event_columns else {},
    )
    return NextItemModel(tables, TiM4Rec(ENCODER), loss or FullSoftmaxLoss(world.size), table_device="meta")


def rows_of(step: int) -> list[Row]:
    """The five rows of a global batch, one of them empty."""
    generator = torch.Generator().manual_seed(step)
    rows = []
    for length in [4, 0, 7, 1, 5]:
        items = torch.randint(FIRST_ITEM, FIRST_ITEM + ITEMS, (length,), generator=generator).tolist()
        gaps = torch.randint(1, 10**6, (length,), generator=generator)
        segments = torch.randint(0, SEGMENTS, (2,), generator=generator).tolist()
        rows.append((items, (10**9 + gaps.cumsum(0)).tolist(), segments))
    return rows


def batch(
    step: int, world: World, *, equal_rows: bool = False, candidates: bool = True, event_columns: bool = False
) -> Batch:
    """This rank's share of global batch `step`: every event is to predict the item 7 further on.

    Ranks bring unequally many rows unless `equal_rows` fills them up with empty ones. `candidates`: list the catalogue.
    `event_columns`: bring an action, which the item decides.
    """
    rows = rows_of(step)
    if equal_rows:
        rows += [([], [], [])] * (-len(rows) % world.size)
    mine = rows[world.rank :: world.size]
    items = [torch.tensor(r[0], dtype=torch.int64) for r in mine]
    values = {
        "item": items,
        "timestamp": [torch.tensor(r[1], dtype=torch.int64) for r in mine],
        "candidate": [torch.arange(FIRST_ITEM, FIRST_ITEM + ITEMS * candidates), *[items[0][:0]] * (len(mine) - 1)],
        "segment": [torch.tensor(r[2], dtype=torch.int64) for r in mine],
    }
    if event_columns:
        values["action"] = [of_row % ACTIONS for of_row in items]
    features = KeyedJaggedTensor.from_lengths_sync(
        keys=list(values),
        values=torch.cat([v for rows in values.values() for v in rows]),
        lengths=torch.tensor([len(v) for rows in values.values() for v in rows]),
    )
    target = (torch.cat(items) - FIRST_ITEM + 7) % ITEMS
    layout = JaggedLayout.from_lengths([len(i) for i in items])
    return Batch(features, layout, target, global_targets=sum(len(r[0]) for r in rows))


def train(t: Trainable, world: World, steps: range, **options: bool) -> list[float]:
    """Plain steps without a pipeline; the mean loss in nats over the global batch of each."""
    losses = []
    for step in steps:
        mine = batch(step, world, **options)
        t.optimizer.zero_grad()
        loss, local = t.model(mine)
        loss.backward()
        t.optimizer.step()
        losses.append(over_ranks(local)[0].item() / mine.global_targets)
    return losses


def over_ranks(value: Tensor) -> Tensor:
    value = value.clone()
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)
    return value


def whole_weights(t: Trainable) -> dict[str, Tensor]:
    """Every weight in one piece, on every rank."""
    weights = {}
    for name, value in t.model.state_dict().items():
        whole = torch.zeros(global_shape(value))
        for piece, offsets in local_pieces(value):
            whole[tuple(slice(o, o + n) for o, n in zip(offsets, piece.shape, strict=True))] = piece
        weights[name] = over_ranks(whole) if hasattr(value, "local_shards") else whole
    return weights
