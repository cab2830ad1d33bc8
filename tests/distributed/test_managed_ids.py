"""Managed ids under sharding, pipelines and checkpoints: the map is cut, trained and saved with its table."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.datasets.utils import Batch
from torchrec.models.dlrm import DLRMTrain
from torchrec.modules.mc_embedding_modules import (
    ManagedCollisionEmbeddingBagCollection,
    ManagedCollisionEmbeddingCollection,
)
from torchrec.modules.mc_modules import LRU_EvictionPolicy, ManagedCollisionCollection, MCHManagedCollisionModule

from ssd_torchrec.distributed.checkpoint import TrainState, load_checkpoint, load_weights, save_checkpoint
from ssd_torchrec.distributed.plan import resolve
from ssd_torchrec.distributed.process import World
from ssd_torchrec.distributed.shard import ShardingConfig, Trainable, shard
from ssd_torchrec.distributed.tables import tables_of
from ssd_torchrec.errors import CheckpointError, ConfigError
from ssd_torchrec.models.dlrm import plug_into_dlrm
from ssd_torchrec.models.managed_ids import managed_ids
from tests.distributed import test_dlrm_pipelines as plain
from tests.distributed.test_dlrm_pipelines import PIPELINES, SGD, SPLIT, STEPS
from tests.distributed.world import spawn
from tests.models.clicks import CLICKS, dlrm, encoder, items, with_raw_ids

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WHOLE = replace(SPLIT, sharding="none")
RUN = TrainState(step=2, vocabulary="none", position={}, config={})


def share(world: World, step: int) -> Batch:
    asked = plain.share(world, step % 3)
    return Batch(asked.dense_features, with_raw_ids(asked.sparse_features), asked.labels)


def trainable(world: World, sharding: ShardingConfig = SPLIT, *, seed: int = 0) -> Trainable:
    torch.manual_seed(3)
    model = dlrm(device="meta")
    plug_into_dlrm(model, managed_ids(items(device="meta"), eviction_interval=2), encoder(), CLICKS)
    return shard(DLRMTrain(model), sharding, SGD, world, seed=seed)


def collection_of(run: Trainable) -> Any:
    return run.module.model.sparse_arch.histories.embedding_collection  # type: ignore[union-attr]


def map_of(run: Trainable) -> Any:
    return collection_of(run)._managed_collision_collection._managed_collision_modules["t_item"]


def step(run: Trainable, world: World, n: int) -> float:
    """Seeded as our loop does it: rows that are given to an id are drawn."""
    torch.manual_seed(n)
    run.model.train()
    run.optimizer.zero_grad()
    loss, _ = run.model(share(world, n).to(world.device))
    loss.backward()
    run.optimizer.step()
    return loss.item()


def logits(run: Trainable, world: World) -> Tensor:
    run.model.eval()
    with torch.no_grad():
        return run.model(share(world, 0).to(world.device))[1][1].cpu()


def train(world: World, pipeline: str) -> dict[str, Any]:
    run = trainable(world)
    steps = PIPELINES[pipeline](run.model, run.optimizer, world.device)
    feed, losses = iter([share(world, n) for n in range(STEPS)]), []
    while True:
        try:
            losses.append(steps.progress(feed)[0].item())
        except StopIteration:
            break
    pipelined = {type(module).__name__ for module in getattr(steps, "_pipelined_modules", [])}
    held = int((map_of(run)._mch_sorted_raw_ids < 2**63 - 1).sum())
    return {"losses": losses, "pipelined": pipelined, "plan": run.plan, "held": held}


def train_all(world: World) -> dict[str, dict[str, Any]]:
    return {name: train(world, name) for name in PIPELINES}


def saved_and_loaded(world: World, folder: Path, sharding: ShardingConfig = SPLIT) -> dict[str, Any]:
    """Trains 2 steps, saves, loads into a new run, and trains both on."""
    run = trainable(world, sharding)
    for n in range(2):
        step(run, world, n)
    path = save_checkpoint(folder, run, RUN)
    other = trainable(world, sharding, seed=1)
    step(other, world, 0)  # ids of its own, of which nothing may be left
    before = logits(other, world)
    load_checkpoint(path, other, vocabulary="none")
    at_once = logits(run, world), logits(other, world)
    later = [(step(run, world, n), step(other, world, n)) for n in range(2, 9)]
    maps = [map_of(each)._mch_remapped_ids_mapping.tolist() for each in (run, other)]
    return {"path": str(path), "before": before, "at_once": at_once, "later": later, "maps": maps}


def both(world: World, folder: Path) -> dict[str, Any]:
    return {"trained": train_all(world), "saved": saved_and_loaded(world, folder)}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict[str, Any]]:
    return spawn(both, 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def ids() -> int:
    """How many different items the batches bring."""
    alone = World()
    return len({id_ for n in range(3) for id_ in share(alone, n).sparse_features["clicked"].values().tolist()})


def test_pipelines_learn_from_raw_ids_on_one_process(group_of_one, ids):
    base, overlapped = (train(group_of_one, name) for name in PIPELINES)
    assert sum(base["losses"][-3:]) < 0.9 * sum(base["losses"][:3])
    assert sum(overlapped["losses"][-3:]) < 0.9 * sum(overlapped["losses"][:3])
    assert overlapped["pipelined"] == {"ShardedManagedCollisionEmbeddingCollection", "ShardedEmbeddingBagCollection"}
    assert base["held"] == overlapped["held"] == ids


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_two_processes_learn_from_raw_ids_each_with_its_half(pipeline, two_ranks, ids):
    shares = [rank["trained"][pipeline] for rank in two_ranks]
    together = [sum(losses) / 2 for losses in zip(*(of["losses"] for of in shares), strict=True)]
    assert sum(together[-3:]) < 0.9 * sum(together[:3])
    assert shares[0]["plan"]["t_item"] == "row_wise fused on rank 0, 1"
    held = [of["held"] for of in shares]
    assert max(held) <= 24
    assert ids - 6 <= sum(held) <= ids  # a rank may have more ids than rows
    assert min(held) > ids / 4


def test_a_run_on_two_processes_resumes_its_map_to_the_last_bit(two_ranks):
    for rank in two_ranks:
        saved = rank["saved"]
        assert not torch.equal(saved["before"], saved["at_once"][1])
        assert torch.equal(*saved["at_once"])
        assert all(one == other for one, other in saved["later"])
        assert saved["maps"][0] == saved["maps"][1]


def test_a_run_on_one_process_with_whole_tables_resumes_its_map_to_the_last_bit(alone, tmp_path):
    saved = saved_and_loaded(alone, tmp_path, WHOLE)
    assert not torch.equal(saved["before"], saved["at_once"][1])
    assert torch.equal(*saved["at_once"])
    assert all(one == other for one, other in saved["later"])
    assert saved["maps"][0] == saved["maps"][1]


def test_one_process_takes_the_map_of_two(two_ranks, alone):
    run = trainable(alone, WHOLE)
    load_weights(Path(two_ranks[0]["saved"]["path"]), run, vocabulary="none")
    theirs = [rank["saved"]["at_once"][0] for rank in two_ranks]
    got = logits(run, alone)
    halves = got[0::2], got[1::2]
    for half, expected in zip(halves, theirs, strict=True):
        torch.testing.assert_close(half, expected, rtol=0, atol=1e-6)
    free = map_of(run)._mch_sorted_raw_ids[:-1] == 2**63 - 1
    assert all(not score[:-1][free].any() for score in map_of(run)._mch_metadata.values())
    for n in range(3, 9):
        step(run, alone, n)


def refused(world: World, path: str) -> str:
    run = trainable(world)
    before = logits(run, world)
    try:
        load_checkpoint(Path(path), run, vocabulary="none")
    except CheckpointError as error:
        assert torch.equal(logits(run, world), before)
        return str(error)
    return "taken"


@pytest.mark.slow
def test_more_processes_than_saved_it_refuse_a_map(alone, tmp_path):
    path = save_checkpoint(tmp_path, trainable(alone, WHOLE), RUN)
    for said in spawn(refused, 2, str(path)):
        assert "must have been saved by ranks that cut managed ids at the rows [25], got whole ones for" in said
        assert "take as many ranks as saved it, or one process" in said


class Single(nn.Module):
    def __init__(self, collection: nn.Module) -> None:
        super().__init__()
        self.collection = collection

    def forward(self, kjt: KeyedJaggedTensor) -> Tensor:
        return self.collection(kjt)[0]["clicked"].values()


def sevens(weight: Tensor) -> Tensor:
    return nn.init.constant_(weight, 7.0)


def full_table(world: World, sharding: ShardingConfig, steps: int) -> Tensor:
    """Vectors of three new ids in the step in which they take trained rows of a table of four."""
    config = EmbeddingConfig(name="t", embedding_dim=4, num_embeddings=4, feature_names=["clicked"], init_fn=sevens)
    collection = EmbeddingCollection(tables=[config], device=torch.device("meta"))
    run = shard(Single(managed_ids(collection, eviction="lru", eviction_interval=1)), sharding, SGD, world, seed=0)
    for n in range(steps):
        kjt = KeyedJaggedTensor(
            keys=["clicked"],
            values=torch.tensor([10 * n, 10 * n + 1, 10 * n + 2], device=world.device),
            lengths=torch.tensor([3], device=world.device),
        )
        vectors = run.model(kjt)
        run.optimizer.zero_grad()
        vectors.sum().backward()
        run.optimizer.step()
    return vectors.detach().cpu()


def test_an_evicted_row_starts_anew_in_split_tables_and_goes_on_in_whole_ones(group_of_one):
    assert torch.equal(full_table(group_of_one, SPLIT, 4), torch.full((3, 4), 7.0))
    assert (full_table(group_of_one, WHOLE, 4) < 6.9).all()


def foreign() -> ManagedCollisionEmbeddingCollection:
    plain_items = items()
    rows = MCHManagedCollisionModule(50, CPU, LRU_EvictionPolicy(), 1)
    maps = ManagedCollisionCollection({"t_item": rows}, plain_items.embedding_configs())
    return ManagedCollisionEmbeddingCollection(plain_items, maps)


def pooled() -> ManagedCollisionEmbeddingBagCollection:
    table = EmbeddingBagConfig(name="t", embedding_dim=4, num_embeddings=8, feature_names=["a"])
    bags = EmbeddingBagCollection(tables=[table])
    rows = MCHManagedCollisionModule(8, CPU, LRU_EvictionPolicy(), 1)
    return ManagedCollisionEmbeddingBagCollection(bags, ManagedCollisionCollection({"t": rows}, [table]))


@pytest.mark.parametrize("sharding", [SPLIT, WHOLE], ids=["split", "whole"])
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (foreign, r"must be made by managed_ids, got a MCHManagedCollisionModule for t_item"),
        (pooled, r"for event tables, got collection, a ManagedCollisionEmbeddingBagCollection"),
    ],
    ids=["foreign", "pooled"],
)
def test_maps_that_we_did_not_make_are_refused(build, message, sharding, group_of_one):
    with pytest.raises(ConfigError, match=message):
        shard(Single(build()), sharding, SGD, group_of_one, seed=0)


REFUSED: dict[str, tuple[dict[str, Any], torch.device, int, str]] = {
    "table-wise": ({"sharding": "table_wise"}, CUDA, 2, r"must be split row_wise, .* got table_wise for t_item"),
    "by-table": ({"by_table": {"t_item": "column_wise"}}, CPU, 2, r"got column_wise for t_item; set by_table"),
    "no-rows-to-give": ({}, CUDA, 26, r"got table t_item with 50 rows of width 16 for 26 ranks; give t_item 52 rows"),
    "rowwise-on-cpu": ({"optimizer": "rowwise_adagrad"}, CPU, 2, r"got rowwise_adagrad for t_item: .* on CUDA only"),
    "cached": ({"compute_kernel": "fused_uvm_caching"}, CUDA, 2, r"got fused_uvm_caching for t_item: .* past the"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_torchrec_cannot_do_with_managed_ids_is_refused(name):
    fields, device, ranks, message = REFUSED[name]
    tables = tables_of(managed_ids(items()))
    with pytest.raises(ConfigError, match=message):
        resolve(ShardingConfig(**fields), tables, ranks, device, managed={"t_item"})


def test_a_model_that_is_sharded_is_known_to_have_managed_ids(group_of_one):
    with pytest.raises(ConfigError, match=r"got rowwise_adagrad for t_item"):
        trainable(group_of_one, replace(SPLIT, optimizer="rowwise_adagrad"))
    auto = trainable(group_of_one, ShardingConfig(sharding="row_wise"))
    assert auto.sharding.optimizer == "adagrad"


def test_the_optimizer_is_one_that_can_evict():
    tables = tables_of(managed_ids(items()))
    managed = resolve(ShardingConfig(), tables, 2, CPU, managed={"t_item"})
    assert (managed.optimizer, managed.by_table) == ("adagrad", {"t_item": "row_wise"})
    on_gpus = resolve(ShardingConfig(optimizer="rowwise_adagrad"), tables, 2, CUDA, managed={"t_item"})
    assert on_gpus.optimizer == "rowwise_adagrad"
