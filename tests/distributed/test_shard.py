"""Split equals whole: the same start, losses and weights at any world size and under any split."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ssd_torchrec.distributed import plan
from ssd_torchrec.distributed.process import World
from ssd_torchrec.distributed.shard import DenseOptimizerConfig, ShardingConfig, shard
from ssd_torchrec.errors import ConfigError
from tests.distributed.example import SEED, SGD, batch, model, train, trainable, whole_weights
from tests.distributed.world import spawn

STEPS = range(20)
CLOSE = 1e-6
RATE = 0.02
"""Of row-wise Adagrad: at its default of 0.05 the 20 steps multiply one rounding of the gradients by five."""
TABLE = "items.embeddings.item.weight"

SPLITS = {
    "row_wise": ShardingConfig(sharding="row_wise", optimizer="sgd", learning_rate=0.05),
    "row_wise-bags-too": ShardingConfig(
        sharding="row_wise", by_table={"segment": "row_wise"}, optimizer="sgd", learning_rate=0.05
    ),
    "table_row_wise-bags": ShardingConfig(
        sharding="row_wise", by_table={"segment": "table_row_wise"}, optimizer="sgd", learning_rate=0.05
    ),
    "grid_shard-bags": ShardingConfig(
        sharding="row_wise", by_table={"segment": "grid_shard"}, optimizer="sgd", learning_rate=0.05
    ),
    "table_wise": ShardingConfig(sharding="table_wise", optimizer="sgd", learning_rate=0.05),
    "column_wise": ShardingConfig(sharding="column_wise", optimizer="sgd", learning_rate=0.05),
    "column_wise-adagrad": ShardingConfig(sharding="column_wise", optimizer="adagrad"),
    "row_wise-adagrad": ShardingConfig(sharding="row_wise", optimizer="adagrad", learning_rate=RATE),
    "row_wise-rowwise_adagrad": ShardingConfig(sharding="row_wise", optimizer="rowwise_adagrad", learning_rate=RATE),
    "table_wise-adagrad": ShardingConfig(sharding="table_wise", optimizer="adagrad", learning_rate=RATE),
    "table_wise-rowwise_adagrad": ShardingConfig(
        sharding="table_wise", optimizer="rowwise_adagrad", learning_rate=RATE
    ),
}
WITH_COLUMNS = {
    "row_wise": SPLITS["row_wise"],
    "items-alone-row_wise": ShardingConfig(
        sharding="row_wise", by_table={"action": "table_wise"}, optimizer="sgd", learning_rate=0.05
    ),
    "columns-alone-row_wise": ShardingConfig(
        sharding="table_wise", by_table={"action": "row_wise"}, optimizer="sgd", learning_rate=0.05
    ),
    "table_wise": SPLITS["table_wise"],
    "column_wise": SPLITS["column_wise"],
    "row_wise-adagrad": SPLITS["row_wise-adagrad"],
    "row_wise-rowwise_adagrad": SPLITS["row_wise-rowwise_adagrad"],
}
"""Of models with event columns."""
ACTION = "event_columns.embeddings.action.weight"

OF_THREE = [name for name in SPLITS if not name.startswith("column_wise")]
"""Splits of three ranks: the example's 16 channels are not cut into 3 parts of a multiple of 4."""


def run(
    world: World, sharding: ShardingConfig, *, equal_rows: bool = False, event_columns: bool = False
) -> dict[str, Any]:
    t = trainable(world, sharding, SGD, event_columns=event_columns)
    start = whole_weights(t)
    losses = train(t, world, STEPS, equal_rows=equal_rows, event_columns=event_columns)
    return {"start": start, "losses": losses, "end": whole_weights(t), "plan": t.plan, "sharding": t.sharding}


def run_all(world: World) -> dict[str, dict[str, Any]]:
    told = {f"told-{name}": run(world, split, event_columns=True) for name, split in WITH_COLUMNS.items()}
    return run_splits(world, list(SPLITS)) | told | {"auto": run(world, ShardingConfig(learning_rate=RATE))}


def run_splits(world: World, names: list[str]) -> dict[str, dict[str, Any]]:
    return {name: run(world, SPLITS[name], equal_rows="bags" in name) for name in names}


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, dict[str, Any]]]:
    return spawn(run_all, 2, anew=True)


@pytest.fixture(scope="module")
def whole() -> dict[str, dict[str, Any]]:
    """The same trainings in one process with whole tables."""
    runs = {}
    every = [(split, False) for split in SPLITS.values()] + [(split, True) for split in WITH_COLUMNS.values()]
    for config, told in every:
        if update_of(config, told) not in runs:
            of_one = ShardingConfig(
                sharding="none", optimizer=config.optimizer, learning_rate=config.learning_rate, eps=config.eps
            )
            runs[update_of(config, told)] = run(World(), of_one, event_columns=told)
    return runs


