import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from ssd_torchrec.data.batch import Batch
from ssd_torchrec.distributed.pipeline import pipelined, pipelined_collections
from ssd_torchrec.distributed.process import World
from ssd_torchrec.distributed.shard import ShardingConfig, Trainable
from ssd_torchrec.errors import DivergedError
from tests.distributed.example import FIRST_ITEM, batch, over_ranks, train, trainable, whole_weights
from tests.distributed.world import spawn

STEPS = range(6)
SPLIT = ShardingConfig(sharding="row_wise", optimizer="sgd", learning_rate=0.05)


def batches(world: World, steps: range) -> Iterator[Batch]:
    return (batch(step, world) for step in steps)


def drain(pipeline: Any, feed: Iterator[Batch]) -> list[float]:
    losses = []
    while True:
        try:
            loss_sum, targets = over_ranks(pipeline.progress(feed)).tolist()
        except StopIteration:
            return losses
        losses.append(loss_sum / targets)


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def plainly(world: World) -> tuple[list[float], dict[str, torch.Tensor]]:
    t = trainable(world, SPLIT)
    return train(t, world, STEPS), whole_weights(t)


def one_epoch_after_another(world: World) -> tuple[list[float], dict[str, torch.Tensor], dict[str, str]]:
    """Each epoch a pipeline of its own, the model called directly between them."""
    t, losses, collections = trainable(world, SPLIT), [], {}
    for steps in (STEPS[:3], STEPS[3:]):
        with pipelined(t, world.device) as pipeline:
            losses += drain(pipeline, batches(world, steps))
            collections = pipelined_collections(pipeline)
        evaluate(t, world)
    return losses, whole_weights(t), collections


def evaluation_between_steps(world: World) -> tuple[list[float], dict[str, torch.Tensor], list[bool]]:
    t, right = trainable(world, SPLIT), []
    with pipelined(t, world.device) as pipeline:
        feed = batches(world, STEPS)
        losses = [over_ranks(pipeline.progress(feed))[0].item() / 17 for _ in range(2)]
        pipeline.detach()
        right.append(evaluate(t, world))
        pipeline.attach()
        losses += drain(pipeline, feed)
    return losses, whole_weights(t), right


def evaluate(t: Trainable, world: World) -> bool:
    """Whether the model, called directly, looks up the rows that its table holds."""
    t.model.eval()
    with torch.no_grad():
        t.module.last_queries(batch(99, world))
        ids = torch.arange(FIRST_ITEM, FIRST_ITEM + 9)
        vectors = t.module.item_vectors(ids)
    t.model.train()
    return torch.equal(vectors, whole_weights(t)["items.embeddings.item.weight"][ids])


def with_event_columns(world: World) -> tuple[bool, dict[str, str]]:
    """Whether a pipelined model with event columns trains as a plain one does, and what was pipelined."""
    plain, t = (trainable(world, SPLIT, event_columns=True) for _ in range(2))
    losses = train(plain, world, STEPS, event_columns=True)
    with pipelined(t, world.device) as pipeline:
        feed = (batch(step, world, event_columns=True) for step in STEPS)
        same_losses = drain(pipeline, feed) == losses
        collections = pipelined_collections(pipeline)
    return same_losses and same(whole_weights(t), whole_weights(plain)), collections


def nan_on_the_last_rank(world: World) -> tuple[str, bool]:
    t = trainable(world, SPLIT)
    before = whole_weights(t)
    targets = math.nan if world.rank == world.size - 1 else 17
    feed = (replace(b, global_targets=targets) for b in batches(world, STEPS))
    try:
        with pipelined(t, world.device) as pipeline:
            drain(pipeline, feed)
    except DivergedError as error:
        return str(error), same(whole_weights(t), before)
    return "nothing", False


def all_checks(world: World) -> dict[str, Any]:
    losses, weights = plainly(world)
    epochs = one_epoch_after_another(world)
    between = evaluation_between_steps(world)
    return {
        "collections": epochs[2],
        "epochs": losses == epochs[0] and same(weights, epochs[1]),
        "between": losses == between[0] and same(weights, between[1]),
        "looked up": between[2],
        "told": with_event_columns(world),
        "diverged": nan_on_the_last_rank(world),
    }


@pytest.fixture(scope="module")
def by_rank() -> list[dict[str, Any]]:
    return spawn(all_checks, 2)


def test_both_collections_are_pipelined(by_rank):
    for result in by_rank:
        assert result["collections"] == {
            "items": "ShardedEmbeddingCollection",
            "contexts": "ShardedEmbeddingBagCollection",
        }


def test_event_columns_are_pipelined_beside_them_and_train_as_in_plain_steps(by_rank):
    for trained_alike, collections in (result["told"] for result in by_rank):
        assert trained_alike
        assert collections == {
            "items": "ShardedEmbeddingCollection",
            "event_columns": "ShardedEmbeddingCollection",
            "contexts": "ShardedEmbeddingBagCollection",
        }


def test_the_pipeline_trains_as_plain_steps_do(by_rank):
    assert [result["epochs"] for result in by_rank] == [True, True]


def test_an_evaluation_between_steps_changes_nothing(by_rank):
    assert [result["between"] for result in by_rank] == [True, True]
    assert [result["looked up"] for result in by_rank] == [[True], [True]]


def test_one_ranks_nan_stops_all_ranks_before_any_table_steps(by_rank):
    for message, untouched in (result["diverged"] for result in by_rank):
        assert message.startswith("the loss must be finite on every rank, it is not on rank 1")
        assert untouched


def test_whole_tables_have_a_pipeline_too(alone):
    whole = ShardingConfig(sharding="none", optimizer="sgd", learning_rate=0.05)
    plain, t = trainable(alone, whole), trainable(alone, whole)
    losses = train(plain, alone, STEPS)
    with pipelined(t, alone.device) as pipeline:
        assert drain(pipeline, batches(alone, STEPS)) == pytest.approx(losses)
        assert pipelined_collections(pipeline) == {}
    assert same(whole_weights(t), whole_weights(plain))


def test_whole_tables_refuse_a_loss_that_is_not_finite(alone):
    t = trainable(alone, ShardingConfig())
    feed = iter([replace(batch(0, alone), global_targets=math.nan)])
    with pytest.raises(DivergedError), pipelined(t, alone.device) as pipeline:
        pipeline.progress(feed)
