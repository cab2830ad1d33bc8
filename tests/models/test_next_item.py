from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torchrec import KeyedJaggedTensor

from ssd_torchrec.data.batch import IDS_A_ROW, Batch
from ssd_torchrec.data.rows import even_offsets
from ssd_torchrec.encoders.tim4rec import TiM4Rec, TiM4RecConfig
from ssd_torchrec.errors import ConfigError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.models.next_item import BinaryCrossEntropyLoss, FullSoftmaxLoss, NextItemModel, TablesConfig

FIRST, ROWS, SEGMENTS = 3, 23, 4
ENCODER = TiM4RecConfig(width=16, head_width=8, state=8, dropout=0.0, time_dropout=0.0)


def model(world_size: int = 1, context: bool = True, event_columns: dict[str, int] | None = None) -> NextItemModel:
    torch.manual_seed(0)
    tables = TablesConfig(
        num_item_rows=ROWS,
        first_item=FIRST,
        context={"segment": SEGMENTS} if context else {},
        event_columns=event_columns or {},
    )
    return NextItemModel(tables, TiM4Rec(ENCODER), FullSoftmaxLoss(world_size))


def batch(rows: list[list[int]], segments: list[list[int]], global_targets: int | None = None) -> Batch:
    """Rows of item ids, of which all but the last are history and all but the first are targets."""
    history = [row[:-1] for row in rows]
    lengths = [len(row) for row in history]
    items = torch.tensor([i for row in history for i in row], dtype=torch.int64)
    target = torch.tensor([i - FIRST for row in rows for i in row[1:]], dtype=torch.int64)
    candidates = torch.arange(FIRST, ROWS)
    bags = torch.tensor([i for bag in segments for i in bag], dtype=torch.int64)
    features = KeyedJaggedTensor(
        keys=["item", "timestamp", "candidate", "segment"],
        values=torch.cat([items, 1000 * torch.arange(len(items)), candidates, bags]),
        lengths=torch.tensor([*lengths, *lengths, len(candidates), *[0] * (len(rows) - 1), *map(len, segments)]),
    )
    return Batch(features, JaggedLayout.from_lengths(lengths), target, global_targets or len(target))


USERS = [[3, 5, 9, 22], [4, 4, 6], [7, 10, 3, 3, 8]]
BAGS = [[0], [1, 2], []]


def test_loss_is_the_mean_cross_entropy_over_all_items():
    net, users = model(), batch(USERS, BAGS)
    loss, local = net(users)
    embedded = net.items(users.features)
    queries = net.tower(embedded["item"].values(), net.contexts(users.features).values(), users)
    wanted = F.cross_entropy(queries @ embedded["candidate"].values().T, users.target)
    torch.testing.assert_close(loss, wanted)
    assert local.tolist() == pytest.approx([wanted.item() * 9, 9.0])


def test_against_others_the_loss_is_that_of_two_binary_answers():
    net, users = model(), batch(USERS, BAGS)
    users.target[2] = -1
    negative = (users.target + 1) % 20
    net.loss = BinaryCrossEntropyLoss()
    loss, local = net(replace(users, negative=negative, global_targets=8))
    embedded = net.items(users.features)
    scores = net.tower(embedded["item"].values(), net.contexts(users.features).values(), users)
    scores = scores @ embedded["candidate"].values().T
    asked = users.target >= 0
    right, wrong = (scores[asked].gather(1, of[asked, None]) for of in (users.target, negative))
    wanted = F.binary_cross_entropy_with_logits(right, torch.ones_like(right))
    wanted = wanted + F.binary_cross_entropy_with_logits(wrong, torch.zeros_like(wrong))
    torch.testing.assert_close(loss, wanted)
    assert local.tolist() == pytest.approx([wanted.item() * 8, 8.0])


def test_shares_of_a_global_batch_add_up_to_it():
    whole, _ = model()(batch(USERS, BAGS))
    shares = [batch(USERS[:1], BAGS[:1], 9), batch(USERS[1:], BAGS[1:], 9)]
    losses = [model(world_size=2)(share)[0] for share in shares]
    torch.testing.assert_close(sum(losses) / 2, whole)  # the mean over ranks, which is what gradients get


def test_a_rank_with_only_an_empty_row_has_zero_gradients_for_everything():
    net = model()
    loss, local = net(batch([[3]], [[]], global_targets=9))  # one event, so no history and no target
    loss.backward()
    assert local.tolist() == [0, 0]
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_every_parameter_learns():
    net = model()
    net(batch(USERS, BAGS))[0].backward()
    silent = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent


