"""A checkpoint that follows its data set: rows for the items and values that came since it was trained.

A new item starts as what it has been so far: its row is a copy of the out-of-vocabulary row that its id was read as. So
does a new value of an event column, as a copy of the row of unknown ones. A new context value starts at zero: users did
without it. So the grown model encodes every history as the old one did, to
the last bit, and scores the old items alike.
"""

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from ssd_torchrec.data.parquet import open_dataset
from ssd_torchrec.data.schema import UNKNOWN
from ssd_torchrec.distributed.checkpoint import CheckpointInfo, TrainState, read_info
from ssd_torchrec.distributed.grow import grow_tables
from ssd_torchrec.errors import CheckpointError
from ssd_torchrec.models.next_item import ITEM_TABLE, ITEM_WEIGHT
from ssd_torchrec.training.loop import Position


def grow(checkpoint: Path, folder: Path, data: Path) -> CheckpointInfo:
    """Make a checkpoint for a data set that extends the one of another, for a new run to begin with.

    Args:
        checkpoint: of any world size and split; the new one is for as many ranks.
        folder: the new checkpoint; written beside and renamed when it is whole.
        data: data set from `ssd-torchrec prepare --extends`; from here on the one of the checkpoint.

    Returns:
        What the new checkpoint says of itself: optimizer state as it was, no step made yet.

    Raises:
        CheckpointError: the data set's items do not begin with the checkpoint's, or it has other context features; the
            checkpoint is damaged, or of a newer format; `folder` is there, or cannot be written, and no folder is left.
        ConfigError: the data set lacks an event column that the checkpoint's model is told.
        DataError: there is no data set, or it is damaged.
    """
    info = read_info(checkpoint)
    if ITEM_WEIGHT not in info.tensors:
        raise CheckpointError(f"{checkpoint} must be of a next-item model, it has no {ITEM_WEIGHT}; give another one")
    histories = open_dataset(data).with_event_columns(info.state.config["data"].get("event_columns", ()))
    vocabulary, meta = histories.vocabulary(), histories.meta
    known = info.tensors[ITEM_WEIGHT][1] - vocabulary.first_item
    if not 0 < known <= len(vocabulary) or vocabulary.hash_of_first(known) != info.state.vocabulary:
        raise CheckpointError(
            f"{checkpoint} must be of a vocabulary that {data} extends, it is not: its {info.tensors[ITEM_WEIGHT][1]} "
            f"table rows are other items; prepare the data set with --extends, from the one that it was trained on"
        )
    buckets = torch.from_numpy(vocabulary.buckets_of(vocabulary.ids[known:]))

    def fill(table: str, old: Tensor, new: Tensor) -> None:
        if table == ITEM_TABLE:
            torch.index_select(old, 0, buckets, out=new)
        elif table in meta.event_columns:
            new.copy_(old[UNKNOWN].expand_as(new))

    config = {**info.state.config, "data": {**info.state.config["data"], "path": str(data)}}
    state = TrainState(step=0, vocabulary=vocabulary.content_hash, position=asdict(Position()), config=config)
    rows = {ITEM_TABLE: meta.num_table_rows, **meta.context, **meta.event_columns}
    return grow_tables(checkpoint, folder, rows, state, fill=fill)