def update_of(config: ShardingConfig, event_columns: bool = False) -> str:
    """What the splits of one name have in common: what they do to a table, and whether events have columns."""
    return f"{config.optimizer} at {config.learning_rate}" + ", told" * event_columns


def furthest(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).abs().max().item() for name in left)


def assert_same_run(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert furthest(got["start"], expected["start"]) == 0
    assert got["losses"] == pytest.approx(expected["losses"], abs=CLOSE)
    assert furthest(got["end"], expected["end"]) <= CLOSE


@pytest.mark.parametrize("split", SPLITS)
def test_two_ranks_train_as_one_process_does(split, two_ranks, whole):
    for ranks_view in two_ranks:
        assert_same_run(ranks_view[split], whole[update_of(SPLITS[split])])


@pytest.mark.parametrize("split", WITH_COLUMNS)
def test_two_ranks_train_event_columns_as_one_process_does(split, two_ranks, whole):
    for ranks_view in two_ranks:
        got = ranks_view[f"told-{split}"]
        assert_same_run(got, whole[update_of(WITH_COLUMNS[split], True)])
        assert not got["start"][ACTION].any()
        assert got["end"][ACTION].abs().max() > 1000 * CLOSE
        named = {name: place.split()[0] for name, place in got["plan"].items()}
        assert named["action"] == WITH_COLUMNS[split].by_table.get("action", WITH_COLUMNS[split].sharding)


@pytest.mark.slow
def test_three_ranks_train_as_one_process_does(whole):
    for ranks_view in spawn(run_splits, 3, OF_THREE):
        for split in OF_THREE:
            assert_same_run(ranks_view[split], whole[update_of(SPLITS[split])])


@pytest.mark.parametrize("split", SPLITS)
def test_one_rank_with_a_group_trains_as_one_process_does(split, group_of_one, whole):
    assert_same_run(run(group_of_one, SPLITS[split]), whole[update_of(SPLITS[split])])


def test_training_moves_the_weights_far_more_than_the_tolerance(whole):
    for of_one in whole.values():
        assert furthest(of_one["start"], of_one["end"]) > 1000 * CLOSE
        assert of_one["losses"][0] - of_one["losses"][-1] > 1000 * CLOSE


def test_the_plan_tells_who_holds_what(two_ranks):
    runs = two_ranks[0]
    assert runs["row_wise-bags-too"]["plan"] == {
        "item": "row_wise fused on rank 0, 1",
        "segment": "row_wise fused on rank 0, 1",
    }
    assert runs["column_wise"]["plan"]["item"] == "column_wise fused on rank 0, 1"
    one_each = sorted(runs["table_wise"]["plan"].values())
    assert one_each == ["table_wise fused on rank 0", "table_wise fused on rank 1"]


def test_auto_on_two_ranks_is_resolved_and_trains(two_ranks):
    auto = two_ranks[0]["auto"]
    assert (auto["sharding"].sharding, auto["sharding"].optimizer) == ("row_wise", "rowwise_adagrad")
    assert auto["plan"]["segment"].startswith("table_wise")
    assert auto["losses"] == pytest.approx(two_ranks[0]["row_wise-rowwise_adagrad"]["losses"], abs=CLOSE)


def test_unsplit_tables_train_with_the_papers_adam(alone):
    t = trainable(alone, ShardingConfig(), DenseOptimizerConfig())
    expected = model(alone)
    expected.load_state_dict(whole_weights(t), assign=True)
    adam = torch.optim.Adam(expected.parameters(), lr=1e-3)
    for step in range(3):
        adam.zero_grad()
        expected(batch(step, alone))[0].backward()
        adam.step()
    train(t, alone, range(3))
    assert furthest(whole_weights(t), dict(expected.state_dict())) <= CLOSE


def test_the_module_is_reached_under_its_wrappers(group_of_one):
    t = trainable(group_of_one, ShardingConfig(sharding="row_wise"))
    assert t.module is not t.model
    assert t.module.tables.num_items == 45


def test_splitting_without_a_group_is_refused(alone):
    with pytest.raises(ConfigError, match="there is none; start the run with torchrun"):
        shard(model(alone), ShardingConfig(sharding="row_wise"), SGD, alone, seed=SEED)


def test_tables_that_do_not_fit_the_memory_are_refused(group_of_one, monkeypatch):
    monkeypatch.setattr(plan, "RESERVED_MEMORY", 1 - 1e-9)
    with pytest.raises(ConfigError, match="must fit the memory of 1 ranks"):
        trainable(group_of_one, ShardingConfig(sharding="row_wise"))