def test_only_items_are_candidates_and_reserved_rows_learn_nothing_as_answers():
    net = model()
    net(batch(USERS, BAGS))[0].backward()
    (table,) = (p for n, p in net.named_parameters() if n.startswith("items."))
    assert not table.grad[:FIRST].any()
    assert table.grad[FIRST:].any(dim=1).all()


def test_last_query_is_the_one_at_the_last_event_and_zero_for_an_empty_row():
    net = model().eval()
    users = batch([*USERS, [3]], [*BAGS, [0]])
    with torch.no_grad():
        queries = net.last_queries(users)
        alone = net.last_queries(batch(USERS[1:2], BAGS[1:2]))
    assert queries.shape == (4, 16)
    torch.testing.assert_close(queries[1], alone[0])
    assert not queries[3].any()


def test_no_history_at_all_has_zero_queries():
    with torch.no_grad():
        assert model().eval().last_queries(batch([[3]], [[0]])).tolist() == [[0.0] * 16]


def test_a_query_is_shifted_by_the_mean_of_each_bag_in_its_place():
    torch.manual_seed(0)
    context = {"segment": SEGMENTS, "city": 6}
    net = NextItemModel(TablesConfig(num_item_rows=ROWS, first_item=FIRST, context=context), TiM4Rec(ENCODER))
    users, cities = batch(USERS, BAGS), [[5], [], [1, 4, 4, 2]]
    jagged = {key: users.features[key].to_dense() for key in users.features.keys()}  # noqa: SIM118  no dict
    jagged["city"] = [torch.tensor(bag, dtype=torch.int64) for bag in cities]
    keys = ["city", *(key for key in jagged if key != "city")]  # in another order than the tables
    features = KeyedJaggedTensor(
        keys=keys,
        values=torch.cat([values for key in keys for values in jagged[key]]),
        lengths=torch.tensor([len(values) for key in keys for values in jagged[key]]),
    )
    users = replace(users, features=features)
    events = net.items(features)["item"].values()
    got = net.tower(events, net.contexts(features).values(), users)
    means = [
        torch.stack([weight[bag].mean(0) if bag else torch.zeros(16) for bag in bags])
        for weight, bags in (
            (net.contexts.embedding_bags[name].weight, of) for name, of in (("segment", BAGS), ("city", cities))
        )
    ]
    shift = torch.cat(means, dim=1) @ net.tower.context_proj.weight.T
    wanted = net.tower.encoder(events, features["timestamp"].values(), users.layout)
    torch.testing.assert_close(got, wanted + shift[users.layout.row_of_event])


def test_context_shifts_what_a_user_is_asked():
    net = model().eval()
    with torch.no_grad():
        one, other = (net.last_queries(batch(USERS[:1], bag)) for bag in ([[0]], [[1]]))
    assert not torch.equal(one, other)


def test_a_model_without_context_has_no_bag_collection():
    net = model(context=False)
    assert net.contexts is None
    assert net(batch(USERS, BAGS))[0].isfinite()


def test_item_vectors_are_rows_of_the_table():
    net = model()
    (table,) = (p for n, p in net.named_parameters() if n.startswith("items."))
    assert torch.equal(net.item_vectors(torch.tensor([22, 3])), table[[22, 3]])


@pytest.mark.parametrize("first_item", [0, 5])
def test_a_table_without_items_or_reserved_rows_is_refused(first_item):
    with pytest.raises(ConfigError, match="at least one item"):
        TablesConfig(num_item_rows=5, first_item=first_item)


def test_an_empty_context_feature_is_refused():
    with pytest.raises(ConfigError, match="drop them"):
        TablesConfig(num_item_rows=5, first_item=1, context={"segment": 0})


COLUMNS = {"action": 5, "channel": 3}


def told(net: NextItemModel) -> NextItemModel:
    """The model with event columns that say something already."""
    torch.manual_seed(1)
    assert net.event_columns is not None
    for weight in net.event_columns.parameters():
        torch.nn.init.normal_(weight)
    return net.eval()


def acting(rows: list[list[int]], segments: list[list[int]], **columns: list[int]) -> Batch:
    """The same batch with an id of each column for each event of the histories; by default those that items decide."""
    plain = batch(rows, segments)
    item = plain.features["item"]
    values = [torch.tensor(columns[name]) if name in columns else item.values() % n for name, n in COLUMNS.items()]
    features = KeyedJaggedTensor(
        keys=[*plain.features.keys(), *COLUMNS],
        values=torch.cat([plain.features.values(), *values]),
        lengths=torch.cat([plain.features.lengths(), *[item.lengths()] * len(values)]),
    )
    return replace(plain, features=features)


