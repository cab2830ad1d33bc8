"""Does a model fit these GPUs, and how many does it take: one judgement, whatever the model is.

    request ──► its model's tables, and arithmetic for any number of ranks ──► verdict, fewest ranks, alternatives

Who holds which part of which table, and what a step costs, says TorchRec's planner; bytes of a rank's GPU are counted:

    tables        weights, optimizer state, caches, lookups: see `rank_storage`
    dense         weights, gradients and optimizer state of what is no table
    activations   what a forward pass keeps for the backward one: says the need
    loss          likewise

Not counted: gradients alive at once inside backward, workspaces, the batch's own ids. Numbers are fp32.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import isfinite
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torchrec.distributed.planner.types import PlannerError, Shard

from ssd_torchrec.distributed.optimizers import DenseOptimizerConfig, fuse_into_backward, is_matrix
from ssd_torchrec.distributed.plan import (
    BY_COLUMNS,
    OF_MACHINES,
    RESERVED_MEMORY,
    Ranks,
    ShardingConfig,
    Workload,
    plan_offline,
    resolve,
)
from ssd_torchrec.distributed.rank_storage import RankStorage, TablePlacement, TableShard, cut, placement, shard_bytes
from ssd_torchrec.distributed.tables import TableConfig, tables_of
from ssd_torchrec.encoders.encoder import EncoderConfig
from ssd_torchrec.encoders.tim4rec import TiM4RecConfig
from ssd_torchrec.errors import ConfigError

GIB = 2**30
MOST_RANKS = 4096
USABLE_MEMORY = 0.95  # of a GPU; the rest is left to CUDA, NCCL and gaps between allocations: assumed, not measured
CUDA = torch.device("cuda")
AMPLE = 2**60  # bytes: more than any machine has


@dataclass(frozen=True, kw_only=True)
class FitRequest:
    """On which GPUs, and how tables are split over them; what is to fit there adds the kind of model."""

    ranks: int
    """GPUs, one a process."""

    memory_gib: float
    """Memory of a GPU in GiB."""

    encoder: EncoderConfig = field(default_factory=TiM4RecConfig)
    """The encoder; its width is the width of the tables."""

    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    """How tables are split, and what updates them."""

    dense: DenseOptimizerConfig = field(default_factory=DenseOptimizerConfig)
    """What updates the rest."""

    mean_length: float = 50.0
    """Events of a history that the model sees, on average."""

    ranks_per_machine: int = 8
    """GPUs that share a machine, its memory and its fast links."""

    host_memory_gib: float | None = None
    """Memory of a machine in GiB, where tables of fused_uvm and fused_uvm_caching lie. None: told, not judged."""

    def __post_init__(self) -> None:
        self._at_least(1, "ranks", "mean_length", "ranks_per_machine")
        if self.ranks > MOST_RANKS:
            raise ConfigError(f"ranks must be at most {MOST_RANKS}, got {self.ranks}; plan for fewer")
        for name in ("memory_gib", "host_memory_gib"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and isfinite(value)):
                raise ConfigError(f"{name} must be above 0 and finite, got {value}; give GiB, such as 80")
        if not isfinite(self.mean_length) or 0 < self.length_cap < self.mean_length:
            most = self.length_cap or "as many events as histories have"
            raise ConfigError(
                f"mean_length must be at most {most}, got {self.mean_length}; count the events that the encoder sees"
            )

    @property
    def length_cap(self) -> int:
        """Events of the longest history that can be read; 0 for any."""
        return self.encoder.length_cap

    def _at_least(self, least: int, *names: str) -> None:
        for name in names:
            if not getattr(self, name) >= least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}; raise it")


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The answer."""

    fits: bool
    """Whether the heaviest rank needs at most `USABLE_MEMORY` of its GPU, its tables no more than training gives them
    (all but `RESERVED_MEMORY`), and no more of the machine's memory if that was given."""

    verdict: str
    """The same in a sentence, and what would fit if this does not."""

    memory_bytes: int
    """Of a GPU."""

    fewest_ranks: int | None
    """The smallest number of ranks that fits; None: none up to `MOST_RANKS`."""

    alternatives: tuple[str, ...]
    """What fits on the ranks asked for, where this does not."""

    optimizer: str
    """Of the tables."""

    compute_kernel: str
    """Of the tables; empty where they are whole."""

    tables: tuple[TablePlacement, ...]
    per_rank: tuple[RankStorage, ...]

    @property
    def heaviest(self) -> RankStorage:
        """The rank that decides."""
        return max(self.per_rank, key=lambda rank: rank.total_bytes)

    @property
    def step_ms(self) -> float | None:
        """Of the slowest rank's tables, by TorchRec's estimate; None for whole tables."""
        return max((rank.step_ms for rank in self.per_rank if rank.step_ms is not None), default=None)


