"""The embedding tables of a model: where they are, what is theirs here, and their first values.

A table starts from values that depend on the seed, its name and the row alone. Every world size and every sharding
therefore starts from the same table, and no process ever holds more than its shard and one block of rows.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig

from ssd_torchrec.distributed.id_maps import allocate_maps

BLOCK_ROWS = 16384  # drawn at once; part of what a seed means, so it stays as it is

TableConfig = EmbeddingConfig | EmbeddingBagConfig


def tables_of(model: nn.Module) -> dict[str, TableConfig]:
    """Every embedding table of an unsharded model, by the name of its weight in `model.state_dict()`."""
    tables: dict[str, TableConfig] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, EmbeddingCollection):
            tables |= {f"{prefix}embeddings.{c.name}.weight": c for c in module.embedding_configs()}
        elif isinstance(module, EmbeddingBagCollection):
            tables |= {f"{prefix}embedding_bags.{c.name}.weight": c for c in module.embedding_bag_configs()}
    return tables


def allocate_tables(model: nn.Module, device: torch.device) -> None:
    """Give the tables of an unsharded model that lie on "meta" memory on `device`, to be filled by `init_table`; and
    new id maps to those whose ids are managed."""
    for module in model.modules():
        if isinstance(module, EmbeddingCollection | EmbeddingBagCollection) and any(
            p.is_meta for p in module.parameters()
        ):
            module.to_empty(device=device)
    allocate_maps(model, device)


def local_pieces(value: Tensor | ShardedTensor) -> list[tuple[Tensor, list[int]]]:
    """What this process holds of a whole or sharded (R, ...) tensor: live pieces, each with its offset in the whole."""
    if isinstance(value, ShardedTensor):
        return [(shard.tensor.detach(), list(shard.metadata.shard_offsets)) for shard in value.local_shards()]
    return [(value.detach(), [0] * value.ndim)]


def global_shape(value: Tensor | ShardedTensor) -> tuple[int, ...]:
    """Shape of a whole or sharded tensor over all ranks."""
    return tuple(value.metadata().size if isinstance(value, ShardedTensor) else value.shape)


def dtype_of(value: Tensor | ShardedTensor) -> torch.dtype:
    """Asking a ShardedTensor itself would warn."""
    return value.metadata().tensor_properties.dtype if isinstance(value, ShardedTensor) else value.dtype


@contextmanager
def first_values_left_to_us(tables: Mapping[str, TableConfig]) -> Iterator[None]:
    """Keep TorchRec from filling the shards that `init_table` fills next: it would draw from each rank's own state."""
    kept = {key: config.init_fn for key, config in tables.items()}
    for config in tables.values():
        config.init_fn = _leave
    try:
        yield
    finally:
        for key, config in tables.items():
            config.init_fn = kept[key]


def _leave(weight: Tensor) -> Tensor:
    return weight


@torch.no_grad()
def init_table(weight: Tensor | ShardedTensor, config: TableConfig, seed: int) -> None:
    """Fill what this process holds of a (R, D) table with the first values that `config.init_fn` draws.

    Deterministic: row r, column d get the same value whatever the sharding, the world and the device. The state of
    PyTorch's generators is left as it was.
    """
    for piece, (first_row, first_column) in local_pieces(weight):
        last_row = first_row + len(piece)
        for block in range(first_row // BLOCK_ROWS, -(-last_row // BLOCK_ROWS)):
            begin = max(first_row, block * BLOCK_ROWS)
            end = min(last_row, (block + 1) * BLOCK_ROWS)
            rows = _block(config, block, seed)[begin - block * BLOCK_ROWS : end - block * BLOCK_ROWS]
            piece[begin - first_row : end - first_row].copy_(rows[:, first_column : first_column + piece.shape[1]])


def _block(config: TableConfig, block: int, seed: int) -> Tensor:
    """(rows, D) first values of one block of rows, drawn on the host."""
    rows = min(BLOCK_ROWS, config.num_embeddings - block * BLOCK_ROWS)
    values = torch.empty(rows, config.embedding_dim)
    assert config.init_fn is not None  # TorchRec's configs always carry one
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed_of(seed, config.name, block))
    try:
        config.init_fn(values)
    finally:
        torch.default_generator.set_state(state)
    return values


def seed_of(*parts: object) -> int:
    """A 63-bit seed that depends on all of `parts` and is the same in every process and Python."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