def test_event_columns_are_added_to_the_vectors_of_their_events():
    net = told(model(event_columns=COLUMNS))
    users = acting(USERS, BAGS)
    table, (action, channel) = next(net.items.parameters()), net.event_columns.parameters()
    item = users.features["item"].values()
    events = table[item] + action[item % 5] + channel[item % 3]
    with torch.no_grad():
        wanted = net.tower(events, net.contexts(users.features).values(), users)
        loss, _ = net(users)
        last = net.last_queries(users)
    torch.testing.assert_close(loss, F.cross_entropy(wanted @ table[FIRST:].T, users.target))
    torch.testing.assert_close(last, wanted[[2, 4, 8]])


def test_at_first_event_columns_say_nothing_and_all_they_show_learns():
    net, plain = model(event_columns=COLUMNS), model()
    plain.load_state_dict(net.state_dict(), strict=False)
    users = acting(USERS, BAGS)
    loss, _ = net(users)
    assert torch.equal(loss, plain(users)[0])
    loss.backward()
    for name, weight in net.event_columns.named_parameters():
        seen = users.features[name.split(".")[1]].values().unique()
        assert weight.grad[seen].any(dim=1).all(), name
        assert weight.grad.any(dim=1).sum() == len(seen), name


def test_columns_of_the_next_event_do_not_reach_the_query_that_asks_for_it():
    net = told(model(event_columns=COLUMNS))

    def queries(action: list[int]) -> torch.Tensor:
        users = acting([[3, 5, 9, 22, 4]], [[0]], action=action)
        with torch.no_grad():
            return net._queries(net.items(users.features), users)

    one, other = queries([1, 2, 3, 4]), queries([1, 2, 4, 4])
    assert torch.equal(one[:2], other[:2])
    assert (one[2:] != other[2:]).any(dim=1).all()


def test_candidates_are_items_alone():
    net = told(model(event_columns=COLUMNS))
    table = next(net.items.parameters())
    assert torch.equal(net.item_vectors(torch.tensor([22, 3])), table[[22, 3]])
    assert torch.equal(net.items(acting(USERS, BAGS).features)["candidate"].values(), table[FIRST:])


@pytest.mark.parametrize("count", [0, 1, IDS_A_ROW, 3 * IDS_A_ROW + 1])
def test_vectors_of_any_number_of_ids_come_in_their_order(count):
    net = model()
    ids = torch.arange(count) * 7 % ROWS
    assert torch.equal(net.item_vectors(ids), next(net.items.parameters())[ids])


def relaid(batch: Batch, rows: int) -> Batch:
    """The same ids in more rows: bags before empty ones, all others evenly."""
    keys, lengths = batch.features.keys(), []
    for key in keys:
        bags = batch.features[key].lengths()
        spread = torch.from_numpy(even_offsets(int(bags.sum()), rows)).diff()
        lengths.append(F.pad(bags, (0, rows - len(bags))) if key == "segment" else spread)
    features = KeyedJaggedTensor(keys=keys, values=batch.features.values(), lengths=torch.cat(lengths))
    return replace(batch, features=features)


def test_rows_of_ids_are_those_of_the_layout_however_the_features_are_cut():
    net = told(model(event_columns=COLUMNS))
    users = acting(USERS, BAGS)
    again = relaid(users, 7)
    assert again.features.stride() == 7
    assert torch.equal(net(again)[0], net(users)[0])
    assert torch.equal(net.last_queries(again), net.last_queries(users))


def test_no_history_has_no_event_columns_either():
    net = told(model(event_columns=COLUMNS))
    assert net.last_queries(acting([[3]], [[0]])).tolist() == [[0.0] * 16]
    loss, _ = net(replace(acting([[3]], [[0]]), global_targets=9))
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in net.parameters())


def test_a_model_without_event_columns_has_no_collection_of_them():
    assert model().event_columns is None


def test_event_columns_without_ids_or_a_name_of_their_own_are_refused():
    with pytest.raises(ConfigError, match=r"event columns must have at least 1 id, got \['action'\]"):
        TablesConfig(num_item_rows=5, first_item=1, event_columns={"action": 0})
    with pytest.raises(ConfigError, match=r"names of their own, got \['city'\] twice"):
        TablesConfig(num_item_rows=5, first_item=1, event_columns={"city": 2}, context={"city": 2})