@dataclass(frozen=True)
class Need(ABC):
    """What a request takes on any number of ranks, by arithmetic; a kind of model says what it looks up and keeps."""

    request: FitRequest

    tables: Mapping[str, TableConfig]
    """Of the model, by the name of their weight."""

    dense_bytes: int
    """See the function of that name."""

    by_rows: ClassVar[tuple[str, Literal["auto", "row_wise"]]] = ("row_wise", "row_wise")
    """How a split of all tables by rows is called where it is an alternative, and the sharding that is one."""

    @property
    @abstractmethod
    def main_table(self) -> str:
        """Name of the table that is split by rows where that is an alternative."""

    @abstractmethod
    def workload(self, config: ShardingConfig, ranks: int) -> Workload:
        """What a rank looks up in a step, as training tells the planner."""

    @abstractmethod
    def activations_bytes(self, ranks: int) -> int:
        """What a rank keeps for backward."""

    def loss_bytes(self, config: ShardingConfig, ranks: int, placed: Sequence[TablePlacement]) -> int:
        """What a rank's loss takes beside that; 0 where it is a few numbers a row."""
        return 0

    def possible_ranks(self) -> Sequence[int]:
        """Numbers of ranks that training would start on, ascending."""
        return range(1, MOST_RANKS + 1)

    def relief(self) -> tuple[str, dict[str, Any]] | None:
        """What else of the request may change to need less: how it is called, and the fields that change."""
        return None

    def resolved(self, ranks: int) -> ShardingConfig:
        """The sharding that training would make of the request's."""
        config = resolve(self.request.sharding, self.tables, ranks, CUDA, self.of_machine(ranks))
        if not config.split and config.compute_kernel != "fused":
            raise ConfigError(
                f"compute_kernel {config.compute_kernel} is for split tables, got whole ones on one rank; take "
                "sharding row_wise, or drop it"
            )
        return config

    def of_machine(self, ranks: int) -> int:
        """Ranks that share a machine."""
        return min(ranks, self.request.ranks_per_machine)

    def fits_on(self, ranks: int) -> bool:
        """Whether so many suffice; without asking the planner."""
        try:
            config = self.resolved(ranks)
        except ConfigError:
            return False
        return self.fits(config, self.per_rank(config, ranks, self.placed(config, ranks)))

    def fits_with(self, change: Mapping[str, Any]) -> bool:
        """Whether the ranks asked for suffice if these fields of the request are others."""
        return replace(self, request=replace(self.request, **change)).fits_on(self.request.ranks)

    def fits(self, config: ShardingConfig, per_rank: Sequence[RankStorage]) -> bool:
        """Whether each rank has the memory; see `Fit.fits`."""
        request, memory = self.request, self.request.memory_gib * GIB
        tables = memory * (1 - RESERVED_MEMORY) if config.split else memory
        host = _host_limit(request, len(per_rank))
        return all(
            rank.total_bytes <= USABLE_MEMORY * memory
            and rank.tables_bytes <= tables
            and (host is None or rank.host_bytes <= host)
            for rank in per_rank
        )

    def placed(self, config: ShardingConfig, ranks: int) -> list[TablePlacement]:
        """Who holds what, as TorchRec cuts tables; whole tables go to whoever has least."""
        placements, held = [], [0] * ranks
        for table in sorted(self.tables.values(), key=lambda table: -table.num_embeddings):
            split = config.by_table.get(table.name, "none")
            shards = cut(table, split, Ranks(ranks, self.of_machine(ranks), CUDA), held.index(min(held)))
            for shard in shards:
                held[shard.rank] += shard.num_rows * shard.num_columns
            placements.append(placement(table, split, shards))
        return placements

    def per_rank(self, config: ShardingConfig, ranks: int, placed: Sequence[TablePlacement]) -> list[RankStorage]:
        """Bytes of every rank."""
        rest = {
            "activations_bytes": self.activations_bytes(ranks),
            "dense_bytes": self.dense_bytes,
            "loss_bytes": self.loss_bytes(config, ranks, placed),
        }
        workload = self.workload(config, ranks)
        of_table = {table.name: workload.of(table.feature_names) for table in self.tables.values()}
        counts: list[dict[str, Any]] = [{} for _ in range(ranks)]
        for table in placed:
            for shard in table.shards:
                of = counts[shard.rank]
                for name, value in shard_bytes(table, shard, config, of_table[table.name], ranks).items():
                    of[name] = of.get(name, 0) + value
                if shard.step_ms is not None:
                    of["step_ms"] = of.get("step_ms", 0.0) + shard.step_ms
        return [RankStorage(rank=rank, **rest, **of) for rank, of in enumerate(counts)]


