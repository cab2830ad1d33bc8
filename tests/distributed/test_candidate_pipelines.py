"""A scorer of candidates under torchrec's pipelines, on one process and on two."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor
from torchrec.datasets.utils import Batch
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist

from ssd_torchrec.distributed.process import World
from ssd_torchrec.distributed.shard import DenseOptimizerConfig, ShardingConfig, shard
from ssd_torchrec.models.target_aware import CandidateScorer
from tests.distributed.world import spawn
from tests.models.clicks import CLICKS, encoder, features, items

LENGTHS = [3, 0, 7, 1, 20, 2, 5, 4]
SHOWN = [2, 2, 0, 0, 3, 3, 1, 1]
"""As many on each of two ranks, so that the mean over a batch is that of their means."""
STEPS = 20
PIPELINES = {"base": TrainPipelineBase, "sparse-dist": TrainPipelineSparseDist}
SPLIT = ShardingConfig(sharding="row_wise", optimizer="adagrad", learning_rate=0.05)
SGD = DenseOptimizerConfig(optimizer="sgd", learning_rate=0.1)


class Taken(nn.Module):
    """A leaf to the tracer."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(logits, labels)


class Train(nn.Module):
    """What a pipeline drives."""

    def __init__(self, scorer: CandidateScorer) -> None:
        super().__init__()
        self.scorer = scorer
        self.loss = Taken()

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = self.scorer(batch.sparse_features)
        return self.loss(logits, batch.labels), logits.detach()


def share(world: World, step: int) -> Batch:
    """This rank's rows of a global batch; an even candidate is taken."""
    whole = features({"clicked": LENGTHS}, step, SHOWN)
    mine = range(world.rank, len(LENGTHS), world.size)
    jagged = {key: whole[key].to_dense() for key in ("clicked", "clicked_at", "shown")}
    values = [rows[n] for rows in jagged.values() for n in mine]
    kjt = KeyedJaggedTensor.from_lengths_sync(
        keys=list(jagged), values=torch.cat(values), lengths=torch.tensor([len(value) for value in values])
    )
    return Batch(torch.zeros(len(mine), 1), kjt, (kjt["shown"].values() % 2 == 0).float())


def train(world: World, pipeline: str) -> dict[str, Any]:
    torch.manual_seed(3)
    scorer = CandidateScorer(items("clicked", "shown", device="meta"), encoder(), CLICKS, "shown", hidden=(8,))
    trainable = shard(Train(scorer), SPLIT, SGD, world, seed=0)
    steps = PIPELINES[pipeline](trainable.model, trainable.optimizer, world.device)
    feed, losses = iter([share(world, step % 3) for step in range(STEPS)]), []
    while True:
        try:
            logits = steps.progress(feed)
        except StopIteration:
            break
        assert len(logits) == sum(SHOWN) // world.size
        with torch.no_grad():
            labels = share(world, len(losses) % 3).labels
            losses.append(nn.functional.binary_cross_entropy_with_logits(logits, labels).item())
    pipelined = {type(module).__name__ for module in getattr(steps, "_pipelined_modules", [])}
    return {"losses": losses, "pipelined": pipelined, "plan": trainable.plan}


def train_all(world: World) -> dict[str, dict[str, Any]]:
    return {name: train(world, name) for name in PIPELINES}


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, dict[str, Any]]]:
    return spawn(train_all, 2)


def test_both_pipelines_learn_the_same_on_one_process(group_of_one):
    base, overlapped = (train(group_of_one, name) for name in PIPELINES)
    assert overlapped["losses"] == pytest.approx(base["losses"], abs=1e-6)
    assert sum(base["losses"][-3:]) < 0.9 * sum(base["losses"][:3])
    assert overlapped["pipelined"] == {"ShardedEmbeddingCollection"}


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_two_processes_learn_what_one_does(pipeline, two_ranks, group_of_one):
    alone = train(group_of_one, pipeline)
    shares = [rank[pipeline] for rank in two_ranks]
    together = [sum(losses) / 2 for losses in zip(*(of["losses"] for of in shares), strict=True)]
    assert together == pytest.approx(alone["losses"], abs=1e-4)
    assert shares[0]["plan"]["t_item"].startswith("row_wise fused on rank 0, 1")
    assert shares[1]["pipelined"] == alone["pipelined"]
