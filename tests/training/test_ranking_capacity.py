"""What is said of a DLRM on GPUs that are not there: held against a real group, TorchRec's numbers, and measured."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torchrec import EmbeddingBagCollection, EmbeddingCollection, KeyedTensor
from torchrec.datasets.utils import Batch
from torchrec.distributed.types import ShardedTensor

from ssd_torchrec.__main__ import main
from ssd_torchrec.data.ranking.clicks import HISTORY, ClicksConfig, clicks_meta, draw_clicks, generate_clicks
from ssd_torchrec.data.ranking.schema import RankingMeta
from ssd_torchrec.distributed.fit import GIB, figures
from ssd_torchrec.distributed.plan import ShardingConfig
from ssd_torchrec.distributed.process import World
from ssd_torchrec.distributed.shard import DenseOptimizerConfig
from ssd_torchrec.distributed.tables import allocate_tables, local_pieces, tables_of
from ssd_torchrec.encoders.registry import SYSTEMS
from ssd_torchrec.encoders.sasrec import SASRecConfig
from ssd_torchrec.encoders.tim4rec import PRESETS, TiM4RecConfig
from ssd_torchrec.errors import ConfigError
from ssd_torchrec.training import ranking_capacity
from ssd_torchrec.training.ranking_capacity import RankingCapacity, RankingCapacityRequest, plan_ranking_capacity
from ssd_torchrec.training.ranking_config import RankingDataConfig, RankingModelConfig, RankingRunConfig
from ssd_torchrec.training.ranking_run import build_ranking, ranking_model
from tests.distributed.planned import assert_as_torchrec_says
from tests.distributed.world import spawn

CLICKS = ClicksConfig(num_rows=64, longest=8)
META = replace(clicks_meta(CLICKS), longest={HISTORY: 8})  # tables of 6, 200 and 200 rows
LARGE = RankingMeta(
    name="large",
    dense=[f"dense_{n}" for n in range(13)],
    categorical={"user": 4_000_000, "shown": 500_000, "city": 5_000, "segment": 3},
    histories={"clicked": 500_000, "bought": 200_000},
    targets={"clicked": "shown"},
    longest={"clicked": 400, "bought": 20},
    num_rows={},
    num_positives={},
)
WIDE = TiM4RecConfig(width=64)
REQUEST = RankingCapacityRequest(meta=LARGE, ranks=4, memory_gib=16, encoder=WIDE, rows_per_batch=8192, mean_length=100)
MODELS = {
    "dot": RankingModelConfig(),
    "dcn": RankingModelConfig(interaction="dcn"),
    "projection": RankingModelConfig(interaction="projection"),
    "target": RankingModelConfig(target=True),
    "mean": RankingModelConfig(history="mean"),
    "none": RankingModelConfig(history="none", interaction="dcn"),
}


def under(request: RankingCapacityRequest, **sharding) -> RankingCapacityRequest:
    return replace(request, sharding=ShardingConfig(**sharding))


def total(answer: RankingCapacity, name: str) -> int:
    return sum(getattr(rank, name) for rank in answer.per_rank)


SPLITS: dict[str, dict[str, Any]] = {
    "rows": dict(
        sharding="row_wise", by_table={f"t_{name}": "row_wise" for name in ("segment", "candidate", "clicked")}
    ),
    "tables": dict(sharding="table_wise"),
    "columns": dict(sharding="column_wise", optimizer="adagrad"),
    "mixed": dict(
        sharding="row_wise", by_table={"t_candidate": "column_wise", "t_segment": "table_wise"}, optimizer="sgd"
    ),
}
HELD = {  # model, split, optimizer of the rest
    "rows": ("target", "rows", "adam"),
    "tables": ("dcn", "tables", "sgd"),
    "columns": ("mean", "columns", "muon"),
    "mixed": ("projection", "mixed", "adam"),
    "none": ("none", "tables", "adam"),
}


def job(name: str) -> RankingRunConfig:
    model, split, dense = HELD[name]
    asked: dict[str, Any] = {"optimizer": "rowwise_adagrad", **SPLITS[split]}
    if MODELS[model].history == "mean":
        asked["by_table"] = {"t_clicked": "column_wise"}
    return RankingRunConfig(
        model=MODELS[model],
        encoder=TiM4RecConfig(width=16, layers=1, head_width=8, state=8, dropout=0.0, time_dropout=0.0),
        data=RankingDataConfig(rows_per_batch=32),
        sharding=ShardingConfig(**asked),
        dense=DenseOptimizerConfig(optimizer=dense),
    )


def held_after_a_step(world: World) -> dict[str, Any]:
    """What a rank of a real group holds, by job."""
    found = {}
    for name in HELD:
        trainable = build_ranking(job(name), META, world)
        trainable.model(drawn(16))[0].backward()
        trainable.optimizer.step()
        values = trainable.model.state_dict()
        tables = {key: local_pieces(value) for key, value in values.items() if isinstance(value, ShardedTensor)}
        state = trainable.optimizer.state_dict()["state"]
        of_tables = [value for key in tables for value in state.get(f"tables.{key}", {}).values()]
        dense = {key: p for key, p in trainable.model.named_parameters() if key not in tables}
        moments = [v for key, p in dense.items() for v in state.get(f"dense.{key}", {}).values() if v.shape == p.shape]
        assert all(parameter.grad is not None for parameter in dense.values())
        found[name] = {
            "parts": {
                key.split(".")[-2]: [(*offsets, *piece.shape) for piece, offsets in pieces]
                for key, pieces in tables.items()
            },
            "weights_bytes": sum(piece.nbytes for pieces in tables.values() for piece, _ in pieces),
            "optimizer_bytes": sum(piece.nbytes for value in of_tables for piece, _ in local_pieces(value)),
            "dense_bytes": sum(2 * p.nbytes for p in dense.values()) + sum(v.nbytes for v in moments),
        }
    return found


def drawn(rows: int, seed: int = 0) -> Batch:
    found, _ = draw_clicks(replace(CLICKS, num_rows=rows, seed=seed))
    return found.batch()


@pytest.fixture(scope="module")
def held() -> list[dict[str, Any]]:
    return spawn(held_after_a_step, 2)


@pytest.mark.parametrize("name", HELD)
def test_a_real_group_holds_what_was_planned(name, held):
    asked = job(name)
    request = RankingCapacityRequest(
        meta=META,
        ranks=2,
        memory_gib=1,
        model=asked.model,
        encoder=asked.encoder,
        sharding=asked.sharding,
        dense=asked.dense,
        rows_per_batch=32,
        mean_length=4,
    )
    answer = plan_ranking_capacity(request)
    for rank, of in enumerate(held):
        planned: dict[str, list[tuple[int, ...]]] = {}
        for table in answer.tables:
            parts = [shard for shard in table.shards if shard.rank == rank]
            planned[table.name] = [(s.first_row, s.first_column, s.num_rows, s.num_columns) for s in parts]
        assert planned == of[name]["parts"]
        for kind in ("weights_bytes", "optimizer_bytes", "dense_bytes"):
            assert getattr(answer.per_rank[rank], kind) == of[name][kind], kind


KINDS: dict[str, dict[str, Any]] = {
    "auto": {},
    "rowwise": dict(optimizer="rowwise_adagrad"),
    "columns": dict(sharding="column_wise"),
    "uvm-caching": dict(compute_kernel="fused_uvm_caching", optimizer="rowwise_adagrad"),
    "machines": dict(by_table={"t_user": "table_row_wise", "t_city": "grid_shard", "t_segment": "table_wise"}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["target", "mean"])
def test_bytes_and_ms_of_tables_are_those_of_torchrec(model, kind, monkeypatch):
    request = under(replace(REQUEST, model=MODELS[model], ranks_per_machine=2), **KINDS[kind])
    assert_as_torchrec_says(lambda: plan_ranking_capacity(request), monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
def test_the_search_counts_what_the_plan_counts(kind):
    """Ranks are searched by arithmetic; on the ranks asked for, the planner has placed the tables."""
    request = under(replace(REQUEST, ranks_per_machine=2), **KINDS[kind])
    answer = plan_ranking_capacity(request)
    tables = tables_of(ranking_model(request.model, request.encoder, request.meta))
    need = ranking_capacity._RankingNeed(request, tables, answer.per_rank[0].dense_bytes, 0)
    config = need.resolved(4)
    counted = need.per_rank(config, 4, need.placed(config, 4))
    for kept in ("weights_bytes", "optimizer_bytes", "cache_bytes", "lookups_bytes", "host_bytes"):
        assert total(answer, kept) == sum(getattr(rank, kept) for rank in counted)
    assert max(rank.tables_bytes for rank in answer.per_rank) == pytest.approx(
        max(rank.tables_bytes for rank in counted), rel=0.01
    )


def test_lookups_are_counted_at_the_longest_and_activations_at_the_mean():
    short = replace(REQUEST, meta=replace(LARGE, longest={"clicked": 100, "bought": 20}))
    less, more = plan_ranking_capacity(short), plan_ranking_capacity(REQUEST)
    assert less.events_per_rank == more.events_per_rank == 2048 * (100 + 20)
    assert less.heaviest.activations_bytes == more.heaviest.activations_bytes
    events = 4 * 2048 * 300  # of all ranks, each looked up once
    assert total(more, "lookups_bytes") - total(less, "lookups_bytes") == pytest.approx(events * (8 + 4 * 64), rel=1e-6)


def test_a_target_is_looked_up_once_a_row_in_its_historys_table():
    answers = [plan_ranking_capacity(replace(REQUEST, model=MODELS[model])) for model in ("dot", "target")]
    more = total(answers[1], "lookups_bytes") - total(answers[0], "lookups_bytes")
    assert more == pytest.approx(8192 * (8 + 4 * 64), abs=8)
    assert [len(answer.tables) for answer in answers] == [6, 6]


def test_without_histories_there_are_no_events_and_none_of_their_tables():
    answer = plan_ranking_capacity(replace(REQUEST, model=MODELS["none"]))
    assert answer.events_per_rank == 0
    assert [table.name for table in answer.tables] == ["t_user", "t_shown", "t_city", "t_segment"]
    pooled = plan_ranking_capacity(replace(REQUEST, model=MODELS["mean"]))
    assert [(table.name, table.pooled) for table in pooled.tables[4:]] == [("t_clicked", True), ("t_bought", True)]


SHAPES = {
    "published": TiM4RecConfig(width=64, dropout=0.1, time_dropout=0.1),
    "preset": TiM4RecConfig(width=16, layers=1, head_width=8, state=16, dropout=0.0, time_dropout=0.0),
    "wide": replace(PRESETS["ml-1m-256d"], layers=1),
    "sasrec": SYSTEMS["sasrec"].small,
}


@pytest.mark.parametrize(
    ("model", "shape"), [*((m, "preset") for m in MODELS), *(("target", s) for s in SHAPES if s != "preset")]
)
def test_activations_are_what_a_forward_pass_saves(model, shape):
    """Within a third; what the encoder keeps hangs a little on its shape."""
    encoder, clicks = SHAPES[shape], replace(CLICKS, num_rows=48, shortest=38, longest=42)
    rows, _ = draw_clicks(clicks)
    meta = replace(clicks_meta(clicks), longest={HISTORY: 42})
    request = RankingCapacityRequest(
        meta=meta,
        ranks=1,
        memory_gib=1,
        model=MODELS[model],
        encoder=encoder,
        rows_per_batch=48,
        mean_length=len(rows.jagged[HISTORY].values) / 48,
    )
    counted = plan_ranking_capacity(request).per_rank[0].activations_bytes
    assert counted == pytest.approx(saved_bytes(request, rows.batch()), rel=0.34)
    if request.model.history != "encoder":
        assert counted == saved_bytes(request, rows.batch())


def saved_bytes(request: RankingCapacityRequest, batch: Batch) -> int:
    """What a whole forward pass on the CPU keeps, but for parameters, buffers, ids, and what is looked up."""
    model = ranking_model(request.model, request.encoder, request.meta)
    allocate_tables(model, torch.device("cpu"))
    held = [*model.parameters(), *model.buffers()]
    kept: list[torch.Tensor] = []  # the tensors too, so that no address comes twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    def looked_up(_: torch.nn.Module, __: Any, found: Any) -> None:
        held.extend([found.values()] if isinstance(found, KeyedTensor) else [of.values() for of in found.values()])

    for module in model.modules():
        if isinstance(module, EmbeddingBagCollection | EmbeddingCollection):
            torch.nn.init.normal_(next(module.parameters()))
            module.register_forward_hook(looked_up)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(batch)
    ours = {tensor.untyped_storage().data_ptr() for tensor in held}
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in kept if tensor.is_floating_point()}
    return sum(tensor.untyped_storage().nbytes() for address, tensor in storages.items() if address not in ours)


def test_more_ranks_take_no_more_of_each():
    for sharding in ({}, dict(sharding="table_wise"), dict(compute_kernel="fused_uvm")):
        answers = [plan_ranking_capacity(under(replace(REQUEST, ranks=ranks), **sharding)) for ranks in (2, 4, 8, 64)]
        for kind in ("total_bytes", "tables_bytes", "activations_bytes", "host_bytes"):
            heaviest = [max(getattr(rank, kind) for rank in answer.per_rank) for answer in answers]
            assert heaviest == sorted(heaviest, reverse=True), kind
        assert len({answer.heaviest.dense_bytes for answer in answers}) == 1


def test_the_verdict_flips_at_the_fewest_ranks_that_share_the_batch():
    request = replace(REQUEST, rows_per_batch=7200, mean_length=150, memory_gib=3)
    fewest = plan_ranking_capacity(request).fewest_ranks
    assert fewest is not None
    fewer = max(ranks for ranks in range(1, fewest) if 7200 % ranks == 0)
    assert plan_ranking_capacity(replace(request, ranks=fewest)).fits
    short = plan_ranking_capacity(replace(request, ranks=fewer))
    assert not short.fits
    assert f"needs {fewest} ranks, or batch " in short.verdict


def test_what_would_fit_is_told_and_does():
    request = replace(REQUEST, rows_per_batch=65536)
    answer = plan_ranking_capacity(request)
    assert not answer.fits
    batch = next(way for way in answer.alternatives if way.startswith("batch "))
    rows = int(batch.removeprefix("batch ").replace(",", ""))
    assert plan_ranking_capacity(replace(request, rows_per_batch=rows)).fits
    assert not plan_ranking_capacity(replace(request, rows_per_batch=2 * rows)).fits
    tables = under(replace(REQUEST, memory_gib=2, rows_per_batch=512), sharding="table_wise")
    assert "sharding auto" in plan_ranking_capacity(tables).alternatives
    assert plan_ranking_capacity(under(tables)).fits
    tiny = plan_ranking_capacity(replace(REQUEST, memory_gib=0.001, rows_per_batch=8))
    assert tiny.verdict.endswith("nor on 8 ranks")


def test_every_system_can_be_planned():
    for system in SYSTEMS.values():
        meta = replace(LARGE, longest=dict.fromkeys(LARGE.histories, system.small.length_cap or 400))
        request = replace(REQUEST, meta=meta, encoder=system.small, mean_length=10)
        assert plan_ranking_capacity(request).heaviest.activations_bytes > 0


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no-ranks": (dict(ranks=0), "ranks must be at least 1, got 0"),
    "no-memory": (dict(memory_gib=float("inf")), "memory_gib must be above 0 and finite, got inf"),
    "no-batch": (dict(rows_per_batch=0), "rows_per_batch must be at least 1, got 0"),
    "unequal-shares": (
        dict(ranks=3),
        "a multiple of the 3 ranks, so that each gets as many, got 8192; raise it to 8193",
    ),
    "more-ranks-than-rows": (dict(ranks=64, rows_per_batch=32), "multiple of the 64 ranks.* raise it to 64"),
    "empty-histories": (dict(mean_length=0.5), "mean_length must be at least 1, got 0.5"),
    "longer-than-the-longest": (dict(mean_length=500), "mean_length must be at most 400, the longest history, got 500"),
    "longest-unsaid": (dict(meta=replace(LARGE, longest={"clicked": 400})), "none or 0 for bought"),
    "longer-than-the-encoder-takes": (
        dict(encoder=SASRecConfig()),
        "at most the 200 events that the encoder takes, got 400",
    ),
    "target-unnamed": (
        dict(model=MODELS["target"], meta=replace(LARGE, targets={})),
        "model.target is for data sets that name the item shown, got large without targets",
    ),
    "no-categorical": (dict(meta=replace(LARGE, categorical={}, targets={})), "must have dense and categorical"),
    "whole-on-four": (dict(sharding=ShardingConfig(sharding="none")), "several processes must split"),
    "small-tables-by-rows": (dict(sharding=ShardingConfig(sharding="row_wise")), "t_segment with 3 rows for 4 ranks"),
    "unknown-table": (dict(sharding=ShardingConfig(by_table={"city": "row_wise"})), "t_shown, t_user\), got city"),
    "machines-of-histories": (
        dict(sharding=ShardingConfig(by_table={"t_clicked": "table_row_wise"})),
        "table_row_wise is for pooled tables, got t_clicked",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_request_that_means_nothing_is_refused(name):
    fields, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        plan_ranking_capacity(replace(REQUEST, **fields))


def test_a_cap_is_of_those_who_read_histories():
    mean = replace(REQUEST, encoder=SASRecConfig(), model=MODELS["mean"])
    assert plan_ranking_capacity(mean).fits


WORDS = ["plan", "--preset", "dlrm", "--ranks", "8", "--memory-gib", "80", "--encoder.width", "64", "--batch", "65536"]
FEATURES = [
    "--categorical",
    "user",
    "100000000",
    "shown",
    "10000000",
    "city",
    "5",
    "--histories",
    "clicked",
    "10000000",
]


def test_the_command_prints_tables_bytes_and_a_verdict(capsys):
    words = ["--mean-length", "200", "--longest", "1000", "--model.target", "--targets", "clicked", "shown"]
    assert main([*WORDS, *FEATURES, *words, "--by-table", "t_user", "table_row_wise"]) == 0
    shown = capsys.readouterr().out
    assert "t_user: 100,000,000 rows x 64, table_row_wise fused, rowwise_adagrad; up to 12,500,000 rows x 64" in shown
    assert "t_city: 5 rows x 64, table_wise fused, rowwise_adagrad; on rank 0" in shown
    assert "a rank's batch: 8,192 rows, 1,638,400 events" in shown
    assert "loss" not in shown
    assert "TorchRec's estimate for its default hardware" in shown
    assert shown.splitlines()[-1].startswith("fits, ")


KEYS = {
    *("fits", "verdict", "memory_bytes", "fewest_ranks", "alternatives", "optimizer", "compute_kernel", "step_ms"),
    *("rows_per_rank", "events_per_rank", "tables", "per_rank", "heaviest_rank"),
}


def test_the_command_prints_json(capsys):
    assert main([*WORDS, *FEATURES, "--model.interaction", "dcn", "--model.history", "mean", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == KEYS
    assert (found["rows_per_rank"], found["events_per_rank"]) == (8192, 8192 * 50)
    assert [table["pooled"] for table in found["tables"]] == [True] * 4
    assert found["per_rank"][0]["loss_bytes"] == 0


def test_a_data_set_says_its_features(tmp_path: Path, capsys):
    generate_clicks(CLICKS, tmp_path / "clicks")
    words = ["plan", "--preset", "dlrm", "--ranks", "1", "--memory-gib", "1", "--model.target", "--json"]
    assert main([*words, "--data", str(tmp_path / "clicks")]) == 0
    of_data = json.loads(capsys.readouterr().out)
    longest = RankingMeta.read(tmp_path / "clicks").longest[HISTORY]
    options = ["--categorical", "segment", "6", "candidate", "200", "--histories", HISTORY, "200", "--longest"]
    options += [str(longest), "--targets", HISTORY, "candidate", "--dense-features", "4", "--mean-length", str(longest)]
    assert main([*words, *options]) == 0
    assert json.loads(capsys.readouterr().out) == of_data


def test_a_plain_dlrm_needs_no_histories_named(capsys):
    words = ["plan", "--preset", "dlrm-plain", "--ranks", "2", "--memory-gib", "8", "--categorical", "user", "1000000"]
    assert main(words) == 0
    assert "a rank's batch: 256 rows, 0 events" in capsys.readouterr().out


COMPLAINTS = {
    "no-features": ([], "--categorical must name the features that a DLRM crosses, got none"),
    "no-histories": (["--categorical", "user", "9"], "must have at least one history, got none"),
    "empty-table": (["--categorical", "user", "0", "--histories", "clicked", "9"], "user must draw from at least 1 id"),
    "target-unnamed": ([*FEATURES, "--model.target"], "--targets must name the item shown where --model.target reads"),
    "target-unread": ([*FEATURES, "--targets", "clicked", "shown"], "{'clicked': 'shown'} with False; give both"),
    "target-of-other-ids": (
        [*FEATURES, "--model.target", "--targets", "clicked", "city"],
        "city, the target of clicked, must draw from its 10000000 ids, got 5",
    ),
    "both": ([*FEATURES, "--data", "x"], "by --data or by options, got both: --categorical, --histories; drop one"),
    "no-length": ([*FEATURES, "--mean-length", "0"], "mean_length must be at least 1, got 0"),
    "unequal-shares": ([*FEATURES, "--batch", "100"], "rows_per_batch must be a multiple of the 8 ranks"),
}


@pytest.mark.parametrize("name", COMPLAINTS)
def test_the_command_refuses_with_status_2(name, capsys):
    words, message = COMPLAINTS[name]
    assert main([*WORDS, *words]) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("ssd-torchrec plan: ConfigError: ")
    assert message in complaint


def test_answers_are_json_with_stable_keys():
    answer = plan_ranking_capacity(REQUEST)
    found = json.loads(json.dumps(figures(answer)))
    assert set(found) == KEYS
    assert found["per_rank"][3]["total_bytes"] == answer.per_rank[3].total_bytes <= 16 * GIB