def judge(model: nn.Module, need: Need) -> Fit:
    """Place the tables, count what every rank needs, and judge whether that fits. Starts no process and needs no GPU.

    Args:
        model: unsharded, on "meta"; it is used up.
        need: of the same model.

    Raises:
        ConfigError: the split does not fit the ranks, or the optimizer, the loss or the kernel not the split. That
            something does not fit the memory is an answer, not an error.

    Deterministic.
    """
    request = need.request
    config = need.resolved(request.ranks)
    placed = _planned(model, need, config) if config.split else need.placed(config, request.ranks)
    order = [table.name for table in need.tables.values()]
    placed = sorted(placed, key=lambda table: order.index(table.name))
    per_rank = need.per_rank(config, request.ranks, placed)
    fits = need.fits(config, per_rank)
    fewest = _fewest(need)
    alternatives = () if fits else tuple(_alternatives(need, config))
    return Fit(
        fits=fits,
        verdict=_verdict(need, config, per_rank, fits, fewest, alternatives),
        memory_bytes=int(request.memory_gib * GIB),
        fewest_ranks=fewest,
        alternatives=alternatives,
        optimizer=config.optimizer,
        compute_kernel=config.compute_kernel if config.split else "",
        tables=tuple(placed),
        per_rank=tuple(per_rank),
    )


def figures(answer: Fit) -> dict[str, Any]:
    """All of an answer as what JSON knows: bytes are integers, durations ms, and the keys are those of the classes."""
    found = asdict(answer)
    for of, rank in zip(found["per_rank"], answer.per_rank, strict=True):
        of |= {"tables_bytes": rank.tables_bytes, "total_bytes": rank.total_bytes}
    return found | {"heaviest_rank": answer.heaviest.rank, "step_ms": answer.step_ms}


def dense_bytes(model: nn.Module, config: DenseOptimizerConfig) -> int:
    """Weights, gradients and optimizer state of what is no table."""
    tables = tables_of(model)
    numbers = 0
    for name, parameter in model.named_parameters():
        if name not in tables:
            moments = {"sgd": 0, "adam": 2, "muon": 1 if is_matrix(name, parameter) else 2}[config.optimizer]
            numbers += parameter.numel() * (2 + moments)
    return 4 * numbers


def _planned(model: nn.Module, need: Need, config: ShardingConfig) -> list[TablePlacement]:
    """Who holds what, from TorchRec's planner; where it finds no room, as if there were enough."""
    request = need.request
    weights = dict(model.named_parameters())
    fuse_into_backward([weights[name] for name in need.tables], config)  # the planner counts its state
    host = request.host_memory_gib
    refused = ""
    rooms = [
        (
            int(request.memory_gib * GIB),
            AMPLE if host is None else int(host * GIB / min(request.ranks, request.ranks_per_machine)),
        ),
        (AMPLE, AMPLE),
    ]
    for device_bytes, host_bytes in rooms:
        try:
            options = plan_offline(
                model,
                config,
                need.workload(config, request.ranks),
                ranks=request.ranks,
                ranks_per_machine=request.ranks_per_machine,
                device_bytes=device_bytes,
                host_bytes=host_bytes,
            )
        except PlannerError as error:
            refused = str(error)
            continue
        by_name = {table.name: table for table in need.tables.values()}
        return [
            placement(by_name[option.name], option.sharding_type, [_table_shard(shard) for shard in option.shards])
            for option in options
        ]
    raise ConfigError(f"TorchRec's planner must place the tables, it finds no way: {refused}; change the sharding")


def _table_shard(shard: Shard) -> TableShard:
    assert shard.rank is not None  # planned
    return TableShard(
        rank=shard.rank,
        first_row=shard.offset[0],
        num_rows=shard.size[0],
        first_column=shard.offset[1],
        num_columns=shard.size[1],
        step_ms=shard.perf.total if shard.perf else None,
    )


