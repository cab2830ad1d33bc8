"""Histories as features: one vector a row, from its own events, where a DLRM or a KeyedTensor expects it."""

from dataclasses import replace

import pytest
import torch
from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor, KeyedTensor

from ssd_torchrec.errors import ConfigError, DataError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.models.history import History, HistoryCollection, HistorySparseArch
from tests.models.clicks import BUYS, CLICKS, ITEMS, SHOWN, WIDTH, bags, dlrm, encoder, features, items

LENGTHS = [3, 0, 7, 1]


@pytest.fixture
def kjt() -> KeyedJaggedTensor:
    return features({"clicked": LENGTHS, "bought": [0, 2, 0, 4]})


def row_by_row(collection: HistoryCollection, history: History, kjt: KeyedJaggedTensor) -> torch.Tensor:
    """Each row encoded alone and pooled by hand."""
    index = [h.item_key for h in collection.histories].index(history.item_key)
    rows = []
    for ids, times in zip(kjt[history.item_key].to_dense(), kjt[history.timestamp_key].to_dense(), strict=True):
        if not len(ids):
            rows.append(torch.zeros(WIDTH))
            continue
        vectors = collection.embedding_collection.embeddings["t_item"].weight[ids]
        encoded = collection.tower.encoders[index](vectors, times, JaggedLayout.from_lengths([len(ids)]))
        rows.append(encoded[-1] if history.pooling == "last" else encoded.mean(0))
    return torch.stack(rows)


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("shared", [True, False], ids=["one-encoder", "own-encoders"])
def test_each_row_is_its_own_history_encoded_and_pooled(shared, pooling, kjt):
    torch.manual_seed(0)
    histories = [replace(CLICKS, pooling=pooling), BUYS]
    encoders = encoder() if shared else [encoder(), encoder()]
    collection = HistoryCollection(items("clicked", "bought"), encoders, histories)
    with torch.no_grad():
        for weight in collection.tower.parameters():
            weight.normal_(std=0.3)  # time has no say in new weights
    got = collection(kjt)
    assert isinstance(got, KeyedTensor)
    assert got.keys() == ["clicked", "bought"]
    for history in histories:
        torch.testing.assert_close(got[history.item_key], row_by_row(collection, history, kjt))
    assert len({*map(id, collection.tower.encoders)}) == (1 if shared else 2)


def test_pooled_features_and_histories_regroup(kjt):
    pooled, history = bags()(kjt), HistoryCollection(items(), encoder(), CLICKS)(kjt)
    (one, other) = KeyedTensor.regroup([pooled, history], [["user", "clicked"], ["place"]])
    assert torch.equal(one, torch.cat([pooled["user"], history["clicked"]], dim=1))
    assert torch.equal(other, pooled["place"])


def test_a_sparse_arch_brings_its_features_first_and_then_the_histories(kjt):
    base = dlrm().sparse_arch
    collection = HistoryCollection(items("clicked", "bought"), encoder(), [CLICKS, BUYS])
    arch = HistorySparseArch(base, collection)
    got = arch(kjt)
    assert (arch.F, arch.D, arch.sparse_feature_names) == (4, WIDTH, ["user", "place", "clicked", "bought"])
    assert got.shape == (4, 4, WIDTH)
    assert torch.equal(got[:, :2], base(kjt))
    assert torch.equal(got[:, 2:].flatten(1), collection(kjt).values())


@pytest.fixture
def with_target() -> HistoryCollection:
    """Two histories about one shown item, all of one table."""
    torch.manual_seed(0)
    table = items("clicked", "bought", "shown")
    return HistoryCollection(table, encoder(), [SHOWN, replace(BUYS, target_key="shown")])


def test_a_target_comes_once_behind_the_histories_as_their_table_has_it(with_target, kjt):
    got = with_target(kjt)
    assert got.keys() == with_target.keys == ["clicked", "bought", "shown"]
    weight = with_target.embedding_collection.embeddings["t_item"].weight
    assert torch.equal(got["shown"], weight[kjt["shown"].values()])
    for history in (CLICKS, BUYS):
        torch.testing.assert_close(got[history.item_key], row_by_row(with_target, history, kjt))
    assert not got["clicked"][1].any()  # no event, and a target all the same
    assert got["shown"][1].any()


