"""TiM4Rec and SSD4Rec on published inputs, with published weights.

Published tensors of a padded batch are compared at events, but for the time branch, whose empty slots count.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.parity.case import Case, Computed
from ssd_torchrec.encoders.encoder import EncoderConfig
from ssd_torchrec.encoders.published import PUBLISHED_NAMES, load_published
from ssd_torchrec.encoders.ssd4rec import SSD4RecConfig, turned_rows
from ssd_torchrec.encoders.tim4rec import TiM4Rec, TiM4RecConfig
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.modules import ssd_mixer
from ssd_torchrec.modules.dropout import Dropout
from ssd_torchrec.ops.ssd_scan import ssd_scan

TABLE = "item_embedding.weight"
AT_EVENTS = ("input_normed", "layer_out", "dt_raw", "ssd_out", "ssd_op_out")  # of a padded batch, the rest is at slots


def tim4rec(case: Case, dtype: torch.dtype) -> Computed:
    """A case of TiM4Rec: a padded batch, with or without time."""
    config = tim4rec_config(case)
    net, table = loaded(config, case, dtype)
    found = _tim4rec_outputs(net, table, case)
    outputs, gradients = compared(case, "expected.", found), gradients_of(case, found["loss"], net, table)
    if any(name.startswith("expected_f32time.") for name in case.tensors):
        net, table = loaded(replace(config, float32_timestamps=True), case, dtype)
        outputs += compared(case, "expected_f32time.", _tim4rec_outputs(net, table, case))
    return Computed(outputs, gradients)


def tim4rec_config(case: Case) -> TiM4RecConfig:
    """Ours of the published settings."""
    shape = case.config
    window = {"window_length": shape["T"], "mix_by_slot": shape["p2p_residual"]} if shape["is_time"] else {}
    return TiM4RecConfig(
        width=shape["hidden_size"],
        layers=shape["num_layers"],
        expand=shape["expand"],
        head_width=shape["head_dim"],
        state=shape["d_state"],
        taps=shape["d_conv"],
        activation=shape["conv_activation"],
        norm_eps=shape["norm_eps"],
        dropout=shape["dropout_prob"],
        time_dropout=shape["time_drop_out"],
        feed_forward=shape["is_ffn"],
        time_mode="window" if shape["is_time"] else "none",
        **window,
    )


def _tim4rec_outputs(net: TiM4Rec, table: Tensor, case: Case) -> dict[str, Tensor]:
    lengths = case.inputs("item_seq_len")
    layout = JaggedLayout.from_lengths(lengths)
    ids, stamps = (at_events(case.inputs(name), lengths) for name in ("item_seq", "timestamps"))
    with _calls(net) as calls, _scans() as scanned, _replayed(net, _tim4rec_masks(case)):
        out = net(table[ids], stamps, layout)
    found = read_out(case, out, layout, table) | {"input_normed": calls["norm"].gave}
    for depth in range(len(net.layers)):
        found[f"layer_out.{depth}"] = calls[f"layers.{depth}"].gave[0]
        found[f"ssd_out.{depth}"] = calls[f"layers.{depth}.mixer"].gave[0]
        found[f"dt_raw.{depth}"] = calls[f"layers.{depth}.mixer.in_proj"].gave[:, -net.config.mixer().heads :]
        found[f"ssd_op_out.{depth}"] = scanned[depth]
        if net.time is not None:
            found[f"time_gate.{depth}"] = calls[f"time.gates.{depth}"].gave.transpose(1, 2)
            found[f"time_signal_in.{depth}"] = calls[f"time.gates.{depth}"].given[0]
            found[f"time_signal_out.{depth}"] = calls[f"time.mixes.{depth}"].gave
    return found


def _tim4rec_masks(case: Case) -> dict[str, list[Tensor]]:
    """At slots of a time branch, at events of all else. `dropout` is called on events first, then on gaps."""
    masks, lengths = {}, case.inputs("item_seq_len")
    for name, calls in _masks(case).items():
        of_layer = name.replace("ssd_layers", "layers").replace("ffn", "feed_forward")
        if name == "dropout":
            masks["dropout"] = [at_events(calls[0], lengths)]
            masks |= {"time.signal.dropout": calls[1:]} if calls[1:] else {}
        elif ".ssd." in name:
            part = "gates" if "mlp4time_scale" in name else "mixes"
            masks[f"time.{part}.{name.split('.')[1]}.dropout"] = calls
        else:
            masks[of_layer] = [at_events(mask, lengths) for mask in calls]
    return masks


def ssd4rec(case: Case, dtype: torch.dtype) -> Computed:
    """A case of SSD4Rec: a packed stream, its ids masked already."""
    net, table = loaded(ssd4rec_config(case), case, dtype)
    ids, layout = case.inputs("item_ids"), JaggedLayout.from_lengths(case.inputs("offsets").diff())
    turned = turned_rows(layout)
    with _calls(net) as calls, _replayed(net, _ssd4rec_masks(case)):
        out = net(table[ids], torch.zeros_like(ids), layout)
    found = read_out(case, out, layout, table)
    for depth, layer in enumerate(net.layers):
        found[f"layer_out.{depth}"] = calls[f"layers.{depth}"].gave[0]
        ways = layer.mixer.both_ways(calls[f"layers.{depth}"].given[0], layout)
        forward, backward = (layer.mixer.out_proj(way) for way in ways)
        found |= {f"forward_branch.{depth}": forward, f"backward_branch.{depth}": backward[turned]}
    packing = {"flip_index": turned, "seq_idx": layout.row_of_event, "cum_lengths": layout.offsets[1:]}
    outputs = [(name, ours.double(), case.inputs(name).double()) for name, ours in packing.items()]
    return Computed(outputs + compared(case, "expected.", found), gradients_of(case, found["loss"], net, table))


def ssd4rec_config(case: Case) -> SSD4RecConfig:
    """Ours of the published settings."""
    shape = case.config
    return SSD4RecConfig(
        width=shape["hidden_size"],
        layers=shape["num_layers"],
        expand=shape["expand"],
        head_width=shape["headdim"],
        state=shape["d_state"],
        taps=shape["d_conv"],
        gated_norm_eps=shape["rmsnorm_eps"],
        dropout=shape["dropout_prob"],
        norm_embedding=shape["norm_embedding"],
        beta=shape["beta"],
        backward_align="slot",
    )


def _ssd4rec_masks(case: Case) -> dict[str, list[Tensor]]:
    return {
        name.replace("BiSSD_layers", "layers").replace("ffn", "feed_forward"): [mask[0] for mask in calls]
        for name, calls in _masks(case).items()
    }


def loaded(config: EncoderConfig, case: Case, dtype: torch.dtype) -> tuple[Any, Tensor]:
    """The encoder with the weights of the case, in the case's mode, and the item table (V, D) to differentiate by."""
    net = config.build().to(dtype).train(case.entry["mode"].startswith("train"))
    table = load_published(net, PUBLISHED_NAMES[config.title](config), case.parameters(dtype))
    return net, table.requires_grad_()


