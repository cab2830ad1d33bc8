"""Scoring the table where it lies equals scoring looked-up candidates: losses, weights and optimizer state."""

from typing import Any
from unittest.mock import patch

import pytest
import torch

from ssd_torchrec.distributed import vocab_parallel
from ssd_torchrec.distributed.process import World, process_group
from ssd_torchrec.distributed.shard import ShardingConfig, Trainable
from ssd_torchrec.distributed.state import table_state
from ssd_torchrec.distributed.tables import global_shape, local_pieces
from ssd_torchrec.distributed.vocab_parallel import VocabParallelSoftmaxLoss
from ssd_torchrec.errors import ConfigError
from tests.distributed.example import FIRST_ITEM, SGD, WIDTH, batch, over_ranks, train, trainable, whole_weights
from tests.distributed.world import free_port, spawn

STEPS, FEW_STEPS = range(20), range(4)
CLOSE = 1e-6
TABLE = "items.embeddings.item.weight"
SHARDINGS = {
    "sgd": ShardingConfig(sharding="row_wise", optimizer="sgd", learning_rate=0.05),
    "adagrad": ShardingConfig(sharding="row_wise", optimizer="adagrad", learning_rate=0.02),
    "rowwise_adagrad": ShardingConfig(sharding="row_wise", optimizer="rowwise_adagrad", learning_rate=0.02),
}


def bound(world: World, sharding: ShardingConfig, **shape: bool) -> Trainable:
    loss = VocabParallelSoftmaxLoss(world.size)
    t = trainable(world, sharding, SGD, loss=loss, **shape)
    loss.bind(t, TABLE, FIRST_ITEM)
    return t


def ending(t: Trainable) -> dict[str, Any]:
    state = {}
    for name, value in table_state(t).items():
        if name.startswith((f"tables.{TABLE}", "tables.event_columns.")):
            whole = torch.zeros(global_shape(value))
            for piece, (first, *_) in local_pieces(value):
                whole[first : first + len(piece)] = piece
            state[name] = over_ranks(whole)
    return whole_weights(t) | state


def both(world: World) -> dict[str, Any]:
    vocab_parallel.ROWS_PER_CHUNK["cpu"], vocab_parallel.QUERIES_PER_BLOCK["cpu"] = 7, 5
    runs = {}
    for name, sharding in SHARDINGS.items():
        looked_up, in_place = trainable(world, sharding, SGD), bound(world, sharding)
        losses = train(looked_up, world, STEPS), train(in_place, world, STEPS, candidates=False)
        runs[name] = (*losses, ending(looked_up), ending(in_place))
    told, sharding = {"event_columns": True}, SHARDINGS["rowwise_adagrad"]
    looked_up, in_place = trainable(world, sharding, SGD, **told), bound(world, sharding, **told)
    losses = train(looked_up, world, STEPS, **told), train(in_place, world, STEPS, candidates=False, **told)
    runs["event columns"] = (*losses, ending(looked_up), ending(in_place))
    with patch.object(vocab_parallel, "_fits_tiles", lambda queries: True):  # as on a GPU; here they are interpreted
        looked_up, in_place = trainable(world, sharding, SGD), bound(world, sharding)
        losses = train(looked_up, world, FEW_STEPS), train(in_place, world, FEW_STEPS, candidates=False)
    runs["in tiles"] = (*losses, ending(looked_up), ending(in_place))
    return runs


def assert_equal_runs(runs: dict[str, Any]) -> None:
    assert runs.keys() == {*SHARDINGS, "event columns", "in tiles"}
    for looked_up, in_place, expected, got in runs.values():
        assert in_place == pytest.approx(looked_up, abs=CLOSE)
        assert expected.keys() == got.keys()
        assert max((expected[name] - got[name]).abs().max().item() for name in got) <= CLOSE
        assert looked_up[0] - looked_up[-1] > 1000 * CLOSE


@pytest.fixture
def small_portions(monkeypatch):
    """As `both` sets them in processes of its own: undone afterwards."""
    for portions in (vocab_parallel.ROWS_PER_CHUNK, vocab_parallel.QUERIES_PER_BLOCK):
        monkeypatch.setitem(portions, "cpu", portions["cpu"])


def test_twenty_steps_equal_those_over_looked_up_candidates_on_one_rank(group_of_one, small_portions):
    assert_equal_runs(both(group_of_one))


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_twenty_steps_equal_those_over_looked_up_candidates(size):
    for ranks_view in spawn(both, size):
        assert_equal_runs(ranks_view)


def test_queries_that_are_not_asked_may_be_anything_and_get_no_gradient(group_of_one):
    t = bound(group_of_one, SHARDINGS["sgd"])
    mine = batch(0, group_of_one, candidates=False)
    t.model(mine)  # looks the batch up, which the step in backward waits for
    mine.target[::2] = -1
    queries = torch.randn(len(mine.target), WIDTH, generator=torch.Generator().manual_seed(0))
    queries[::2] = torch.nan
    queries.requires_grad_()
    loss, local = t.module.loss(queries, queries[:0], mine)
    loss.backward()
    table = whole_weights(t)[TABLE][FIRST_ITEM:]
    assert local[1] == len(mine.target[1::2])
    assert torch.isfinite(table).all()
    assert queries.grad is not None
    assert (queries.grad[::2] == 0).all()
    assert (queries.grad[1::2] != 0).all()


def test_a_loss_without_a_split_table_and_tables_split_otherwise_are_refused(group_of_one, alone):
    for world, sharding, got in (
        (alone, ShardingConfig(), "got item whole"),
        (group_of_one, ShardingConfig(sharding="column_wise", optimizer="sgd"), "got item column_wise fused on rank 0"),
    ):
        with pytest.raises(ConfigError, match=got):
            bound(world, sharding)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and NCCL")
@pytest.mark.parametrize("optimizer", ["adam", "rowwise_adagrad"])
def test_twenty_steps_equal_those_over_looked_up_candidates_on_a_gpu(optimizer, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    world = World(device=torch.device("cuda", 0), meeting_point=f"127.0.0.1:{free_port()}")
    sharding = ShardingConfig(sharding="row_wise", optimizer=optimizer, learning_rate=0.02)
    with process_group(world, timeout_s=60):
        looked_up, in_place = trainable(world, sharding, SGD), bound(world, sharding)
        losses = []
        for t, candidates in ((looked_up, True), (in_place, False)):
            losses.append([])
            for step in STEPS:
                t.optimizer.zero_grad()
                loss, _ = t.model(batch(step, world, candidates=candidates).to(world.device))
                loss.backward()
                t.optimizer.step()
                losses[-1].append(loss.item())
        tables = [local_pieces(t.model.state_dict()[TABLE])[0][0] for t in (looked_up, in_place)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert (tables[0] - tables[1]).abs().max() <= 1e-4
    assert losses[0][0] - losses[0][-1] > 0.01
