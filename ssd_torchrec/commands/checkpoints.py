"""`ssd-torchrec unshard`, `reshard` and `grow`: checkpoints made of others."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from ssd_torchrec.distributed.reshard import reshard
from ssd_torchrec.distributed.unshard import unshard
from ssd_torchrec.models.next_item import ITEM_WEIGHT
from ssd_torchrec.training.grow import grow
from ssd_torchrec.training.job import checkpoint_at


def unshard_command(words: list[str], about: str) -> int:
    """All of a checkpoint into one file."""

    @dataclass(frozen=True, kw_only=True)
    class Unshard:
        checkpoint: tyro.conf.Positional[str]
        """A checkpoint folder, or a run folder for its best one."""

        file: tyro.conf.Positional[str]
        """The file to write, such as whole.safetensors."""

        replace: bool = False
        """Put it in the place of a file that is there, once it is whole."""

    asked = tyro.cli(
        Unshard,
        args=words,
        prog="ssd-torchrec unshard",
        description=f"{about} Weights, state of the optimizers, and what the run was; `reshard` "
        "makes a checkpoint of it again, and refuses a file that lacks any of it.",
    )
    info = unshard(checkpoint_at(Path(asked.checkpoint)), Path(asked.file), replace=asked.replace)
    print(f"{asked.file}: step {info.state.step}, {_optimizers(info)}")
    return 0


def reshard_command(words: list[str], about: str) -> int:
    """A checkpoint for another number of ranks."""

    @dataclass(frozen=True, kw_only=True)
    class Reshard:
        source: tyro.conf.Positional[str]
        """A checkpoint folder, a run folder for its best one, or a file that `unshard` wrote."""

        folder: tyro.conf.Positional[str]
        """Folder of the new checkpoint, to train on (--training.resume) or to evaluate."""

        ranks: int = 1
        """Ranks that each get a file, with their rows of every table."""

    asked = tyro.cli(
        Reshard,
        args=words,
        prog="ssd-torchrec reshard",
        description=f"{about} Any number of ranks loads any checkpoint as it is: this saves them "
        "reading and memory, since a rank reads whole each piece that holds a row of its own. The optimizers and their "
        "state stay as they are.",
    )
    source = Path(asked.source)
    info = reshard(source if source.is_file() else checkpoint_at(source), Path(asked.folder), ranks=asked.ranks)
    print(f"{asked.folder}: step {info.state.step}, world size {info.world_size}, {_optimizers(info)}")
    return 0


def grow_command(words: list[str], about: str) -> int:
    """A checkpoint for a data set that has got more items."""

    @dataclass(frozen=True, kw_only=True)
    class Grow:
        checkpoint: tyro.conf.Positional[str]
        """A checkpoint folder, or a run folder for its best one."""

        folder: tyro.conf.Positional[str]
        """Folder of the new checkpoint, to train on (--training.resume) or to evaluate."""

        data: str
        """Data set that was prepared with --extends."""

    asked = tyro.cli(
        Grow,
        args=words,
        prog="ssd-torchrec grow",
        description=f"{about} A new item starts as the out-of-vocabulary row that its id was read as, "
        "so the grown model encodes every history as the old one did. Optimizer state stays, epochs count anew.",
    )
    info = grow(checkpoint_at(Path(asked.checkpoint)), Path(asked.folder), Path(asked.data))
    print(f"{asked.folder}: {info.tensors[ITEM_WEIGHT][1]:,} rows of items, {_optimizers(info)}")
    return 0


def _optimizers(info: Any) -> str:
    """What a checkpoint's optimizer state is of."""
    return f"tables with the state of {info.table_optimizer}, the rest with that of {info.dense_optimizer}"
