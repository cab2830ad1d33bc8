"""Weights of a published program as a run of ours, to evaluate, to recommend with, or to train on.

Their rows of the item table stand in an order of their own, so the raw item id of each row must come beside them.
"""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ssd_torchrec.data.parquet import open_dataset
from ssd_torchrec.data.rows import Ints
from ssd_torchrec.data.vocabulary import Vocabulary
from ssd_torchrec.distributed.checkpoint import TrainState, save_checkpoint
from ssd_torchrec.distributed.process import World
from ssd_torchrec.encoders.published import PUBLISHED_NAMES, load_published
from ssd_torchrec.errors import CheckpointError, ConfigError, DataError
from ssd_torchrec.models.next_item import NextItemModel
from ssd_torchrec.training.build import build
from ssd_torchrec.training.config import RunConfig
from ssd_torchrec.training.loop import Position
from ssd_torchrec.training.run_folder import as_json, claim


def import_weights(file: Path, items: Path, config: RunConfig) -> Path:
    """Make the run `config.output`/`config.name` of a published state dict; its best checkpoint holds the weights.

    Args:
        file: .safetensors, or what `torch.save` wrote of tensors: the state dict, alone or under "state_dict".
        items: text, a raw item id a line: the item of row 1 of the published table, of row 2, and so on.
        config: the encoder in the shape of the weights, the data set in which the ids are known.

    Returns:
        The run's folder. The mask row is the published row 0, out-of-vocabulary rows are the mean of all items, and
        context features and event columns count for nothing.

    Raises:
        ConfigError: the encoder has no published program, or the folder holds a run; before anything is written.
        CheckpointError: the file is no state dict of that program in that shape, or either file is not there.
        DataError: the ids are not those of the table, or not all items of the data set are among them.
    """
    encoder = config.encoder
    if encoder.title not in PUBLISHED_NAMES:
        raise ConfigError(f"the encoder must be one of {', '.join(PUBLISHED_NAMES)}, got {encoder.title}")
    for given in (file, items):
        if not given.is_file():
            got = "a folder" if given.is_dir() else "nothing of that name"
            raise CheckpointError(f"{given} must be a file, got {got}; give the path of one")
    state = _read(file)
    histories = open_dataset(Path(config.data.path))
    trainable = build(config, histories.meta, World())
    model = trainable.module
    assert isinstance(model, NextItemModel)
    table = load_published(model.tower.encoder, PUBLISHED_NAMES[encoder.title](encoder), state)
    rows = _rows(items, len(table), histories.vocabulary())
    with torch.no_grad():
        _fill(model, table, torch.from_numpy(rows), histories.meta.first_item)
    folder = Path(config.output) / config.name
    claim(folder, config, resume=False)
    kept = TrainState(
        step=0,
        vocabulary=histories.meta.item_vocabulary_hash,
        position=asdict(Position()),
        config=as_json(config),
    )
    save_checkpoint(folder / "checkpoints", trainable, kept, best=True)
    return folder


def _read(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{file} must hold tensors only, as .safetensors or from torch.save, got {error}; of a checkpoint with "
            'other objects, save its state dict alone: torch.save(checkpoint["state_dict"], file)'
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{file} must hold a state dict, names and tensors, got something else; save that alone")
    return state


def _rows(items: Path, num_rows: int, vocabulary: Vocabulary) -> Ints:
    """(V-1,) table row here of each published row but the first."""
    words = items.read_text().split("\n")
    words = words[:-1] if words[-1] == "" else words
    if len(words) != num_rows - 1:
        raise DataError(
            f"{items} must name the {num_rows - 1} items of the published table, a line each, got {len(words)} lines; "
            "leave out its row 0, which is padding"
        )
    try:
        rows = vocabulary.rows_of(pa.array(words).cast(vocabulary.ids.type))
    except pa.ArrowInvalid as error:
        raise DataError(f"{items} must hold {vocabulary.ids.type} ids as the data set does, got {error}") from error
    known = rows[rows >= vocabulary.first_item]
    if len(np.unique(known)) != len(vocabulary):
        raise DataError(
            f"{items} must name each of the {len(vocabulary)} items of the data set, got "
            f"{len(np.unique(known))} of them; prepare the data set from the log that the weights were trained on"
        )
    return rows


def _fill(model: NextItemModel, table: Tensor, rows: Tensor, first_item: int) -> None:
    (weight,) = model.items.parameters()
    known = rows >= first_item
    weight[0] = table[0]
    weight[1:first_item] = table[1:].mean(0)
    weight[rows[known]] = table[1:][known]
    if model.tower.context_proj is not None:
        model.tower.context_proj.weight.zero_()
