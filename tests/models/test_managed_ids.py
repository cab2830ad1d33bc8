"""Raw ids in a bounded table: newcomers get rows, rows go from the least used, and a DLRM learns from them."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.models.dlrm import DLRMTrain
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingCollection

from ssd_torchrec.errors import ConfigError
from ssd_torchrec.models.dlrm import plug_into_dlrm
from ssd_torchrec.models.history import HistoryCollection
from ssd_torchrec.models.managed_ids import _finalised, managed_ids, mixed
from ssd_torchrec.models.target_aware import CandidateScorer
from tests.models.clicks import BUYS, CLICKS, WIDTH, batch, dlrm, encoder, features, items, with_raw_ids

ROWS = 8
LAST_ID = 2**63 - 1


def table(rows: int = ROWS, *names: str, name: str = "t_item") -> EmbeddingConfig:
    return EmbeddingConfig(name=name, embedding_dim=4, num_embeddings=rows, feature_names=list(names or ["clicked"]))


def managed(interval: int = 1, eviction: str = "lru", rows: int = ROWS) -> ManagedCollisionEmbeddingCollection:
    collection = EmbeddingCollection(tables=[table(rows)], device=torch.device("cpu"))
    return managed_ids(collection, eviction=eviction, eviction_interval=interval)  # type: ignore[arg-type]


def rows_of(collection: ManagedCollisionEmbeddingCollection, ids: list[int]) -> list[int]:
    """Looks up a batch of one row, and tells which rows of the table its vectors are."""
    kjt = KeyedJaggedTensor(
        keys=["clicked"], values=torch.tensor(ids, dtype=torch.int64), lengths=torch.tensor([len(ids)])
    )
    vectors: Tensor = collection(kjt)[0]["clicked"].values()
    weight: Tensor = collection._embedding_collection.embeddings["t_item"].weight  # type: ignore[assignment]
    found = (vectors[:, None] == weight).all(-1)
    assert (found.sum(1) == 1).all()
    return found.int().argmax(1).tolist()


def test_mixing_is_one_to_one_and_spares_what_torchrec_keeps():
    ids = torch.cat([torch.arange(-5000, 5000), 2**60 + torch.arange(5000), torch.tensor([LAST_ID - 1, -(2**63)])])
    spread = mixed(ids)
    assert len(spread.unique()) == len(ids)
    moved = int(mixed(torch.tensor(0))) ^ int(_finalised(torch.tensor(0)))
    assert int(_finalised(torch.tensor(LAST_ID))) ^ moved == LAST_ID  # so that no other id becomes it
    assert int(mixed(torch.tensor(LAST_ID))) == int(mixed(torch.tensor(LAST_ID - 1))) != LAST_ID
    assert ((spread[:10000] < 0).float().mean() - 0.5).abs() < 0.02
    assert ((spread[:10000] % 3 == 0).float().mean() - 1 / 3).abs() < 0.02
    assert torch.equal(mixed(ids[:9].int()), mixed(ids[:9]))


@pytest.mark.parametrize("eviction", ["distance_lfu", "lfu", "lru"])
def test_ids_get_rows_of_their_own_while_there_is_room(eviction):
    collection = managed(eviction=eviction)
    ids = [2**60, 2**60 + 1, 5, -5, LAST_ID - 1, 0, -(2**63)]
    rows = rows_of(collection, ids)
    assert sorted(rows) == list(range(ROWS - 1))
    assert rows_of(collection, ids[::-1]) == rows[::-1]
    collection.eval()
    assert rows_of(collection, [*ids, 77]) == [*rows, ROWS - 1]


def test_an_id_without_a_row_reads_the_last_one_until_the_interval_is_over():
    collection = managed(interval=3)
    assert rows_of(collection, [7, 8]) == rows_of(collection, [7, 9]) == [ROWS - 1] * 2
    first, second = rows_of(collection, [9, 8])
    assert len({first, second, ROWS - 1}) == 3
    assert rows_of(collection, [7, 8, 9, 10])[1:] == [second, first, ROWS - 1]


def test_eval_mode_gives_no_rows():
    collection = managed().eval()
    assert rows_of(collection, [7, 8]) == rows_of(collection, [7, 8]) == [ROWS - 1] * 2


def test_the_oldest_go_from_a_full_table():
    collection = managed(eviction="lru")
    for ids in ([1, 2, 3], [4, 5, 6, 7], [1]):
        rows_of(collection, ids)
    rows_of(collection, [8, 9])  # in place of 2 and 3
    collection.eval()
    rows = dict(zip(range(1, 10), rows_of(collection, list(range(1, 10))), strict=True))
    assert {id_ for id_, row in rows.items() if row == ROWS - 1} == {2, 3}
    assert len({*rows.values()}) == ROWS


def test_the_rarest_go_from_a_full_table_if_the_newcomer_is_more_frequent():
    collection = managed(eviction="lfu")
    rows_of(collection, [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7])
    rows_of(collection, [8])  # as rare as 7
    assert rows_of(collection.eval(), [8]) == [ROWS - 1]
    rows_of(collection.train(), [9, 9])
    assert rows_of(collection.eval(), [7]) == [ROWS - 1] != rows_of(collection, [9])


def test_a_row_passes_to_another_id_as_it_is_in_a_whole_table():
    collection = managed()
    rows_of(collection, list(range(1, 8)))
    weight = collection._embedding_collection.embeddings["t_item"].weight.detach().clone()  # type: ignore[operator]
    before = rows_of(collection.eval(), list(range(1, 8)))
    after = rows_of(collection.train(), list(range(11, 18)))
    assert sorted(after) == sorted(before)
    assert torch.equal(collection._embedding_collection.embeddings["t_item"].weight, weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("eviction", ["distance_lfu", "lfu", "lru"])
def test_every_event_counts_however_large_later_batches_are(eviction):
    """TorchRec makes room after its first batch: here none, then one that is many times as large."""
    collection = managed(interval=4, eviction=eviction, rows=64)
    for ids in ([], [1], list(range(2, 40)), [40]):
        rows_of(collection, ids)
    rows = rows_of(collection.eval(), list(range(1, 41)))
    assert len({*rows}) == 40
    assert 63 not in rows


def test_two_histories_share_a_map_and_two_tables_do_not():
    shared = HistoryCollection(managed_ids(items("clicked", "bought"), eviction_interval=1), encoder(), [CLICKS, BUYS])
    kjt = with_raw_ids(features({"clicked": [3, 0], "bought": [0, 2]}))
    assert shared(kjt).values().shape == (2, 2 * WIDTH)
    (only,) = shared.embedding_collection._managed_collision_collection._managed_collision_modules.values()  # type: ignore[union-attr]
    assert int(only.open_slots()) == 49 - len({*kjt["clicked"].values().tolist(), *kjt["bought"].values().tolist()})
    two = EmbeddingCollection(tables=[table(8, "clicked"), table(8, "bought", name="other")])
    collection = managed_ids(two, eviction_interval=1)
    kjt = KeyedJaggedTensor(
        keys=["bought", "when", "clicked"], values=torch.tensor([5, 1, 5, 6]), lengths=torch.tensor([1, 1, 2])
    )
    collection(kjt)
    maps = collection._managed_collision_collection._managed_collision_modules
    assert [int(maps[name].open_slots()) for name in ("t_item", "other")] == [5, 6]  # type: ignore[operator]


def test_a_plugged_dlrm_gives_what_it_gives_with_small_ids():
    """The same model but for the map: rows of the table in the order in which the map gives them out."""
    torch.manual_seed(0)
    plain = dlrm()
    raw = copy.deepcopy(plain)
    towers = encoder()
    plug_into_dlrm(plain, items(), towers, CLICKS, warm_start=False)
    torch.manual_seed(1)
    plug_into_dlrm(raw, managed_ids(items(), eviction_interval=1), copy.deepcopy(towers), CLICKS, warm_start=False)
    raw.load_state_dict(
        plain.state_dict() | {k: v for k, v in raw.state_dict().items() if "managed" in k}, strict=False
    )
    collection = raw.sparse_arch.histories.embedding_collection  # type: ignore[union-attr]
    asked = batch([3, 0, 7])
    kjt = with_raw_ids(asked.sparse_features)
    raw(asked.dense_features, kjt)
    remapped = collection._managed_collision_collection.eval()(kjt)["clicked"].values()  # type: ignore[union-attr]
    with torch.no_grad():
        old = plain.sparse_arch.histories.embedding_collection.embeddings["t_item"].weight  # type: ignore[union-attr]
        collection._embedding_collection.embeddings["t_item"].weight[remapped] = old[  # type: ignore[union-attr]
            asked.sparse_features["clicked"].values()
        ]
    expected = plain(asked.dense_features, asked.sparse_features)
    assert torch.equal(raw.eval()(asked.dense_features, kjt), expected)


def test_a_plugged_dlrm_learns_from_raw_ids():
    torch.manual_seed(3)
    model = DLRMTrain(plug_into_dlrm(dlrm(), managed_ids(items(), eviction_interval=2), encoder(), CLICKS))
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05)
    losses = []
    for step in range(30):
        asked = batch([3, 0, 7, 1, 20, 2], step % 3)
        asked.sparse_features = with_raw_ids(asked.sparse_features)
        loss, _ = model(asked)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


REFUSED = {
    "bags": (lambda: managed_ids(dlrm().sparse_arch), r"for an EmbeddingCollection, got SparseArch; build"),  # type: ignore[arg-type]
    "twice": (lambda: managed_ids(managed()), r"got ManagedCollisionEmbeddingCollection"),  # type: ignore[arg-type]
    "eviction": (lambda: managed(eviction="fifo"), r"one of distance_lfu, lfu, lru, got fifo; take distance_lfu"),
    "interval": (lambda: managed(interval=0), r"at least 1 batch, got 0; take 100"),
    "one-row": (lambda: managed(rows=1), r"a row for ids without one and another, got t_item with 1; set"),
    "shared-feature": (
        lambda: managed_ids(EmbeddingCollection(tables=[table(8, "a"), table(8, "a", name="other")])),
        r"of one table, got a of t_item and other; take it out",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_managed_is_refused(name):
    build, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        build()


def test_a_target_and_candidates_are_looked_up_by_their_raw_ids():
    raw = torch.tensor([2**60, -5, 7, 2**60], dtype=torch.int64)
    history = replace(CLICKS, target_key="shown")
    kjt = KeyedJaggedTensor.from_lengths_sync(
        keys=["clicked", "clicked_at", "shown"],
        values=torch.cat([raw, torch.arange(4), torch.tensor([2**60, 7])]),
        lengths=torch.tensor([3, 1, 3, 1, 1, 1]),
    )
    torch.manual_seed(0)
    collection = managed_ids(items("clicked", "shown"), eviction_interval=1)
    for _ in range(2):
        collection.train()(kjt)
    collection.eval()
    vector_of = collection(kjt)[0]
    assert torch.equal(vector_of["shown"].values(), vector_of["clicked"].values()[[0, 2]])
    got = HistoryCollection(collection, encoder(), history)(kjt).to_dict()
    assert torch.equal(got["shown"], vector_of["shown"].values())
    reader = encoder()
    state = HistoryCollection(collection, reader, CLICKS)(kjt).to_dict()["clicked"]
    scored = CandidateScorer(collection, reader, CLICKS, "shown")(kjt)
    torch.testing.assert_close(scored, (state * got["shown"]).sum(1))
