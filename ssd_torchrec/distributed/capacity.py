"""Does a catalogue fit, and on how many GPUs: worked out on any machine, before there are any.

Who holds which part of which table, and what a step costs, says TorchRec's planner; bytes of a rank's GPU are counted:

    tables        weights, optimizer state, caches, lookups: see `rank_storage`
    activations   events x width x layers x SAVED_FLOATS x 4: histories are jagged, so events are all there is
    dense         weights, gradients and optimizer state of what is no table
    loss          scored in place: queries of all ranks, one block of scores, one chunk of the table; else the
                  candidates and queries, and their gradients

Not counted: gradients alive at once inside backward, workspaces, the batch's own ids. Numbers are fp32.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from math import ceil, isfinite
from typing import Any

import torch
from torch import nn
from torchrec.distributed.planner.types import PlannerError, Shard

from ssd_torchrec.data.objective import ObjectiveConfig
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
from ssd_torchrec.distributed.scoring import num_candidates, scores_in_place
from ssd_torchrec.distributed.tables import TableConfig, tables_of
from ssd_torchrec.distributed.vocab_parallel import QUERIES_PER_BLOCK, ROWS_PER_CHUNK
from ssd_torchrec.encoders.encoder import EncoderConfig
from ssd_torchrec.encoders.registry import name_of
from ssd_torchrec.encoders.tim4rec import TiM4RecConfig
from ssd_torchrec.errors import ConfigError
from ssd_torchrec.models.next_item import ITEM_TABLE, NextItemModel, TablesConfig

GIB = 2**30
MOST_RANKS = 4096
USABLE_MEMORY = 0.95  # of a GPU; the rest is left to CUDA, NCCL and gaps between allocations: assumed, not measured
CUDA = torch.device("cuda")
AMPLE = 2**60  # bytes: more than any machine has

SAVED_FLOATS = {
    "tim4rec": 52.0,
    "ssd4rec": 75.0,
    "ssd4rec_star": 51.0,
    "bi_tim4rec": 63.0,
    "recmamba": 33.0,
    "mamba4rec": 50.0,
    "sasrec": 14.0,
    "tisasrec": 13.0,
    "bert4rec": 22.0,
    "gru4rec": 18.0,
    "caser": 16.0,
    "lrurec": 27.0,
}
"""Numbers that an encoder keeps for backward, for each event, channel and layer, by the system's name.

Measured on the CPU in fp32, in training mode, on the small preset of each system (64 wide): 16 rows of 40 to 60 events
(Caser of less), forward under `torch.autograd.graph.saved_tensors_hooks`, the bytes of every storage that was saved
counted once, without parameters and the events themselves, over 4 x events x width x layers. TiM4Rec has 52.0 there,
51.7 on rows of 1,000 events, and 47 where it is 256 wide. The kernels of a GPU save other tensors: expect the same
size, not the same number."""


@dataclass(frozen=True, kw_only=True)
class CapacityRequest:
    """What is to fit where."""

    items: int
    """Items of the catalogue, at least 1."""

    ranks: int
    """GPUs, one a process."""

    memory_gib: float
    """Memory of a GPU in GiB."""

    encoder: EncoderConfig = field(default_factory=TiM4RecConfig)
    """The encoder; its width is the width of the tables."""

    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What is asked for, which decides how many candidates a batch lists."""

    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    """How tables are split, and what updates them."""

    dense: DenseOptimizerConfig = field(default_factory=DenseOptimizerConfig)
    """What updates the rest."""

    context: dict[str, int] = field(default_factory=dict)
    """Context features: name, and how many ids it draws from."""

    event_columns: dict[str, int] = field(default_factory=dict)
    """Event columns: name, and how many ids it draws from."""

    tokens_per_batch: int = 4096
    """Events of one global batch, over all ranks."""

    mean_length: float = 50.0
    """Events of a history that the encoder sees, on average."""

    num_oov_buckets: int = 16
    """Rows of the item table for unknown ids."""

    ranks_per_machine: int = 8
    """GPUs that share a machine, its memory and its fast links."""

    host_memory_gib: float | None = None
    """Memory of a machine in GiB, where tables of fused_uvm and fused_uvm_caching lie. None: told, not judged."""

    def __post_init__(self) -> None:
        least = {"items": 1, "ranks": 1, "tokens_per_batch": 1, "mean_length": 1, "num_oov_buckets": 1}
        for name, value in (least | {"ranks_per_machine": 1}).items():
            if not getattr(self, name) >= value:
                raise ConfigError(f"{name} must be at least {value}, got {getattr(self, name)}; raise it")
        if self.ranks > MOST_RANKS:
            raise ConfigError(f"ranks must be at most {MOST_RANKS}, got {self.ranks}; plan for fewer")
        for kind in ("context", "event_columns"):
            if taken := sorted({ITEM_TABLE, "candidate"}.intersection(getattr(self, kind))):
                raise ConfigError(f"{kind} must be named other than the items, got {', '.join(taken)}; rename it")
        for name in ("memory_gib", "host_memory_gib"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and isfinite(value)):
                raise ConfigError(f"{name} must be above 0 and finite, got {value}; give GiB, such as 80")
        if not isfinite(self.mean_length) or 0 < self.encoder.length_cap < self.mean_length:
            most = self.encoder.length_cap or "as many events as histories have"
            raise ConfigError(
                f"mean_length must be at most {most}, got {self.mean_length}; count the events that the encoder sees"
            )


