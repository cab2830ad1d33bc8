"""The id maps of tables whose ids are managed: which tables those are, and what a map needs besides being copied.

A map says which id has which row, so it is cut as its table is. Cut in another way it would be another one: ids lie
with the rank that their bits name, and that depends on how many ranks there are. Only as a whole does it fit anything.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchrec.modules.mc_embedding_modules import (
    ManagedCollisionEmbeddingBagCollection,
    ManagedCollisionEmbeddingCollection,
)
from torchrec.modules.mc_modules import ManagedCollisionCollection, MCHManagedCollisionModule

from ssd_torchrec.errors import CheckpointError, ConfigError
from ssd_torchrec.models.managed_ids import ManagedRows, event_tables

RANGES = "._output_segments_tensor"
"""How the names of the buffers end that say at which rows a map is cut, (1025,) and -1 behind the last."""


def managed_tables(model: nn.Module) -> frozenset[str]:
    """Names of the tables of an unsharded model whose ids are managed.

    Raises:
        ConfigError: pooled tables are, or `managed_ids` did not make the maps.
    """
    names: set[str] = set()
    for path, module in model.named_modules():
        if isinstance(module, ManagedCollisionEmbeddingBagCollection):
            raise ConfigError(
                f"ids can be managed for event tables, got {path}, a {type(module).__name__}; take an "
                "EmbeddingBagCollection, or a history"
            )
        if isinstance(module, ManagedCollisionEmbeddingCollection):
            for name, rows in module._managed_collision_collection._managed_collision_modules.items():
                if not isinstance(rows, ManagedRows):
                    raise ConfigError(
                        f"the id map of a table must be made by managed_ids, got a {type(rows).__name__} for {name}, "
                        "which may leave ids out and keep them all on one rank; give managed_ids the "
                        "EmbeddingCollection"
                    )
            names.update(table.name for table in event_tables(module))
    return frozenset(names)


def allocate_maps(model: nn.Module, device: torch.device) -> None:
    """Give an unsharded model new maps on `device`; moved ones would count into what they left behind."""
    for module in model.modules():
        if isinstance(module, ManagedCollisionCollection):
            maps = module._managed_collision_modules
            for name, rows in list(maps.items()):
                assert isinstance(rows, ManagedRows)  # managed_tables refuses the rest
                size = rows.output_size()
                maps[name] = rows.rebuild_with_output_id_range((0, size), [0, size], device).train(rows.training)


def check_ranges(path: object, saved: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> None:
    """Refuse id maps that do not fit how the model is cut.

    Args:
        path: of the checkpoint, for the message.
        saved: by name, the checkpoint's (1025,) ranges.
        now: the model's.

    Raises:
        CheckpointError: they were cut in another way, and the model's are not whole.
    """
    for name, ranges in now.items():
        cut, wanted = _cuts(saved[name]), _cuts(ranges)
        if cut != wanted and len(wanted) > 2:
            raise CheckpointError(
                f"{path} must have been saved by ranks that cut managed ids at the rows {wanted[1:-1]}, got "
                f"{cut[1:-1] or 'whole ones'} for {name.removesuffix(RANGES)}: an id would be looked for on another "
                "rank than has it; take as many ranks as saved it, or one process"
            )


def maps_were_loaded(model: nn.Module) -> None:
    """Tell the maps of a model, split or not, that they were written: put them in order, drop ids not yet counted in.

    Rows that were for ids without one on the ranks that saved them are free again in a whole map.
    """
    for rows in model.modules():
        if isinstance(rows, MCHManagedCollisionModule):
            rows._sort_mch_buffers()
            free = rows._mch_sorted_raw_ids[:-1] == torch.iinfo(torch.int64).max
            for score in rows._mch_metadata.values():
                score[:-1][free] = 0
            rows._current_iter = -1  # read anew from the buffer
            rows._current_history_buffer_offset = 0
            rows.reset_inference_mode()


def _cuts(ranges: Tensor) -> list[int]:
    return [row for row in ranges.tolist() if row >= 0]
