"""A plugged DLRM under torchrec's own DLRMTrain, Batch and pipelines, on one process and on two."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torchrec.datasets.utils import Batch
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist
from torchrec.models.dlrm import DLRMTrain

from ssd_torchrec.distributed.process import World
from ssd_torchrec.distributed.shard import DenseOptimizerConfig, ShardingConfig, shard
from ssd_torchrec.models.dlrm import plug_into_dlrm
from ssd_torchrec.models.history import History
from tests.distributed.world import spawn
from tests.models.clicks import CLICKS, KINDS, SHOWN, batch, dlrm, encoder, features, items

LENGTHS = [3, 0, 7, 1, 20, 2, 5, 4]
STEPS = 30
EXACT = 12
"""Steps after which roundings, which these large steps multiply, are still small."""
PIPELINES = {"base": TrainPipelineBase, "sparse-dist": TrainPipelineSparseDist}
SPLIT = ShardingConfig(sharding="row_wise", optimizer="adagrad", learning_rate=0.05)
SGD = DenseOptimizerConfig(optimizer="sgd", learning_rate=0.5)
TARGETS = {
    **{kind: (kind, SHOWN) for kind in KINDS},
    "of-a-bag-too": ("DLRM", replace(CLICKS, target_key="user")),  # both collections look it up, each in its table
}


def share(world: World, step: int) -> Batch:
    """This rank's rows of a global batch; every rank has as many."""
    whole = batch(LENGTHS, step)
    mine = range(world.rank, len(LENGTHS), world.size)
    jagged = {key: whole.sparse_features[key].to_dense() for key in whole.sparse_features.keys()}  # noqa: SIM118
    values = [rows[n] for rows in jagged.values() for n in mine]
    kjt = features({"clicked": [0]}).from_lengths_sync(
        keys=list(jagged), values=torch.cat(values), lengths=torch.tensor([len(value) for value in values])
    )
    rows = list(mine)
    return Batch(whole.dense_features[rows], kjt, whole.labels[rows])


def train(world: World, kind: str, pipeline: str, history: History = CLICKS) -> dict[str, Any]:
    torch.manual_seed(3)
    model = dlrm(kind, device="meta")
    keys = [key for key in (history.item_key, history.target_key) if key]
    plug_into_dlrm(model, items(*keys, device="meta"), encoder(), history)
    trainable = shard(DLRMTrain(model), SPLIT, SGD, world, seed=0)
    steps = PIPELINES[pipeline](trainable.model, trainable.optimizer, world.device)
    feed, losses = iter([share(world, step % 3) for step in range(STEPS)]), []
    while True:
        try:
            loss, logits, labels = steps.progress(feed)
        except StopIteration:
            break
        assert logits.shape == labels.shape
        losses.append(loss.item())
    pipelined = {type(module).__name__ for module in getattr(steps, "_pipelined_modules", [])}
    return {"losses": losses, "pipelined": pipelined, "plan": trainable.plan}


def train_all(world: World) -> dict[tuple[str, str], dict[str, Any]]:
    return {(kind, name): train(world, kind, name) for kind in KINDS for name in PIPELINES} | {
        ("target", name): train(world, kind, "sparse-dist", history) for name, (kind, history) in TARGETS.items()
    }


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[tuple[str, str], dict[str, Any]]]:
    return spawn(train_all, 2)


@pytest.fixture(scope="module")
def kept() -> dict[Any, dict[str, Any]]:
    return {}


@pytest.fixture
def on_one(group_of_one, kept) -> Callable[..., dict[str, Any]]:
    """`train` on one process: once a module for each model and pipeline."""

    def trained(*of: Any) -> dict[str, Any]:
        if of not in kept:
            kept[of] = train(group_of_one, *of)
        return kept[of]

    return trained


@pytest.mark.parametrize("kind", KINDS)
def test_both_pipelines_learn_the_same_on_one_process(kind, on_one):
    base, overlapped = (on_one(kind, name) for name in PIPELINES)
    assert overlapped["losses"] == pytest.approx(base["losses"], abs=1e-6)
    assert len(base["losses"]) == STEPS
    assert sum(base["losses"][-3:]) < 0.9 * sum(base["losses"][:3])
    assert overlapped["pipelined"] == {"ShardedEmbeddingCollection", "ShardedEmbeddingBagCollection"}


@pytest.mark.parametrize("name", TARGETS)
def test_with_a_target_too_both_pipelines_and_two_processes_learn_the_same(name, two_ranks, group_of_one):
    kind, history = TARGETS[name]
    base, overlapped = (train(group_of_one, kind, pipeline, history) for pipeline in PIPELINES)
    assert overlapped["losses"] == pytest.approx(base["losses"], abs=1e-6)
    assert overlapped["pipelined"] == {"ShardedEmbeddingCollection", "ShardedEmbeddingBagCollection"}
    check_alike(overlapped, [rank["target", name] for rank in two_ranks])


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_learn_what_one_does(kind, pipeline, two_ranks, on_one):
    check_alike(on_one(kind, pipeline), [rank[kind, pipeline] for rank in two_ranks])


def check_alike(one: dict[str, Any], shares: list[dict[str, Any]]) -> None:
    """One process's run, and what each of two ranks had of the same."""
    alone = one["losses"]
    together = [sum(losses) / 2 for losses in zip(*(of["losses"] for of in shares), strict=True)]
    assert together[:EXACT] == pytest.approx(alone[:EXACT], abs=1e-5)
    assert together == pytest.approx(alone, abs=1e-3)
    assert shares[0]["plan"]["t_item"].startswith("row_wise fused on rank 0, 1")
    assert shares[1]["pipelined"] == one["pipelined"]