@dataclass(frozen=True, kw_only=True)
class Capacity:
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

    scored_in_place: bool
    """Whether the softmax goes over the table where it lies, and batches list no candidates."""

    events_per_rank: int
    """Of a batch."""

    candidates_per_rank: int
    """Items that a rank's batch lists, at most."""

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


def plan_capacity(request: CapacityRequest) -> Capacity:
    """Place the tables, count what every rank needs, and judge whether that fits. Starts no process and needs no GPU.

    Raises:
        ConfigError: the split does not fit the ranks, or the optimizer, the loss or the kernel not the split. That
            something does not fit the memory is an answer, not an error.

    Deterministic.
    """
    with torch.device("meta"):
        tower = request.encoder.build()
        tables = TablesConfig(
            num_item_rows=1 + request.num_oov_buckets + request.items,
            first_item=1 + request.num_oov_buckets,
            context=request.context,
            event_columns=request.event_columns,
        )
        model = NextItemModel(tables, tower, table_device="meta")
    need = _Need(request, tables_of(model), _dense_bytes(model, request.dense))
    config = need.resolved(request.ranks)
    _check_kernel(request, config)
    placed = _planned(model, need, config) if config.split else need.placed(config, request.ranks)
    order = [table.name for table in need.tables.values()]
    placed = sorted(placed, key=lambda table: order.index(table.name))
    per_rank = need.per_rank(config, request.ranks, placed)
    fits = need.fits(config, per_rank)
    fewest = _fewest(need)
    alternatives = () if fits else tuple(_alternatives(need, config))
    return Capacity(
        fits=fits,
        verdict=_verdict(request, config, per_rank, fits, fewest, alternatives),
        memory_bytes=int(request.memory_gib * GIB),
        fewest_ranks=fewest,
        alternatives=alternatives,
        optimizer=config.optimizer,
        compute_kernel=config.compute_kernel if config.split else "",
        scored_in_place=need.in_place(config),
        events_per_rank=need.events(request.ranks),
        candidates_per_rank=need.candidates(config, request.ranks),
        tables=tuple(placed),
        per_rank=tuple(per_rank),
    )


def figures(capacity: Capacity) -> dict[str, Any]:
    """All of an answer as what JSON knows: bytes are integers, durations ms, and the keys are those of the classes."""
    found = asdict(capacity)
    for of, rank in zip(found["per_rank"], capacity.per_rank, strict=True):
        of |= {"tables_bytes": rank.tables_bytes, "total_bytes": rank.total_bytes}
    return found | {"heaviest_rank": capacity.heaviest.rank, "step_ms": capacity.step_ms}