def _host_limit(request: FitRequest, ranks: int) -> float | None:
    """Bytes of its machine that a rank's tables may take."""
    if request.host_memory_gib is None:
        return None
    return request.host_memory_gib * GIB * (1 - RESERVED_MEMORY) / min(ranks, request.ranks_per_machine)


def _fewest(need: Need) -> int | None:
    """The least of the possible numbers that suffices."""
    sharding, machine, possible = need.request.sharding, need.request.ranks_per_machine, need.possible_ranks()
    splits = {sharding.sharding, *sharding.by_table.values()}
    if not splits.isdisjoint(BY_COLUMNS):  # few numbers of ranks divide the width
        most = need.request.encoder.width // 4 * (machine if "grid_shard" in splits else 1)
        return next((ranks for ranks in possible if ranks <= most and need.fits_on(ranks)), None)
    if not splits.isdisjoint(OF_MACHINES):  # whole machines, or a part of one
        part = next((ranks for ranks in possible if ranks <= machine and need.fits_on(ranks)), None)
        if part is not None:
            return part
        possible = [ranks for ranks in possible if ranks % machine == 0]
    return _first(possible, need.fits_on)


def _first(ascending: Sequence[int], suffices: Callable[[int], bool]) -> int | None:
    """Tries ever larger ones, then halves the gap: right as far as more never need more."""
    short, enough, last = -1, 0, len(ascending) - 1
    while not ascending or not suffices(ascending[enough]):
        if enough >= last:
            return None
        short, enough = enough, min(2 * enough + 1, last)
    while enough - short > 1:
        middle = (short + enough) // 2
        short, enough = (short, middle) if suffices(ascending[middle]) else (middle, enough)
    return ascending[enough]


def _alternatives(need: Need, config: ShardingConfig) -> Iterator[str]:
    """What else would fit on the ranks asked for; two changes at once only where one is not enough."""
    sharding, relief = need.request.sharding, need.relief()
    changes: dict[str, dict[str, Any]] = {}
    if config.split and config.by_table[need.main_table] != "row_wise":
        name, by_rows = need.by_rows
        changes[name] = {"sharding": replace(sharding, sharding=by_rows, by_table={})}
    if config.split and config.compute_kernel == "fused":
        kernels = ("fused_uvm_caching", "fused_uvm")
        changes |= {kernel: {"sharding": replace(sharding, compute_kernel=kernel)} for kernel in kernels}
    if config.optimizer in ("adam", "adagrad") and {*config.by_table.values()}.isdisjoint(BY_COLUMNS):
        changes["rowwise_adagrad"] = {"sharding": replace(sharding, optimizer="rowwise_adagrad", learning_rate=None)}
    alone = relief is not None and need.fits_with(relief[1])
    if relief is not None and alone:
        yield relief[0]
    for name, change in changes.items():
        if need.fits_with(change):
            yield name
        elif relief is not None and not alone and need.fits_with(change | relief[1]):
            yield f"{name} with {relief[0]}"


def _verdict(
    need: Need,
    config: ShardingConfig,
    per_rank: list[RankStorage],
    fits: bool,
    fewest: int | None,
    alternatives: tuple[str, ...],
) -> str:
    request, memory = need.request, need.request.memory_gib * GIB
    total, tables, host = (
        max(getattr(rank, name) for rank in per_rank) for name in ("total_bytes", "tables_bytes", "host_bytes")
    )
    on_machine = host * min(request.ranks, request.ranks_per_machine) / GIB
    share = f"{total / memory:.0%} of {request.memory_gib:g} GiB".replace("%", " %")
    if fits:
        needed = f", if each machine gives tables {on_machine:,.1f} GiB" if host and not request.host_memory_gib else ""
        fewer = f"; {fewest} would do" if fewest is not None and fewest < request.ranks else ""
        return f"fits, {share}{needed}{fewer}"
    limit = _host_limit(request, request.ranks)
    if total <= USABLE_MEMORY * memory and config.split and tables > (1 - RESERVED_MEMORY) * memory:
        share += f", of which tables would take more than the {1 - RESERVED_MEMORY:.0%}".replace("%", " %")
        share += " that training gives them"
    elif limit is not None and host > limit:
        share += f" and {on_machine:,.1f} of a machine's {request.host_memory_gib:g}"
    ways = [*([f"{fewest} ranks"] if fewest is not None else []), *alternatives]
    return f"does not fit, {share}: " + (
        f"needs {', or '.join(ways)}" if ways else f"nor on {need.possible_ranks()[-1]:,} ranks"
    )
