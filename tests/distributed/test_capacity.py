"""What is said of GPUs that are not there: held against TorchRec's own numbers, against arithmetic, and measured."""

import json
from dataclasses import replace
from math import ceil

import pytest
import torch

from ssd_torchrec.__main__ import main
from ssd_torchrec.data.objective import ObjectiveConfig
from ssd_torchrec.distributed import capacity, fit
from ssd_torchrec.distributed.capacity import SAVED_FLOATS, Capacity, CapacityRequest, plan_capacity
from ssd_torchrec.distributed.fit import GIB, MOST_RANKS, USABLE_MEMORY, figures
from ssd_torchrec.distributed.plan import ShardingConfig
from ssd_torchrec.distributed.vocab_parallel import QUERIES_PER_BLOCK, ROWS_PER_CHUNK
from ssd_torchrec.encoders.registry import SYSTEMS, name_of
from ssd_torchrec.encoders.sasrec import SASRecConfig
from ssd_torchrec.encoders.tim4rec import PRESETS
from ssd_torchrec.errors import ConfigError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.ops.item_softmax_triton import WIDEST
from tests.distributed.planned import assert_as_torchrec_says

BILLION = CapacityRequest(items=10**9, ranks=64, memory_gib=80)
SMALL = CapacityRequest(items=2_000_000, ranks=4, memory_gib=16)
SAMPLED = ObjectiveConfig(loss="sampled_softmax", num_negatives=8192)
STATE = {"sgd": 0, "adagrad": 64, "rowwise_adagrad": 1, "adam": 128}  # numbers a row of a table 64 wide


def under(request: CapacityRequest, **sharding) -> CapacityRequest:
    return replace(request, sharding=ShardingConfig(**sharding))


def total(answer: Capacity, name: str) -> int:
    return sum(getattr(rank, name) for rank in answer.per_rank)


@pytest.mark.parametrize("optimizer", STATE)
def test_tables_take_their_rows_in_weights_and_state(optimizer):
    answer = plan_capacity(under(SMALL, optimizer=optimizer))
    (table,) = answer.tables
    assert table.num_rows == 2_000_000 + 17
    assert total(answer, "weights_bytes") == pytest.approx(table.num_rows * 64 * 4, rel=0.01)
    assert total(answer, "optimizer_bytes") == pytest.approx(table.num_rows * STATE[optimizer] * 4, rel=0.01)
    assert total(answer, "gradient_bytes") == 0


@pytest.mark.parametrize("sharding", ["row_wise", "table_wise", "column_wise"])
def test_the_parts_make_up_the_table_and_lie_on_its_ranks(sharding):
    (table,) = plan_capacity(under(SMALL, sharding=sharding)).tables
    assert sum(shard.num_rows * shard.num_columns for shard in table.shards) == table.num_rows * table.width
    assert [shard.rank for shard in table.shards] == list(range(1 if sharding == "table_wise" else 4))
    assert {(s.first_row, s.first_column) for s in table.shards} == {
        "row_wise": {(rank * 500_005, 0) for rank in range(4)},
        "table_wise": {(0, 0)},
        "column_wise": {(0, rank * 16) for rank in range(4)},
    }[sharding]


KINDS = {
    "rows": {},
    "rows-rowwise": dict(optimizer="rowwise_adagrad"),
    "columns": dict(sharding="column_wise"),
    "tables": dict(sharding="table_wise"),
    "uvm": dict(compute_kernel="fused_uvm"),
    "uvm-caching": dict(compute_kernel="fused_uvm_caching", optimizer="rowwise_adagrad"),
}


OF_MACHINES = {  # of the table city
    "table-rows": dict(by_table={"city": "table_row_wise"}),
    "grid": dict(by_table={"city": "grid_shard"}),
}


@pytest.mark.parametrize("kind", OF_MACHINES)
def test_bags_over_machines_take_what_torchrec_says(kind, monkeypatch):
    request = replace(SMALL, ranks=8, ranks_per_machine=4, context={"segment": 30, "city": 50_000})
    request = under(request, **OF_MACHINES[kind])
    assert_as_torchrec_says(lambda: plan_capacity(request), monkeypatch)
    answer = plan_capacity(request)
    city = next(table for table in answer.tables if table.name == "city")
    assert {(s.rank, s.first_row, s.first_column) for s in city.shards} == {
        "table-rows": {(part, part * 12_500, 0) for part in range(4)},
        "grid": {(4 * half + part, part * 12_500, 32 * half) for half in range(2) for part in range(4)},
    }[kind]