@dataclass(frozen=True)
class _Need:
    """What a request takes on any number of ranks, by arithmetic."""

    request: CapacityRequest
    tables: Mapping[str, TableConfig]
    dense_bytes: int

    def resolved(self, ranks: int) -> ShardingConfig:
        return resolve(self.request.sharding, self.tables, ranks, CUDA, self.of_machine(ranks))

    def of_machine(self, ranks: int) -> int:
        """Ranks that share a machine."""
        return min(ranks, self.request.ranks_per_machine)

    def fits_on(self, ranks: int) -> bool:
        try:
            config = self.resolved(ranks)
            _check_kernel(self.request, config)
        except ConfigError:
            return False
        return self.fits(config, self.per_rank(config, ranks, self.placed(config, ranks)))

    def fits(self, config: ShardingConfig, per_rank: list[RankStorage]) -> bool:
        request, memory = self.request, self.request.memory_gib * GIB
        tables = memory * (1 - RESERVED_MEMORY) if config.split else memory
        host = _host_limit(request, len(per_rank))
        return all(
            rank.total_bytes <= USABLE_MEMORY * memory
            and rank.tables_bytes <= tables
            and (host is None or rank.host_bytes <= host)
            for rank in per_rank
        )

    def workload(self, config: ShardingConfig, ranks: int) -> Workload:
        length = self.request.mean_length
        rows = max(1, round(self.request.tokens_per_batch / length / ranks))
        candidates = self.candidates(config, ranks)
        of_events = dict.fromkeys(["item", *self.request.event_columns], length)
        return Workload(rows_per_rank=rows, ids_per_row=of_events | {"candidate": candidates / rows})

    def events(self, ranks: int) -> int:
        """Of a rank's batch: its share, or a whole history if that is more."""
        return ceil(max(self.request.tokens_per_batch / ranks, self.request.mean_length))

    def in_place(self, config: ShardingConfig) -> bool:
        return scores_in_place(self.request.objective, config, self.request.items)

    def candidates(self, config: ShardingConfig, ranks: int) -> int:
        """Items that a rank's batch lists, at most."""
        request = self.request
        listed = num_candidates(request.objective, request.items, request.tokens_per_batch, self.events(ranks))
        return 0 if self.in_place(config) else listed

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

    def per_rank(self, config: ShardingConfig, ranks: int, placed: list[TablePlacement]) -> list[RankStorage]:
        rest = {
            "activations_bytes": _activations_bytes(self.request.encoder, self.events(ranks)),
            "dense_bytes": self.dense_bytes,
        }
        workload = self.workload(config, ranks)
        counts: list[dict[str, Any]] = [{} for _ in range(ranks)]
        for table in placed:
            for shard in table.shards:
                of = counts[shard.rank]
                for name, value in shard_bytes(table, shard, config, workload, ranks).items():
                    of[name] = of.get(name, 0) + value
                if shard.step_ms is not None:
                    of["step_ms"] = of.get("step_ms", 0.0) + shard.step_ms
        items = next(table for table in placed if table.name == ITEM_TABLE)
        loss = _loss_bytes(self, config, ranks, max(shard.num_rows for shard in items.shards))
        return [RankStorage(rank=rank, loss_bytes=loss, **rest, **of) for rank, of in enumerate(counts)]


def _check_kernel(request: CapacityRequest, config: ShardingConfig) -> None:
    if not config.split and request.sharding.compute_kernel != "fused":
        raise ConfigError(
            f"compute_kernel {request.sharding.compute_kernel} is for split tables, got whole ones on one rank; take "
            "sharding row_wise, or drop it"
        )


def _planned(model: nn.Module, need: _Need, config: ShardingConfig) -> list[TablePlacement]:
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


def _activations_bytes(encoder: EncoderConfig, events: int) -> int:
    layers = getattr(encoder, "layers", 1)  # some systems have one, and no field for it
    return ceil(4 * events * encoder.width * layers * SAVED_FLOATS[name_of(encoder)])


def _dense_bytes(model: nn.Module, config: DenseOptimizerConfig) -> int:
    tables = tables_of(model)
    numbers = 0
    for name, parameter in model.named_parameters():
        if name not in tables:
            moments = {"sgd": 0, "adam": 2, "muon": 1 if is_matrix(name, parameter) else 2}[config.optimizer]
            numbers += parameter.numel() * (2 + moments)
    return 4 * numbers


