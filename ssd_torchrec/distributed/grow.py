"""Give the tables of a checkpoint more rows, in one process.

The state of the tables' optimizer starts at zero in a new row, as it does in every row; nothing else changes.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ssd_torchrec.data.scratch import scratch_folder
from ssd_torchrec.distributed import checkpoint_files as files
from ssd_torchrec.distributed.checkpoint import CheckpointInfo, TrainState, signature_of
from ssd_torchrec.distributed.reshard import publish, table_of
from ssd_torchrec.distributed.unshard import intact_info, layout_of, writing
from ssd_torchrec.distributed.whole_file import Entry, WholeFile
from ssd_torchrec.errors import CheckpointError


def grow_tables(
    checkpoint: Path,
    folder: Path,
    rows: Mapping[str, int],
    state: TrainState,
    *,
    fill: Callable[[str, Tensor, Tensor], None],
) -> CheckpointInfo:
    """Make a checkpoint of larger tables out of another one, for as many ranks.

    Args:
        checkpoint: of any world size and split; its files are checked against their sums first.
        folder: the new checkpoint; written beside and renamed when it is whole. The disk must hold the tensors twice
            until then.
        rows: by name of each table how many it is to have, no fewer than it has.
        state: what the new checkpoint is besides tensors.
        fill: called with the name of a table, its (R, D) old rows and its (new, D) rows, zero yet, to be filled.

    Returns:
        What the new checkpoint says of itself.

    Raises:
        CheckpointError: the checkpoint is damaged, of a newer format, or has other tables or larger ones; `folder` is
            there, or cannot be written. No folder is left then.
    """
    if folder.exists():
        raise CheckpointError(f"{folder} must not be there yet, it is; give another name")
    info = intact_info(checkpoint)
    old = layout_of(checkpoint, info)
    _check(checkpoint, old, rows)
    new = {name: _grown(name, entry, rows) for name, entry in old.items()}
    signatures = {name: signature_of(new[f"model.{name}"].dtype, new[f"model.{name}"].shape) for name in info.tensors}
    with writing(folder), scratch_folder(folder, "grow") as scratch:
        whole = WholeFile.create(scratch / "whole", new, {})
        known = {name: whole.rows(name, 0, e.shape[0]) if e.shape else whole.tensor(name) for name, e in old.items()}
        files.read_tensors(checkpoint, known, info.files)
        for name, rows_before in known.items():
            table = table_of(name)
            if table is not None and name.startswith("model."):
                more = new[name].shape[0] - len(rows_before)
                fill(table, rows_before, whole.rows(name, len(rows_before), more))
        return publish(whole, replace(info, state=state, tensors=signatures), folder, scratch / "new", info.world_size)


def _check(checkpoint: Path, layout: Mapping[str, Entry], rows: Mapping[str, int]) -> None:
    had = {
        table: entry.shape[0] for name, entry in layout.items() if (table := table_of(name)) is not None and entry.shape
    }
    if had.keys() != rows.keys():
        raise CheckpointError(
            f"{checkpoint} must have the tables {sorted(rows)}, got {sorted(had)}; they come from the items, "
            "the context features and the event columns of the data set"
        )
    for table, count in had.items():
        if rows[table] < count:
            raise CheckpointError(
                f"{checkpoint} must have at most {rows[table]} rows in table {table} to grow, got {count}; "
                "give a data set that extends the one it was trained on"
            )


def _grown(name: str, entry: Entry, rows: Mapping[str, int]) -> Entry:
    table = table_of(name)
    if table is None or not entry.shape:
        return entry
    return Entry(dtype=entry.dtype, shape=(rows[table], *entry.shape[1:]))