def test_the_command_plans_bags_over_machines(capsys):
    words = ["plan", "--items", "1000000", "--ranks", "16", "--memory-gib", "16", "--context", "city", "50000"]
    assert main([*words, "--by-table", "city", "grid_shard"]) == 0
    printed = capsys.readouterr().out
    assert "city: 50,000 rows x 64, grid_shard fused, adam; up to 6,250 rows x 32 on each of ranks 0-15" in printed
    assert main([*words, "--by-table", "item", "grid_shard"]) == 2
    assert "grid_shard is for pooled tables, got item" in capsys.readouterr().err


def test_the_command_plans_event_columns_with_an_id_an_event(capsys):
    words = ["plan", "--items", "1000000", "--ranks", "4", "--memory-gib", "16", "--json"]
    words += ["--mean-length", "20", "--batch", "4096"]
    found = []
    for columns in ([], ["--event-columns", "category", "50000"]):
        assert main([*words, *columns]) == 0
        found.append(json.loads(capsys.readouterr().out))
    without, told = found
    (category,) = (table for table in told["tables"] if table["name"] == "category")
    assert (category["num_rows"], category["sharding"], category["pooled"]) == (50_000, "row_wise", False)
    weights, lookups = (sum(rank[f"{of}_bytes"] for rank in told["per_rank"]) for of in ("weights", "lookups"))
    assert weights - sum(rank["weights_bytes"] for rank in without["per_rank"]) == 50_000 * 64 * 4
    events = 4 * round(4096 / 20 / 4) * 20
    more = lookups - sum(rank["lookups_bytes"] for rank in without["per_rank"])
    assert more == pytest.approx(events * (8 + 4 * 64), rel=1e-3)
    assert main([*words, "--event-columns", "candidate", "5"]) == 2
    assert "event_columns must be named other than the items, got candidate" in capsys.readouterr().err


def test_machines_are_asked_for_whole():
    city = {"city": 80_000_000}  # x 64 x 12 bytes: 57.2 GiB on the ranks of one machine
    request = replace(SMALL, context=city, ranks=8, ranks_per_machine=4, memory_gib=20)
    rows, grid = ({"city": split} for split in ("table_row_wise", "grid_shard"))
    assert plan_capacity(under(request, by_table=rows)).fewest_ranks == 4
    assert plan_capacity(under(replace(request, memory_gib=10), by_table=rows)).fewest_ranks is None
    assert plan_capacity(under(replace(request, memory_gib=10), by_table=grid)).fewest_ranks == 8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "further",
    [{}, {"context": {"segment": 3, "city": 5_000}}, {"event_columns": {"action": 30, "category": 20_000}}],
    ids=["items-alone", "with-context", "with-event-columns"],
)
def test_bytes_and_ms_of_tables_are_those_of_torchrec(kind, further, monkeypatch):
    request = under(replace(SMALL, objective=SAMPLED, **further), **KINDS[kind])
    assert_as_torchrec_says(lambda: plan_capacity(request), monkeypatch)


def test_the_search_counts_what_the_plan_counts():
    """Ranks are searched by arithmetic; on the ranks asked for, the planner has placed the tables."""
    for sharding in ("row_wise", "column_wise", "table_wise"):
        answer = plan_capacity(under(SMALL, sharding=sharding))
        need = capacity._NextItemNeed(under(SMALL, sharding=sharding), *_parts_of(SMALL))
        config = need.resolved(SMALL.ranks)
        counted = need.per_rank(config, SMALL.ranks, need.placed(config, SMALL.ranks))
        assert [replace(rank, step_ms=None) for rank in answer.per_rank] == counted


def _parts_of(request: CapacityRequest):
    from ssd_torchrec.distributed.tables import tables_of
    from ssd_torchrec.models.next_item import NextItemModel, TablesConfig

    tables = TablesConfig(num_item_rows=17 + request.items, first_item=17)
    model = NextItemModel(tables, request.encoder.build(), table_device="meta")
    return tables_of(model), fit.dense_bytes(model, request.dense)


