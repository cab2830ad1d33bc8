"""Which items a batch lists as candidates, and whether the softmax needs none: one answer for training and planning."""

from ssd_torchrec.data.objective import ObjectiveConfig
from ssd_torchrec.distributed.plan import ShardingConfig
from ssd_torchrec.errors import ConfigError
from ssd_torchrec.models.next_item import ITEM_TABLE

IN_PLACE_ABOVE = 100_000
"""Items from which on a softmax scores a row_wise table in place by itself; fewer are quicker looked up."""


def scores_in_place(objective: ObjectiveConfig, sharding: ShardingConfig, num_items: int) -> bool:
    """Whether the softmax scores the catalogue where it lies, so that batches need not list it.

    Args:
        sharding: resolved.

    Raises:
        ConfigError: it is to, and the item table is not split row_wise by a fused kernel.
    """
    if objective.loss != "softmax" or objective.scored == "looked_up":
        return False
    split = sharding.by_table.get(ITEM_TABLE)
    possible = split == "row_wise" and sharding.compute_kernel == "fused"
    if objective.scored == "in_place" and not possible:
        raise ConfigError(
            "a table that is scored in place must be split row_wise with compute_kernel fused, got "
            f"{f'{split} with {sharding.compute_kernel}' if split else 'a whole one'}; set sharding.by_table, start "
            "several processes, or take looked_up"
        )
    return possible and (objective.scored == "in_place" or num_items > IN_PLACE_ABOVE)


def num_candidates(objective: ObjectiveConfig, num_items: int, targets: int, targets_per_rank: int) -> int:
    """Items that a rank's batch lists at most, where none is scored in place.

    Args:
        targets: of the global batch.
        targets_per_rank: of this rank's part of it.
    """
    if objective.loss == "bce":
        return min(num_items, 2 * targets_per_rank)
    if objective.loss == "sampled_softmax":
        in_batch = objective.negatives == "in_batch"
        return min(num_items, targets if in_batch else objective.num_negatives + targets_per_rank)
    return num_items
