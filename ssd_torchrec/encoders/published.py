"""Weights of the published programs, into our encoders and back.

Their item table belongs to no encoder: it comes back apart, as row 0 (padding there, and SSD4Rec's mask) and the items
after it. Their convolutions have a middle dimension that ours have not, (C, 1, K) for (C, K); all else has one shape.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ssd_torchrec.encoders import mamba4rec, recmamba, ssd4rec, tim4rec
from ssd_torchrec.encoders.encoder import Encoder
from ssd_torchrec.errors import CheckpointError, ConfigError
from ssd_torchrec.modules.short_conv import ShortConv

PUBLISHED_NAMES: dict[str, Callable[[Any], dict[str, str]]] = {
    "TiM4Rec": tim4rec.published_names,
    "SSD4Rec": ssd4rec.published_names,
    "Mamba4Rec": mamba4rec.published_names,
    "RecMamba": recmamba.published_names,
}
"""By an encoder's title: from its config, the name of each parameter here to its name there."""

_NAMES_SHOWN = 3

ITEM_TABLES = {
    "TiM4Rec": "item_embedding.weight",
    "SSD4Rec": "item_embedding.weight",
    "Mamba4Rec": "item_embedding.weight",
    "RecMamba": "item_emb.weight",
}
"""By an encoder's title: what the item table is called there."""


def load_published(encoder: Encoder, names: Mapping[str, str], state: Mapping[str, Tensor]) -> Tensor:
    """Fill an encoder with the weights of a published program.

    Args:
        names: of each parameter of `encoder`, its name in `state`; see `PUBLISHED_NAMES`.
        state: all of the published state dict, and nothing else.

    Returns:
        (V, D) the item table, as it came: row 0 is no item.

    Raises:
        CheckpointError: names are missing or unknown, or a shape is not the encoder's; then nothing was filled.
        ConfigError: `names` are not those of the encoder's parameters.
    """
    targets = _targets(encoder, names)
    table_name = next((name for name in ITEM_TABLES.values() if name in state), ITEM_TABLES["TiM4Rec"])
    _check_names({table_name, *targets}, state)
    for name, target in targets.items():
        _check_shape(name, state[name], tuple(target.shape))
    _check_table(table_name, state[table_name], encoder.width)
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(state[name])
    return state[table_name]


def published_state(
    encoder: Encoder, names: Mapping[str, str], item_table: Tensor, table_name: str = "item_embedding.weight"
) -> dict[str, Tensor]:
    """The inverse of `load_published`: a state dict that the published program takes, a copy.

    Args:
        item_table: (V, D) with a row 0 that is no item.
        table_name: what the published program calls it; see `ITEM_TABLES`.

    Raises:
        CheckpointError: the item table is of another width.
        ConfigError: `names` are not those of the encoder's parameters.
    """
    _check_table(table_name, item_table, encoder.width)
    weights = {name: target.clone() for name, target in _targets(encoder, names).items()}
    return {table_name: item_table.detach().clone()} | weights


def _targets(encoder: Encoder, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Published name to our parameter, seen in the published shape."""
    parameters = dict(encoder.named_parameters())
    if astray := sorted(names.keys() ^ parameters.keys()):
        raise ConfigError(
            f"names must be those of the encoder's parameters, got {astray} on one side only; "
            "take the published_names of the config that built the encoder"
        )
    return {names[ours]: _as_published(encoder, ours, parameter.detach()) for ours, parameter in parameters.items()}


def _as_published(encoder: Encoder, name: str, parameter: Tensor) -> Tensor:
    owner, _, kind = name.rpartition(".")
    is_taps = kind == "weight" and isinstance(encoder.get_submodule(owner), ShortConv)
    return parameter[:, None] if is_taps else parameter


def _check_names(wanted: set[str], given: Iterable[str]) -> None:
    missing, unknown = sorted(wanted.difference(given)), sorted(set(given) - wanted)
    if missing or unknown:
        raise CheckpointError(
            f"a published state must name each of {len(wanted)} parameters and no other, got {_some(missing)} missing "
            f"and {_some(unknown)} unknown; give the config the system, layers and options of the weights"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more or "none"


def _check_shape(name: str, tensor: Tensor, wanted: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != wanted:
        raise CheckpointError(
            f"{name} must be {wanted}, got {tuple(tensor.shape)}; give the config the sizes of the weights"
        )


def _check_table(name: str, table: Tensor, width: int) -> None:
    if table.ndim != 2 or table.shape[1] != width:
        raise CheckpointError(
            f"{name} must be (V, {width}), got {tuple(table.shape)}; give the config the width of the weights"
        )