def test_a_billion_items_fit_64_gpus_under_adam_and_under_rowwise_adagrad():
    for optimizer in ("adam", "rowwise_adagrad"):
        answer = plan_capacity(under(BILLION, optimizer=optimizer))
        bytes_a_row = 4 * (64 + STATE[optimizer])
        assert answer.fits
        assert answer.heaviest.tables_bytes == pytest.approx(ceil(10**9 / 64) * bytes_a_row, rel=0.01)
        assert answer.fewest_ranks == pytest.approx(10**9 * bytes_a_row / (0.85 * 80 * GIB), abs=1)
        assert answer.verdict.startswith("fits, ")


def test_a_billion_items_under_adam_do_not_fit_8_gpus_and_rowwise_adagrad_would():
    answer = plan_capacity(under(replace(BILLION, ranks=8), optimizer="adam"))
    assert not answer.fits
    assert answer.fewest_ranks == 11
    assert "rowwise_adagrad" in answer.alternatives
    assert answer.verdict.startswith("does not fit, 112 % of 80 GiB: needs 11 ranks, or ")
    assert plan_capacity(under(replace(BILLION, ranks=8), optimizer="rowwise_adagrad")).fits


def test_the_verdict_flips_at_the_fewest_ranks():
    for request in (BILLION, replace(BILLION, items=3 * 10**7, memory_gib=4), under(BILLION, optimizer="sgd")):
        fewest = plan_capacity(request).fewest_ranks
        assert fewest is not None
        assert plan_capacity(replace(request, ranks=fewest)).fits
        assert not plan_capacity(replace(request, ranks=fewest - 1)).fits


def test_memory_of_a_gpu_flips_the_verdict_where_training_would_refuse():
    """Its planner leaves tables 85 % of a GPU; here each rank has 12.5 million rows of 768 bytes under Adam."""
    request = replace(SMALL, items=50_000_000)
    tables_gib = 12_500_000 * 768 / GIB
    assert plan_capacity(replace(request, memory_gib=tables_gib / 0.84)).fits
    answer = plan_capacity(replace(request, memory_gib=tables_gib / 0.86))
    assert not answer.fits
    assert answer.heaviest.total_bytes < USABLE_MEMORY * answer.memory_bytes
    assert "of which tables would take more than the 85 % that training gives them: needs 5 ranks" in answer.verdict


def test_a_table_of_one_rank_gains_nothing_from_more_ranks():
    answer = plan_capacity(under(replace(BILLION, objective=SAMPLED), sharding="table_wise", optimizer="sgd"))
    assert (answer.fits, answer.fewest_ranks) == (False, None)
    assert {"row_wise", "fused_uvm"} < set(answer.alternatives)
    assert f"{MOST_RANKS}" not in answer.verdict


def test_host_memory_is_told_and_judged_if_given():
    request = under(replace(BILLION, ranks=16, objective=SAMPLED), compute_kernel="fused_uvm", optimizer="adam")
    answer = plan_capacity(request)
    assert answer.fits
    assert "if each machine gives tables 357.6 GiB" in answer.verdict  # half of 10**9 rows of 768 bytes
    assert answer.heaviest.weights_bytes == 0
    assert plan_capacity(replace(request, host_memory_gib=500)).fits
    short = plan_capacity(replace(request, host_memory_gib=400))  # of which tables get 85 %
    assert not short.fits
    assert "357.6 of a machine's 400" in short.verdict


def test_one_process_keeps_a_table_whole_with_its_gradient():
    answer = plan_capacity(replace(SMALL, ranks=1, objective=SAMPLED))
    (rank,) = answer.per_rank
    assert answer.tables[0].sharding == "none"
    assert rank.gradient_bytes == rank.weights_bytes == 4 * 64 * 2_000_017
    assert rank.optimizer_bytes == 2 * rank.weights_bytes
    assert (answer.step_ms, answer.compute_kernel) == (None, "")


def test_a_small_catalogue_is_listed_and_a_large_one_scored_in_place():
    large, small = plan_capacity(SMALL), plan_capacity(replace(SMALL, items=50_000))
    assert (large.scored_in_place, large.candidates_per_rank) == (True, 0)
    assert (small.scored_in_place, small.candidates_per_rank) == (False, 50_000)
    assert small.heaviest.loss_bytes > 2 * 4 * 64 * 50_000


