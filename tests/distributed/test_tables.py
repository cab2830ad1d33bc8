import pytest
import torch
from torch import nn
from torchrec import EmbeddingConfig

from ssd_torchrec.distributed import tables
from ssd_torchrec.distributed.process import World
from ssd_torchrec.distributed.tables import allocate_tables, init_table, seed_of, tables_of
from tests.distributed.example import model

CONFIG = EmbeddingConfig(
    name="item", num_embeddings=10, embedding_dim=8, feature_names=["item"], init_fn=lambda w: nn.init.normal_(w)
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(tables, "BLOCK_ROWS", 4)


def filled(seed: int = 0, config: EmbeddingConfig = CONFIG) -> torch.Tensor:
    weight = torch.full((config.num_embeddings, config.embedding_dim), torch.nan)
    init_table(weight, config, seed)
    return weight


def test_first_values_follow_from_the_seed_alone():
    before = torch.get_rng_state()
    first = filled()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    assert torch.equal(filled(), first)
    assert not torch.equal(filled(seed=1), first)


def test_every_row_of_every_block_is_filled_with_its_own_values():
    weight = filled()
    assert weight.isfinite().all()
    assert len(weight.unique(dim=0)) == 10


def test_a_shard_gets_its_part_of_the_whole(monkeypatch):
    whole = filled()
    for first_row, first_column, rows, columns in [(0, 0, 5, 8), (5, 0, 5, 8), (3, 4, 6, 4), (9, 0, 1, 8)]:
        part = torch.full((rows, columns), torch.nan)
        offsets = [first_row, first_column]
        monkeypatch.setattr(tables, "local_pieces", lambda _, part=part, offsets=offsets: [(part, offsets)])
        init_table(part, CONFIG, 0)
        assert torch.equal(part, whole[first_row : first_row + rows, first_column : first_column + columns])


def test_seeds_are_the_same_everywhere_and_differ_by_part():
    assert seed_of(7, "item", 0) == 4512027994647732264
    assert len({seed_of(7, "item", 0), seed_of(7, "item", 1), seed_of(7, "user", 0), seed_of(8, "item", 0)}) == 4


def test_tables_are_found_under_the_names_of_their_weights(alone: World):
    unsharded = model(alone)
    found = tables_of(unsharded)
    assert {name: config.name for name, config in found.items()} == {
        "items.embeddings.item.weight": "item",
        "contexts.embedding_bags.segment.weight": "segment",
    }
    assert found.keys() <= unsharded.state_dict().keys()


def test_tables_on_meta_get_memory_and_the_rest_is_left(alone: World):
    unsharded = model(alone)
    dense = {name: p for name, p in unsharded.named_parameters() if not p.is_meta}
    assert len(dense) < len(dict(unsharded.named_parameters()))
    allocate_tables(unsharded, torch.device("cpu"))
    after = dict(unsharded.named_parameters())
    assert not any(p.is_meta for p in after.values())
    assert all(after[name] is p for name, p in dense.items())
