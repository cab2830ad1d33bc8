"""Mamba4Rec and RecMamba beside the published programs: the same weights and rows, every number that a case holds.

Published rows of Mamba4Rec are padded on their right, and the padding comes to nothing: here it is not there. Those of
RecMamba are padded on their left with item 0, which goes through the model: here it is an item, and all rows are full.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.parity.case import Case, Computed
from ssd_torchrec.encoders.encoder import Encoder
from ssd_torchrec.encoders.mamba4rec import Mamba4RecConfig
from ssd_torchrec.encoders.published import PUBLISHED_NAMES, load_published
from ssd_torchrec.encoders.recmamba import RecMambaConfig
from ssd_torchrec.jagged import JaggedLayout


def mamba4rec(case: Case, dtype: torch.dtype) -> Computed:
    """What each mixer and layer gives, the read-out, logits, loss, and the gradients if the case has them."""
    shape = case.config
    config = Mamba4RecConfig(
        width=shape["hidden_size"],
        layers=shape["num_layers"],
        expand=shape["expand"],
        state=shape["d_state"],
        taps=shape["d_conv"],
        norm_eps=shape["layer_norm_eps"],
    )
    names = PUBLISHED_NAMES[config.title](config)
    net = config.build().to(dtype).eval()
    table = load_published(net, names, case.parameters(dtype)).requires_grad_()
    lengths = case.inputs("item_seq_len")
    is_event = torch.arange(shape["T"]) < lengths[:, None]  # (B, longest)
    layout = JaggedLayout.from_lengths(lengths)
    layers, mixers = (_first_outputs(net, f"layers.{{}}{end}", config.layers) for end in ("", ".mixer"))
    ids = case.inputs("item_seq")[is_event]
    readout = net(table[ids], torch.zeros_like(ids), layout)[layout.last_event]
    logits = readout @ table.T
    loss = F.cross_entropy(logits, case.inputs("pos_items"))
    found = {"readout": readout, "logits": logits, "loss": loss}
    for kind, outputs in {"layer_out": layers, "mamba_out": mixers}.items():
        found |= {f"{kind}.{depth}": output for depth, output in enumerate(outputs)}
    return _compared(case, found, loss, _parameters(net, names) | {"item_embedding.weight": table}, is_event)


def recmamba(case: Case, dtype: torch.dtype) -> Computed:
    """What every event gives, logits of the next item and of another, scores, loss, and the gradients if there are."""
    shape = case.config
    config = RecMambaConfig(
        width=shape["hidden_units"],
        expand=shape["expand"],
        state=shape["d_state"],
        taps=shape["d_conv"],
        max_length=shape["maxlen"],
    )
    names = PUBLISHED_NAMES[config.title](config)
    net = config.build().to(dtype).eval()
    table = load_published(net, names, case.parameters(dtype)).requires_grad_()
    rows = case.inputs("item_seq")
    layout = JaggedLayout.from_lengths([rows.shape[1]] * len(rows))
    events = _looked_up(rows, table).flatten(0, 1)
    features = net(events, torch.zeros(len(events), dtype=torch.int64), layout).view(*rows.shape, -1)
    positive, negative = case.inputs("pos_items"), case.inputs("neg_items")
    pos_logits, neg_logits = ((features * _looked_up(items, table)).sum(-1) for items in (positive, negative))
    loss = _binary(pos_logits, 1.0, positive != 0) + _binary(neg_logits, 0.0, positive != 0)
    found = {
        "features": features,
        "candidate_scores": features[:, -1] @ table[case.inputs("candidates")].T,
        "pos_logits": pos_logits,
        "neg_logits": neg_logits,
        "loss": loss,
    }
    return _compared(case, found, loss, _parameters(net, names) | {"item_emb.weight": table})


def _looked_up(ids: Tensor, table: Tensor) -> Tensor:
    """Item 0 has a vector, and no gradient."""
    return F.embedding(ids, table, padding_idx=0)


def _binary(logits: Tensor, target: float, counts: Tensor) -> Tensor:
    """Mean cross-entropy of the logits that count."""
    logits = logits[counts]
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def _first_outputs(net: nn.Module, path: str, layers: int) -> list[Tensor]:
    """A list that fills with the first output of a module of each layer when they are called."""
    outputs: list[Tensor] = []
    for depth in range(layers):
        net.get_submodule(path.format(depth)).register_forward_hook(
            lambda _module, _args, output: outputs.append(output[0])
        )
    return outputs


def _parameters(net: Encoder, names: dict[str, str]) -> dict[str, Tensor]:
    """By their published names."""
    return {names[ours]: parameter for ours, parameter in net.named_parameters()}


def _compared(
    case: Case, found: dict[str, Tensor], loss: Tensor, weights: dict[str, Tensor], is_event: Tensor | None = None
) -> Computed:
    """All that the case expects; of layers only what they give at events, where `is_event` says which those are."""
    computed = Computed()
    for name, theirs in _of_kind(case, "expected.").items():
        is_padded = is_event is not None and name.startswith(("layer_out.", "mamba_out."))
        computed.outputs.append((name, found[name].detach(), theirs[is_event] if is_padded else theirs))
    expected = _of_kind(case, "grad.")
    if expected:
        gradients = torch.autograd.grad(loss, [weights[name] for name in expected])
        for (name, theirs), gradient in zip(expected.items(), gradients, strict=True):
            computed.gradients.append((name, gradient.view_as(theirs), theirs))
    return computed


def _of_kind(case: Case, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in case.tensors.items() if name.startswith(prefix)}