@pytest.mark.parametrize(("width", "held"), [(WIDEST, 0), (2 * WIDEST, QUERIES_PER_BLOCK["cuda"])])
def test_scores_in_place_are_held_only_where_rows_are_wider_than_a_tile(width, held):
    rows = ROWS_PER_CHUNK["cuda"]
    answer = plan_capacity(replace(SMALL, encoder=replace(SMALL.encoder, width=width), memory_gib=800))
    of_a_row = answer.heaviest.loss_bytes // (4 * rows) - 3 * width
    assert answer.scored_in_place
    assert held <= of_a_row < held + 2 * width


def test_sampled_candidates_are_draws_and_own_targets():
    answer = plan_capacity(replace(SMALL, objective=SAMPLED))
    assert answer.candidates_per_rank == 8192 + 1024
    assert answer.heaviest.loss_bytes == 2 * 4 * 64 * (1024 + 8192 + 1024)


KEYS = {
    *("fits", "verdict", "memory_bytes", "fewest_ranks", "alternatives", "optimizer", "compute_kernel", "step_ms"),
    *("scored_in_place", "events_per_rank", "candidates_per_rank", "tables", "per_rank", "heaviest_rank"),
}
KEYS_OF_RANK = {
    *("rank", "step_ms", "weights_bytes", "optimizer_bytes", "gradient_bytes", "cache_bytes", "lookups_bytes"),
    *("activations_bytes", "dense_bytes", "loss_bytes", "host_bytes", "tables_bytes", "total_bytes"),
}


def test_answers_are_json_with_stable_keys():
    answer = plan_capacity(replace(SMALL, context={"segment": 3}))
    found = json.loads(json.dumps(figures(answer)))
    assert set(found) == KEYS
    assert set(found["per_rank"][0]) == KEYS_OF_RANK
    assert found["per_rank"][3]["total_bytes"] == answer.per_rank[3].total_bytes
    assert [shard["first_row"] for shard in found["tables"][0]["shards"]] == [0, 500_005, 1_000_010, 1_500_015]