def _loss_bytes(need: _Need, config: ShardingConfig, ranks: int, rows: int) -> int:
    """Of a rank that holds `rows` rows of the item table."""
    events, width = need.events(ranks), need.request.encoder.width
    if not need.in_place(config):
        return 4 * width * 2 * (events + need.candidates(config, ranks))
    everyone, chunk = ranks * events, min(ROWS_PER_CHUNK["cuda"], rows)
    queries = width * (2 * everyone + 3 * events)  # with their gradients, and what looked-up rows wait with
    scores = min(QUERIES_PER_BLOCK["cuda"], everyone) * chunk
    sums = 2 * 5 * everyone  # in fp64
    return 4 * (queries + scores + sums + 3 * chunk * width)  # a chunk's gradient, and what its step makes of it


def _host_limit(request: CapacityRequest, ranks: int) -> float | None:
    """Bytes of its machine that a rank's tables may take."""
    if request.host_memory_gib is None:
        return None
    return request.host_memory_gib * GIB * (1 - RESERVED_MEMORY) / min(ranks, request.ranks_per_machine)


def _fewest(need: _Need) -> int | None:
    """Doubles the ranks until they suffice, then halves the gap: right as far as more ranks never need more."""
    sharding, machine = need.request.sharding, need.request.ranks_per_machine
    splits = {sharding.sharding, *sharding.by_table.values()}
    if not splits.isdisjoint(BY_COLUMNS):  # few numbers of ranks divide the width
        most = need.request.encoder.width // 4 * (machine if "grid_shard" in splits else 1)
        return next((ranks for ranks in range(1, most + 1) if need.fits_on(ranks)), None)
    unit = 1
    if not splits.isdisjoint(OF_MACHINES):  # whole machines, or a part of one
        part = next((ranks for ranks in range(1, machine + 1) if need.fits_on(ranks)), None)
        if part is not None:
            return part
        unit = machine
    enough = 1
    while not need.fits_on(enough * unit):
        enough *= 2
        if enough * unit > MOST_RANKS:
            return None
    short = enough // 2
    while enough - short > 1:
        middle = (short + enough) // 2
        short, enough = (short, middle) if need.fits_on(middle * unit) else (middle, enough)
    return enough * unit


def _alternatives(need: _Need, config: ShardingConfig) -> Iterator[str]:
    """What else would fit on the ranks asked for; two changes at once only where one is not enough."""
    request = need.request
    sharding, objective = request.sharding, request.objective
    sampled = {}
    if objective.loss != "sampled_softmax":
        sampled = {"objective": replace(objective, loss="sampled_softmax", scored="auto")}
    changes: dict[str, dict[str, Any]] = {}
    if config.split and config.by_table[ITEM_TABLE] != "row_wise":
        changes["row_wise"] = {"sharding": replace(sharding, sharding="row_wise", by_table={})}
    if config.split and config.compute_kernel == "fused":
        kernels = ("fused_uvm_caching", "fused_uvm")
        changes |= {kernel: {"sharding": replace(sharding, compute_kernel=kernel)} for kernel in kernels}
    if config.optimizer in ("adam", "adagrad") and {*config.by_table.values()}.isdisjoint(BY_COLUMNS):
        changes["rowwise_adagrad"] = {"sharding": replace(sharding, optimizer="rowwise_adagrad", learning_rate=None)}
    alone = bool(sampled) and _fits(need, sampled)
    if alone:
        yield "sampled_softmax"
    for name, change in changes.items():
        if _fits(need, change):
            yield name
        elif sampled and not alone and _fits(need, change | sampled):
            yield f"{name} with sampled_softmax"


def _fits(need: _Need, change: Mapping[str, Any]) -> bool:
    return replace(need, request=replace(need.request, **change)).fits_on(need.request.ranks)


def _verdict(
    request: CapacityRequest,
    config: ShardingConfig,
    per_rank: list[RankStorage],
    fits: bool,
    fewest: int | None,
    alternatives: tuple[str, ...],
) -> str:
    memory = request.memory_gib * GIB
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
    return f"does not fit, {share}: " + (f"needs {', or '.join(ways)}" if ways else f"nor on {MOST_RANKS:,} ranks")