def test_a_sparse_arch_brings_targets_last(with_target, kjt):
    base = dlrm().sparse_arch
    arch = HistorySparseArch(base, with_target)
    got = arch(kjt)
    assert (arch.F, arch.sparse_feature_names) == (5, ["user", "place", "clicked", "bought", "shown"])
    assert torch.equal(got, torch.cat([base(kjt), with_target(kjt).values().view(4, 3, WIDTH)], dim=1))


def test_a_tables_row_learns_from_the_history_and_from_the_target():
    kjt = features({"clicked": [3]})
    ids = {key: set(kjt[key].values().tolist()) for key in ("clicked", "shown")}
    assert not ids["clicked"] & ids["shown"]
    collection = HistoryCollection(items("clicked", "shown"), encoder(), SHOWN)
    for key in ids:
        collection.zero_grad()
        collection(kjt)[key].square().sum().backward()
        grad = collection.embedding_collection.embeddings["t_item"].weight.grad
        assert set(grad.any(dim=1).nonzero().flatten().tolist()) == ids[key]


WRONG_TARGETS = {"none": [1, 0, 1, 1], "two": [1, 1, 1, 2], "as-many-in-all": [1, 0, 2, 1], "no-row-has-one": [0] * 4}


@pytest.mark.parametrize("name", WRONG_TARGETS)
def test_a_row_without_its_one_target_is_refused(name, with_target):
    shown = WRONG_TARGETS[name]
    row = next(row for row, count in enumerate(shown) if count != 1)
    kjt = features({"clicked": LENGTHS, "bought": LENGTHS}, shown=shown)
    with pytest.raises(DataError, match=rf"row must have one shown, .* got {shown[row]} in row {row}; give one"):
        with_target(kjt)


def test_where_a_comparison_would_wait_their_number_tells_and_the_rest_is_believed(with_target, monkeypatch):
    """As on a GPU."""
    monkeypatch.setattr("ssd_torchrec.models.history._surely_equal", lambda *_: True)
    for name in ("none", "two", "no-row-has-one"):
        with pytest.raises(DataError, match=r"row must have one shown"):
            with_target(features({"clicked": LENGTHS, "bought": LENGTHS}, shown=WRONG_TARGETS[name]))
    with_target(features({"clicked": LENGTHS, "bought": LENGTHS}, shown=WRONG_TARGETS["as-many-in-all"]))


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_batch_without_any_event_is_all_zeros_and_still_reaches_every_weight(pooling):
    collection = HistoryCollection(items(), encoder(), replace(CLICKS, pooling=pooling))
    got = collection(features({"clicked": [0, 0]})).values()
    assert got.shape == (2, WIDTH)
    assert not got.any()
    got.sum().backward()
    without = [name for name, weight in collection.named_parameters() if weight.grad is None]
    assert not without  # a wrapper that expects every gradient in every step, as DDP does, waits for none in vain


def test_int32_ids_and_times_are_taken(kjt):
    collection = HistoryCollection(items(), encoder(), CLICKS)
    narrow = KeyedJaggedTensor(keys=kjt.keys(), values=kjt.values().int(), lengths=kjt.lengths().int())
    torch.testing.assert_close(collection(narrow).values(), collection(kjt).values())


def test_a_promised_layout_is_the_counted_one():
    counted = JaggedLayout.from_lengths(LENGTHS)
    promised = JaggedLayout.promised(torch.tensor(LENGTHS, dtype=torch.int32), sum(LENGTHS), 9)
    for name in ("offsets", "row_of_event", "position", "last_event"):
        assert torch.equal(getattr(promised, name), getattr(counted, name)), name
    assert (counted.longest, promised.longest) == (7, 9)
    with pytest.raises(RuntimeError):
        JaggedLayout.promised(torch.tensor(LENGTHS), sum(LENGTHS), 6)


@pytest.mark.parametrize("longest", [7, 8])
def test_rows_within_the_promise_are_encoded_alike(longest, kjt):
    torch.manual_seed(0)
    collection = HistoryCollection(items(), encoder(), CLICKS)
    capped = HistoryCollection(
        collection.embedding_collection, collection.tower.encoders[0], replace(CLICKS, longest=longest)
    )
    assert torch.equal(capped(kjt).values(), collection(kjt).values())


def test_a_row_longer_than_promised_is_refused(kjt):
    collection = HistoryCollection(items(), encoder(), replace(CLICKS, longest=6))
    with pytest.raises(DataError, match=r"rows of clicked must have at most 6 events, .* got 7"):
        collection(kjt)