REFUSED = {
    "no-items": (dict(items=0), "items must be at least 1, got 0"),
    "no-ranks": (dict(ranks=0), "ranks must be at least 1, got 0"),
    "too-many-ranks": (dict(ranks=5000), "ranks must be at most 4096, got 5000"),
    "no-memory": (dict(memory_gib=0), "memory_gib must be above 0 and finite, got 0"),
    "memory-is-no-number": (dict(memory_gib=float("nan")), "memory_gib must be above 0"),
    "negative-host": (dict(host_memory_gib=-1), "host_memory_gib must be above 0"),
    "context-of-items": (dict(context={"item": 5}), "context must be named other than the items, got item"),
    "empty-context": (dict(context={"segment": 0}), "context features must have at least 1 id"),
    "no-batch": (dict(tokens_per_batch=0), "tokens_per_batch must be at least 1"),
    "empty-histories": (dict(mean_length=0.5), "mean_length must be at least 1, got 0.5"),
    "endless-histories": (dict(mean_length=float("inf")), "mean_length must be at most as many"),
    "longer-than-the-encoder-takes": (
        dict(mean_length=900, encoder=SASRecConfig()),
        "mean_length must be at most 200, got 900",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_request_that_means_nothing_is_refused(name):
    fields, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        plan_capacity(replace(SMALL, **fields))


UNFIT = {
    "more-ranks-than-rows": (dict(items=10, ranks=64), dict(sharding="row_wise"), "27 rows for 64 ranks"),
    "odd-columns": (dict(ranks=3), dict(sharding="column_wise"), "column_wise must cut the width"),
    "whole-on-two": (dict(ranks=2), dict(sharding="none"), "several processes must split"),
    "whole-in-host-memory": (dict(ranks=1), dict(compute_kernel="fused_uvm"), "is for split tables"),
    "in-place-by-columns": (
        dict(objective=ObjectiveConfig(scored="in_place")),
        dict(sharding="column_wise"),
        "scored in place must be split row_wise",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_split_that_cannot_be_is_refused(name):
    fields, sharding, message = UNFIT[name]
    with pytest.raises(ConfigError, match=message):
        plan_capacity(under(replace(SMALL, **fields), **sharding))


def saved_floats(config, lengths: list[int]) -> float:
    """Numbers that `forward` keeps for backward, for each event, channel and layer."""
    encoder = config.build()
    layout = JaggedLayout.from_lengths(lengths)
    events = torch.randn(layout.num_events, config.width, requires_grad=True)
    ours = {tensor.untyped_storage().data_ptr() for tensor in (events, *encoder.parameters())}
    kept = {}  # the tensors too, so that no address comes twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in ours:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        encoder(events, 3600 * layout.position, layout)
    saved = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 4
    return saved / (layout.num_events * config.width * getattr(config, "layers", 1))


@pytest.mark.parametrize("system", SYSTEMS)
def test_what_an_encoder_saves_is_what_is_written_down(system):
    config = SYSTEMS[system].small
    mean = min(50, config.length_cap - 10) if config.length_cap else 50
    lengths = [mean - 10 + 20 * row // 15 for row in range(16)]
    assert name_of(config) == system
    assert saved_floats(config, lengths) == pytest.approx(SAVED_FLOATS[system], rel=0.25)


@pytest.mark.parametrize("lengths", [[50] * 16, [9] * 90, [1000, 200]], ids=["fifty", "short", "long"])
@pytest.mark.parametrize("preset", ["ml-1m-64d", "ml-1m-256d"])
def test_what_tim4rec_saves_does_not_hang_on_lengths_or_width(preset, lengths):
    assert saved_floats(PRESETS[preset], lengths) == pytest.approx(SAVED_FLOATS["tim4rec"], rel=0.25)


def test_every_system_can_be_planned():
    for system in SYSTEMS.values():
        request = replace(SMALL, encoder=system.small, mean_length=min(20, system.small.length_cap or 20))
        assert plan_capacity(request).heaviest.activations_bytes > 0


WORDS = ["plan", "--items", "1000000000", "--ranks", "8", "--memory-gib", "80"]


def test_the_command_prints_tables_bytes_and_a_verdict(capsys):
    assert main([*WORDS, "--optimizer", "rowwise_adagrad"]) == 0
    shown = capsys.readouterr().out
    assert "item: 1,000,000,017 rows x 64, row_wise fused, rowwise_adagrad; up to 125,000,003 rows x 64" in shown
    assert "weights                   29.802" in shown
    assert "TorchRec's estimate for its default hardware" in shown
    assert shown.splitlines()[-1].startswith("fits, 38 % of 80 GiB")


def test_the_command_prints_json(capsys):
    options = ["--loss", "sampled_softmax", "--negatives", "8192", "--width", "128", "--batch", "8192"]
    assert main([*WORDS, *options, "--optimizer", "adam", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["fits"], found["events_per_rank"], found["candidates_per_rank"]) == (False, 1024, 9216)
    assert (found["tables"][0]["width"], found["optimizer"]) == (128, "adam")


def test_a_preset_decides_what_is_not_said(capsys):
    assert main([*WORDS, "--preset", "tim4rec-ml-1m-256d", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["tables"][0]["width"], found["events_per_rank"]) == (256, 512)


COMPLAINTS = {
    "unknown-preset": (
        ["--preset", "tim5rec"],
        "--preset must be a preset of `ssd-torchrec train --help`, got 'tim5rec'",
    ),
    "no-ranks": (["--ranks", "0"], "ranks must be at least 1, got 0"),
    "no-memory": (["--memory-gib", "-1"], "memory_gib must be above 0 and finite, got -1"),
    "no-items": (["--items", "0"], "items must be at least 1, got 0"),
    "rows-for-fewer": (["--items", "2", "--ranks", "50", "--sharding", "row_wise"], "19 rows for 50 ranks"),
    "negatives-of-softmax": (["--negatives", "99"], "negatives are drawn for sampled_softmax only"),
    "dense-kernel": (["--compute-kernel", "dense"], "compute_kernel must be a fused one"),
}


@pytest.mark.parametrize("name", COMPLAINTS)
def test_the_command_refuses_with_status_2(name, capsys):
    words, message = COMPLAINTS[name]
    assert main([*WORDS, *words]) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("ssd-torchrec plan: ConfigError: ")
    assert message in complaint
