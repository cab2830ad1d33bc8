"""Write a checkpoint anew for another number of ranks, in one process.

Tables and the state of their optimizer are cut by rows as row_wise cuts them over R ranks, each rank's rows in a file
of its own; the rest evens the files out. Any number of ranks loads any checkpoint as it is; but whoever loads reads the
whole of every piece that holds a row of its own, so that R ranks read the one piece that a single rank saved R times.

Names, shapes, values and optimizers stay: nothing of the optimizers' state is lost or started anew.
"""

import os
import re
from dataclasses import asdict, replace
from pathlib import Path

from torch import Tensor

from ssd_torchrec.data.scratch import scratch_folder
from ssd_torchrec.distributed import checkpoint_files as files
from ssd_torchrec.distributed.checkpoint import CheckpointInfo
from ssd_torchrec.distributed.unshard import gather, intact_info, layout_of, read_unsharded, writing
from ssd_torchrec.distributed.whole_file import WholeFile
from ssd_torchrec.errors import CheckpointError, ConfigError

_TABLE = re.compile(r"(?:.*\.)?(?:embeddings|embedding_bags)\.([^.]+)\.weight")  # as tables.tables_of names them


def reshard(source: Path, folder: Path, *, ranks: int = 1) -> CheckpointInfo:
    """Make a checkpoint for `ranks` ranks of another one, or of a file that `unshard` wrote.

    Args:
        source: folder of a checkpoint, or the file.
        folder: the new checkpoint; written beside and renamed when it is whole. Of a checkpoint, the disk must hold the
            tensors twice until then.
        ranks: how many are to load it; any other number may.

    Returns:
        What the new checkpoint says of itself: all that the old one did, but who holds what.

    Raises:
        ConfigError: `ranks` is less than 1.
        CheckpointError: the source is damaged, edited, of a newer format, or lacks a tensor; `folder` is there, or
            cannot be written. No folder is left then.
    """
    if ranks < 1:
        raise ConfigError(f"a checkpoint must be for at least 1 rank, got {ranks}; give --ranks")
    if folder.exists():
        raise CheckpointError(f"{folder} must not be there yet, it is; give another name")
    whole, info = read_unsharded(source) if source.is_file() else (None, intact_info(source))
    layout = whole.entries if whole else layout_of(source, info)
    with writing(folder), scratch_folder(folder, "reshard") as scratch:
        whole = whole or gather(source, info, layout, scratch / "whole", {})
        return publish(whole, info, folder, scratch / "new", ranks)


def publish(whole: WholeFile, info: CheckpointInfo, folder: Path, beside: Path, ranks: int) -> CheckpointInfo:
    """Write tensors as a checkpoint for `ranks` ranks, first `beside` and then in its place.

    Returns:
        `info`, but for who holds what.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    beside.mkdir()
    files.write_pieces(beside, _pieces(whole, ranks), lambda piece: _read(whole, piece))
    info = replace(
        info,
        world_size=ranks,
        plan=_plan(whole, ranks),
        files={name: files.digest(beside / name) for name in files.files_of(beside)},
    )
    files.write_json_with_sum(beside / files.INFO_FILE, asdict(info))
    files.sync(beside)
    os.rename(beside, folder)
    files.sync(folder.parent)
    return info


def _pieces(whole: WholeFile, ranks: int) -> list[list[files.Piece]]:
    """What each rank writes: its rows of every table, and of the rest the largest first, each to whom has least."""
    pieces: list[list[files.Piece]] = [[] for _ in range(ranks)]
    rest = []
    for name, entry in whole.entries.items():
        if table_of(name) is None or not entry.shape:
            rows = entry.shape[0] if entry.shape else 1
            rest.append(files.Piece(name=name, dtype=entry.dtype, shape=entry.shape, first_row=0, rows=rows))
            continue
        block = -(-entry.shape[0] // ranks)
        for rank in range(ranks):
            first = rank * block
            if rows := max(0, min(block, entry.shape[0] - first)):
                piece = files.Piece(name=name, dtype=entry.dtype, shape=entry.shape, first_row=first, rows=rows)
                pieces[rank].append(piece)
    sizes = [sum(piece.bytes for piece in of) for of in pieces]
    for piece in sorted(rest, key=lambda piece: (-piece.bytes, piece.name)):
        lightest = sizes.index(min(sizes))
        pieces[lightest].append(piece)
        sizes[lightest] += piece.bytes
    return pieces


def _read(whole: WholeFile, piece: files.Piece) -> Tensor:
    return whole.rows(piece.name, piece.first_row, piece.rows) if piece.shape else whole.tensor(piece.name)


def _plan(whole: WholeFile, ranks: int) -> dict[str, str]:
    """Who holds what, as `describe_plan` says it; empty for whole tables."""
    names = sorted({table for name in whole.entries if (table := table_of(name)) is not None})
    holders = ", ".join(map(str, range(ranks)))
    return {} if ranks == 1 else {name: f"row_wise on rank {holders}" for name in names}


def table_of(name: str) -> str | None:
    """The table that a tensor is part of, itself or as the state of its optimizer; None for the dense rest."""
    part, _, path = name.partition(".")
    path = path.rpartition(".")[0] if part == "tables" else path
    match = _TABLE.fullmatch(path) if part in ("model", "tables") else None
    return match[1] if match else None
