from dataclasses import replace

import pytest
import torch
from torchrec import EmbeddingBagConfig, EmbeddingConfig, PoolingType

from ssd_torchrec.distributed.plan import LEARNING_RATE, ShardingConfig, resolve
from ssd_torchrec.errors import ConfigError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TABLES = {
    "items.embeddings.item.weight": EmbeddingConfig(
        name="item", num_embeddings=100, embedding_dim=16, feature_names=["item", "candidate"]
    ),
    "contexts.embedding_bags.segment.weight": EmbeddingBagConfig(
        name="segment", num_embeddings=5, embedding_dim=16, feature_names=["segment"]
    ),
}


def test_one_process_keeps_tables_whole_under_the_papers_optimizer():
    resolved = resolve(ShardingConfig(), TABLES, 1, CPU)
    assert (resolved.sharding, resolved.optimizer, resolved.learning_rate, resolved.split) == (
        "none",
        "adam",
        1e-3,
        False,
    )


def test_two_processes_on_cpu_split_events_by_rows_and_leave_bags_whole():
    resolved = resolve(ShardingConfig(), TABLES, 2, CPU)
    assert resolved.by_table == {"item": "row_wise", "segment": "table_wise"}
    assert (resolved.optimizer, resolved.learning_rate) == ("rowwise_adagrad", LEARNING_RATE["rowwise_adagrad"])


def test_gpus_split_all_by_rows_under_adam():
    resolved = resolve(ShardingConfig(), TABLES, 2, CUDA)
    assert resolved.by_table == {"item": "row_wise", "segment": "row_wise"}
    assert resolved.optimizer == "adam"


def test_auto_leaves_a_table_with_too_few_rows_on_one_rank():
    assert resolve(ShardingConfig(), TABLES, 4, CUDA).by_table["segment"] == "table_wise"  # 2, 2, 1 and none


def test_by_table_overrides_the_split():
    config = ShardingConfig(sharding="row_wise", by_table={"segment": "row_wise", "item": "table_wise"})
    assert resolve(config, TABLES, 2, CPU).by_table == {"item": "table_wise", "segment": "row_wise"}


def test_split_by_columns_auto_takes_adagrad_on_cpu():
    assert resolve(ShardingConfig(sharding="column_wise"), TABLES, 2, CPU).optimizer == "adagrad"


def test_resolving_twice_changes_nothing():
    for world_size in (1, 2):
        resolved = resolve(ShardingConfig(), TABLES, world_size, CPU)
        assert resolve(resolved, TABLES, world_size, CPU) == resolved


REFUSED = {
    "data_parallel": (dict(sharding="data_parallel"), "got data_parallel: TorchRec would look"),
    "data_parallel-table": (dict(by_table={"item": "data_parallel"}), "got data_parallel"),
    "dense-kernel": (dict(compute_kernel="dense"), "got dense: on CPU it pools"),
    "columns-and-rowwise": (dict(sharding="column_wise", optimizer="rowwise_adagrad"), "cannot be resharded"),
    "column-and-rowwise": (dict(by_table={"item": "column_wise"}, optimizer="rowwise_adagrad"), "cannot be resharded"),
    "whole-and-by-table": (dict(sharding="none", by_table={"item": "row_wise"}), "drop one of the two"),
    "grid-and-rowwise": (dict(by_table={"item": "grid_shard"}, optimizer="rowwise_adagrad"), "cannot be resharded"),
    "no-learning-rate": (dict(learning_rate=0.0), "learning_rate must be above 0, got 0.0"),
    "no-eps": (dict(eps=0.0), "eps must be above 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_config_that_computes_wrongly_is_refused(name):
    fields, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        ShardingConfig(**fields)


UNFIT = {
    "whole-on-two": (dict(sharding="none"), 2, "sharding none with 2 processes"),
    "adam-on-cpu": (dict(optimizer="adam"), 2, "no fused Adam for CPU"),
    "uvm-on-cpu": (dict(compute_kernel="fused_uvm"), 2, "got tables on CPU"),
    "unknown-table": (dict(by_table={"user": "row_wise"}), 2, "tables of the model \\(item, segment\\), got user"),
    "too-few-rows": (dict(by_table={"segment": "row_wise"}), 4, "table segment with 5 rows for 4 ranks"),
    "more-ranks-than-rows": (dict(sharding="row_wise"), 101, "table item with 100 rows for 101 ranks"),
    "odd-columns": (dict(sharding="column_wise"), 3, "table item of width 16 for 3 parts"),
    "rows-of-a-machine-for-events": (dict(by_table={"item": "table_row_wise"}), 2, "for pooled tables, got item"),
    "too-few-rows-for-a-machine": (dict(by_table={"segment": "table_row_wise"}), 4, "with 5 rows for 4 ranks"),
    "narrow-columns": (dict(sharding="column_wise"), 8, "multiples of 4, got table item of width 16 for 8 parts"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_split_that_does_not_fit_the_ranks_is_refused(name):
    fields, world_size, message = UNFIT[name]
    with pytest.raises(ConfigError, match=message):
        resolve(replace(ShardingConfig(), **fields), TABLES, world_size, CPU)


def test_grids_need_whole_machines_and_a_width_that_they_divide():
    grid = ShardingConfig(sharding="row_wise", by_table={"segment": "grid_shard"})
    assert resolve(grid, TABLES, 4, CUDA, local_size=2).by_table["segment"] == "grid_shard"
    with pytest.raises(ConfigError, match="equally many ranks, got 3 ranks, 2 a machine, for segment"):
        resolve(grid, TABLES, 3, CUDA, local_size=2)
    with pytest.raises(ConfigError, match="of width 16 for 8 parts"):
        resolve(replace(grid, sharding="table_wise"), TABLES, 16, CUDA, local_size=2)


def test_a_grid_takes_no_mean():
    name = "contexts.embedding_bags.segment.weight"
    of_mean = TABLES | {name: replace(TABLES[name], pooling=PoolingType.MEAN)}
    grid = ShardingConfig(sharding="row_wise", by_table={"segment": "grid_shard"})
    with pytest.raises(ConfigError, match="for tables that sum the rows of a bag, got segment, which takes their mean"):
        resolve(grid, of_mean, 2, CPU)
    assert resolve(grid, TABLES, 2, CPU).by_table["segment"] == "grid_shard"


def test_auto_takes_no_rowwise_statistic_for_a_grid():
    config = ShardingConfig(sharding="row_wise", by_table={"segment": "table_row_wise"})
    assert resolve(config, TABLES, 2, CPU).optimizer == "rowwise_adagrad"
    assert resolve(config, TABLES, 2, CPU).by_table == {"item": "row_wise", "segment": "table_row_wise"}