def at_events(padded: Tensor, lengths: Tensor) -> Tensor:
    """(B, longest, ...), padded on the right, to (T, ...)."""
    return padded[torch.arange(padded.shape[1]) < lengths[:, None]]


def read_out(case: Case, out: Tensor, layout: JaggedLayout, table: Tensor) -> dict[str, Tensor]:
    """The row's last event against the whole table, row 0 included."""
    readout = out[layout.last_event]
    logits = readout @ table.T
    return {"readout": readout, "logits": logits, "loss": F.cross_entropy(logits, case.inputs("pos_items"))}


def compared(case: Case, prefix: str, found: dict[str, Tensor]) -> list[tuple[str, Tensor, Tensor]]:
    """Ours beside each tensor under the prefix: none is left out."""
    pairs = []
    for full, theirs in case.tensors.items():
        if full.startswith(prefix):
            name = full.removeprefix(prefix)
            is_padded = name.split(".")[0] in AT_EVENTS and "input.item_seq_len" in case.tensors
            theirs = at_events(theirs, case.inputs("item_seq_len")) if is_padded else theirs
            pairs.append((full, found[name], theirs))
    return pairs


def gradients_of(case: Case, loss: Tensor, net: Any, table: Tensor) -> list[tuple[str, Tensor, Tensor]]:
    """Ours beside each gradient of the case, and beside 0 where the published program has none."""
    names = PUBLISHED_NAMES[case.entry["model"]](net.config)
    parameters = {TABLE: table} | {names[ours]: parameter for ours, parameter in net.named_parameters()}
    ours = dict(zip(parameters, torch.autograd.grad(loss, [*parameters.values()]), strict=True))
    wanted = {n.removeprefix("grad."): t for n, t in case.tensors.items() if n.startswith("grad.")}
    wanted |= {name: torch.zeros_like(ours[name]) for name in case.entry.get("params_without_gradient") or []}
    return [(f"grad.{name}", ours[name].view_as(theirs), theirs) for name, theirs in wanted.items()]


class Call(NamedTuple):
    """What a module was given, and what it gave."""

    given: tuple[Any, ...]
    gave: Any


@contextmanager
def _calls(net: nn.Module) -> Iterator[dict[str, Call]]:
    """The last call of each module within, by its name."""
    calls: dict[str, Call] = {}

    def record(name: str) -> Any:
        return lambda module, given, gave: calls.__setitem__(name, Call(given, gave))

    hooks = [module.register_forward_hook(record(name)) for name, module in net.named_modules()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _scans() -> Iterator[list[Tensor]]:
    """Outputs of the scans within, in order."""
    outputs = []

    def recording(*args: Any, **options: Any) -> Tensor:
        outputs.append(ssd_scan(*args, **options))
        return outputs[-1]

    with patch.object(ssd_mixer, "ssd_scan", recording):
        yield outputs


def _masks(case: Case) -> dict[str, list[Tensor]]:
    """Keep-masks of each published dropout module, call by call."""
    found: dict[str, dict[int, Tensor]] = {}
    for full, mask in case.tensors.items():
        if full.startswith("dropout."):
            name, _, call = full.removeprefix("dropout.").rpartition("#")
            found.setdefault(name, {})[int(call)] = mask
    return {name: [calls[k] for k in sorted(calls)] for name, calls in found.items()}


@contextmanager
def _replayed(net: nn.Module, masks: dict[str, list[Tensor]]) -> Iterator[None]:
    """In training, each dropout of `net` keeps what its masks keep, call by call; every mask must be asked for."""
    dropouts = {name: module for name, module in net.named_modules() if isinstance(module, Dropout)}
    modules: dict[str, Any] = {name: d for name, d in dropouts.items() if net.training and (d.p or name in masks)}
    left = {name: iter(masks.pop(name, [])) for name in modules}
    assert not masks, f"keep-masks of no dropout of ours: {sorted(masks)}"

    def keep(x: Tensor, name: str) -> Tensor:
        mask = next(left[name], None)
        assert mask is not None, f"{name} is called more often than there are keep-masks"
        return x * mask.to(x.dtype) / (1 - modules[name].p)

    for name in left:
        modules[name].forward = partial(keep, name=name)
    try:
        yield
    finally:
        for name in left:
            del modules[name].forward
    assert not any(list(rest) for rest in left.values()), "keep-masks that no call asked for"
