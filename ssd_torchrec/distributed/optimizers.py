"""What updates the weights: one keyed optimizer for tables and dense part, whether tables are split or not.

    CombinedOptimizer
      "tables"   fused into FBGEMM's backward when tables are split, else a PyTorch optimizer
      "dense"    Adam, Adam with Muon for the matrices, or SGD; its gradients clipped by their global norm on request

Clipping covers the dense part only: fused optimizers step inside backward, before a norm is known. It does the same for
unsplit tables, so that every world computes the same. All state exists, zeroed, from the start: a checkpoint loaded in
place then misses nothing.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.optim.apply_optimizer_in_backward import _apply_optimizer_in_backward
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper

from ssd_torchrec.distributed.plan import ShardingConfig
from ssd_torchrec.errors import ConfigError

TABLE_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rowwise_adagrad": RowWiseAdagrad,
    "adam": torch.optim.Adam,
}
ADAM_BETAS = (0.9, 0.999)  # of tables: FBGEMM's defaults, and PyTorch's
MUON_LEAST = 16  # rows and columns; to orthogonalise less says little, such as a gate's 4 x 16
UNDECAYED = {"A_log", "D", "dt_bias"}  # decay rates, skips and step sizes of an SSM: zero means nothing special to them
LOOKED_UP = {"positions", "position_key", "position_value", "interval_key", "interval_value"}  # tables, not maps


@dataclass(frozen=True, kw_only=True)
class DenseOptimizerConfig:
    """What updates everything that is not an embedding table."""

    optimizer: Literal["adam", "muon", "sgd"] = "adam"
    """adam decays weights decoupled from the gradient (AdamW); with weight_decay 0 it is the papers' Adam. muon (Jordan
    et al. 2024) orthogonalises the momentum of matrices of at least 16 x 16, its step scaled to the size of Adam's so
    that both take the same learning rate (Liu et al. 2025, Muon is scalable), and leaves the rest to adam."""

    learning_rate: float = 1e-3
    """Learning rate before the schedule's factor."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of Adam's two moments."""

    eps: float = 1e-8
    """Added to Adam's denominator."""

    weight_decay: float = 0.0
    """Weights lose this share times the learning rate a step; biases, norms, positions, A_log, dt_bias and D never."""

    clip_norm: float | None = None
    """Scale the dense gradients down to this global norm; tables are not clipped. None: never."""

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ConfigError(f"the dense learning_rate must be above 0, got {self.learning_rate}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas must lie in [0, 1), got {self.betas}")
        if not self.eps > 0:
            raise ConfigError(f"eps must be above 0, got {self.eps}")
        if self.weight_decay < 0:
            raise ConfigError(f"weight_decay must be at least 0, got {self.weight_decay}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(f"clip_norm must be above 0, got {self.clip_norm}; leave it None to not clip")


def table_options(config: ShardingConfig) -> dict[str, float]:
    """Keyword arguments of the tables' optimizer; a new dict a call, since TorchRec edits the one it is given."""
    assert config.learning_rate is not None  # resolved
    return {"lr": config.learning_rate} | ({} if config.optimizer == "sgd" else {"eps": config.eps})


def fuse_into_backward(tables: Iterable[nn.Parameter], config: ShardingConfig) -> None:
    """Mark tables to be updated inside backward; before they are sharded."""
    for table in tables:
        _apply_optimizer_in_backward(TABLE_OPTIMIZERS[config.optimizer], [table], table_options(config))


@torch.no_grad()
def step_rows(
    kind: str, weight: Tensor, gradient: Tensor, state: Mapping[str, Tensor], *, rate: float, eps: float
) -> None:
    """Do in place to rows of a table what FBGEMM's fused optimizer does to them.

    Args:
        weight: (R, D).
        gradient: (R, D), used up.
        state: as `state.TABLE_STATE` has it: sum (R, D) of adagrad, sum (R,) of rowwise_adagrad, exp_avg and exp_avg_sq
            (R, D) and step () of adam, which counts this step already; betas are 0.9 and 0.999, FBGEMM's own.
    """
    if kind == "sgd":
        weight.sub_(gradient, alpha=rate)
    elif kind == "adagrad":
        state["sum"].addcmul_(gradient, gradient)
        weight.addcdiv_(gradient, state["sum"].sqrt().add_(eps), value=-rate)
    elif kind == "rowwise_adagrad":
        state["sum"].add_(gradient.square().mean(1))
        weight.sub_(gradient.mul_(rate / state["sum"].sqrt().add_(eps)[:, None]))
    else:
        assert kind == "adam"
        first, second, step = state["exp_avg"], state["exp_avg_sq"], int(state["step"])
        first.lerp_(gradient, 1 - ADAM_BETAS[0])
        second.mul_(ADAM_BETAS[1]).addcmul_(gradient, gradient, value=1 - ADAM_BETAS[1])
        mean = first / (1 - ADAM_BETAS[0] ** step)
        weight.addcdiv_(mean, (second / (1 - ADAM_BETAS[1] ** step)).sqrt_().add_(eps), value=-rate)


def unfused(tables: Mapping[str, nn.Parameter], config: ShardingConfig) -> KeyedOptimizer:
    """The PyTorch optimizer that does to whole tables what the fused one does to split ones."""
    kind: Any = TABLE_OPTIMIZERS[config.optimizer]
    return _with_state(KeyedOptimizerWrapper(tables, lambda weights: kind(weights, **table_options(config))))


def combined(tables: KeyedOptimizer, dense: KeyedOptimizer) -> CombinedOptimizer:
    """One optimizer of both parts, each group remembering the learning rate it was built with."""
    optimizer = CombinedOptimizer([("tables", tables), ("dense", dense)])
    for group in optimizer.param_groups:
        _as_dict(group)["initial_lr"] = group["lr"]
    return optimizer


def dense_optimizer(parameters: Mapping[str, nn.Parameter], config: DenseOptimizerConfig) -> KeyedOptimizer:
    """The optimizer of the named dense parameters, clipping included."""
    matrices = {name: p for name, p in parameters.items() if config.optimizer == "muon" and is_matrix(name, p)}
    others = {name: p for name, p in parameters.items() if name not in matrices}
    parts = [(others, _adam_or_sgd)] * bool(others) + [(matrices, _muon)] * bool(matrices)
    optimizer: KeyedOptimizer = CombinedOptimizer([_keyed(weights, make, config) for weights, make in parts])
    optimizer = _with_state(optimizer)
    if config.clip_norm is None:
        return optimizer
    return GradientClippingOptimizer(optimizer, GradientClipping.NORM, max_gradient=config.clip_norm)


Make = Callable[[Mapping[str, nn.Parameter], DenseOptimizerConfig], torch.optim.Optimizer]


def _keyed(weights: Mapping[str, nn.Parameter], make: Make, config: DenseOptimizerConfig) -> KeyedOptimizer:
    return KeyedOptimizerWrapper(weights, lambda _: make(weights, config))


def _muon(matrices: Mapping[str, nn.Parameter], config: DenseOptimizerConfig) -> torch.optim.Optimizer:
    return torch.optim.Muon(
        list(matrices.values()),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )


def _adam_or_sgd(parameters: Mapping[str, nn.Parameter], config: DenseOptimizerConfig) -> torch.optim.Optimizer:
    decayed = [p for name, p in parameters.items() if decays(name, p)]
    kept = [p for name, p in parameters.items() if not decays(name, p)]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps)


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon may update this dense parameter: a linear map of some size."""
    return parameter.ndim == 2 and decays(name, parameter) and min(parameter.shape) >= MUON_LEAST


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay may pull this dense parameter to zero: matrices and convolutions only."""
    parts = name.split(".")
    return parameter.ndim > 1 and parts[-1] not in UNDECAYED and not LOOKED_UP.intersection(parts)


@torch.no_grad()
def _with_state(optimizer: KeyedOptimizer) -> KeyedOptimizer:
    """Make an optimizer's lazy state now, as it is before the first step; weights stay as they are."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        _as_dict(group)["lr"] = 0.0
    optimizer.init_state()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        _as_dict(group)["lr"] = rate
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()  # a step with zero gradients leaves zeros but for the count of steps
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def set_learning_rate(optimizer: CombinedOptimizer, factor: float) -> None:
    """Set every learning rate, of tables and dense part, to `factor` times the one it was built with.

    To be called before the step's `zero_grad` (a pipeline's `progress` calls that first): fused optimizers take the
    rate over there, and step inside backward.
    """
    for group in optimizer.param_groups:
        _as_dict(group)["lr"] = group["initial_lr"] * factor


def _as_dict(group: Mapping[str, Any]) -> dict[str, Any]:
    assert isinstance(group, dict)  # typed as a Mapping, and the live dict
    return group