def test_a_batch_without_the_times_is_refused_by_name(kjt):
    collection = HistoryCollection(items(), encoder(), History(item_key="clicked", timestamp_key="when"))
    with pytest.raises(DataError, match=r"must bring when, the times of clicked, got the keys user, place, clicked"):
        collection(kjt)


@pytest.mark.parametrize("other", ["bought_at", "user"])
def test_times_of_other_rows_are_refused(other, kjt):
    collection = HistoryCollection(items(), encoder(), History(item_key="clicked", timestamp_key=other))
    with pytest.raises(DataError, match=rf"each event of clicked must have its time in {other}, got 11 events"):
        collection(kjt)


def test_as_many_times_in_other_rows_are_refused():
    kjt = features({"clicked": [3, 1], "bought": [1, 3]})
    collection = HistoryCollection(items(), encoder(), History(item_key="clicked", timestamp_key="bought_at"))
    with pytest.raises(DataError, match=r"got 4 events and 4 times, or other rows"):
        collection(kjt)


def two_tables() -> EmbeddingCollection:
    """The items shown in a table of their own."""
    tables = [
        EmbeddingConfig(name=name, embedding_dim=WIDTH, num_embeddings=ITEMS, feature_names=[feature])
        for name, feature in {"t_item": "clicked", "t_other": "shown"}.items()
    ]
    return EmbeddingCollection(tables=tables)


REFUSED = {
    "unknown-items": (
        lambda: HistoryCollection(items(), encoder(), BUYS),
        r"item_key must be a feature of the EmbeddingCollection \(clicked\), got bought; add it",
    ),
    "owned-times": (
        lambda: HistoryCollection(items("clicked", "clicked_at"), encoder(), CLICKS),
        r"got clicked_at, the times of clicked, as a feature of the EmbeddingCollection; take it out",
    ),
    "times-owned-by-the-dlrm": (
        lambda: HistorySparseArch(
            dlrm().sparse_arch,
            HistoryCollection(items(), encoder(), History(item_key="clicked", timestamp_key="user")),
        ),
        r"got user, the times of clicked, as a feature of the DLRM's EmbeddingBagCollection",
    ),
    "wide-encoder": (
        lambda: HistoryCollection(items(), encoder(32), CLICKS),
        r"encoder of clicked must be as wide as its table, got 32 and 16",
    ),
    "wide-histories": (
        lambda: HistorySparseArch(dlrm().sparse_arch, HistoryCollection(items(width=32), encoder(32), CLICKS)),
        r"as wide as the DLRM's features, got 32 and 16; build encoder and item table 16 wide",
    ),
    "no-sparse-arch": (
        lambda: HistorySparseArch(bags(), HistoryCollection(items(), encoder(), CLICKS)),
        r"base must be a SparseArch, .* got EmbeddingBagCollection; give dlrm.sparse_arch",
    ),
    "twice": (lambda: HistoryCollection(items(), encoder(), [CLICKS, CLICKS]), r"got clicked twice; drop one"),
    "none": (lambda: HistoryCollection(items(), encoder(), []), r"at least one history, got none"),
    "too-few-encoders": (
        lambda: HistoryCollection(items("clicked", "bought"), [encoder()], [CLICKS, BUYS]),
        r"got 1 encoders for 2 histories",
    ),
    "unknown-target": (
        lambda: HistoryCollection(items(), encoder(), SHOWN),
        r"target_key must be a feature of t_item, the table of clicked \(clicked\), got shown; add it to that",
    ),
    "target-of-another-table": (
        lambda: HistoryCollection(two_tables(), encoder(), SHOWN),
        r"feature of t_item, the table of clicked \(clicked\), got shown, a feature of t_other; add it to that",
    ),
    "target-is-a-history": (
        lambda: HistoryCollection(items("clicked", "bought"), encoder(), [replace(SHOWN, target_key="bought"), BUYS]),
        r"target_key must be no history's item_key, got bought",
    ),
    "target-is-its-items": (
        lambda: replace(SHOWN, target_key="clicked"),
        r"target_key must differ .* got clicked twice",
    ),
    "target-is-its-times": (lambda: replace(SHOWN, target_key="clicked_at"), r"must differ .* got clicked_at twice"),
    "one-key": (lambda: History(item_key="a", timestamp_key="a"), r"must differ, got a twice"),
    "no-longest": (lambda: replace(CLICKS, longest=0), r"longest must be at least 1, got 0 for clicked"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_when_it_is_built(name):
    build, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        build()
