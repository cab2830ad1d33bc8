"""A plugged DLRM starts as the old one and learns from histories; whoever drives it drives it as before."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torchrec.models.dlrm import DLRM, DLRMTrain, InteractionArch

from ssd_torchrec.encoders.registry import SYSTEMS
from ssd_torchrec.errors import ConfigError
from ssd_torchrec.models.dlrm import HistoryInteractionArch, WidenedLinear, plug_into_dlrm
from ssd_torchrec.models.history import History, HistorySparseArch
from tests.models.clicks import BUYS, CLICKS, DENSE, ITEMS, KINDS, SHOWN, WIDTH, batch, dlrm, encoder, features, items

LENGTHS = [3, 0, 7, 1, 20, 2]
PLUGGED = {"history": CLICKS, "history-and-target": SHOWN}


def plugged(kind: str, warm_start: bool = True, history: History = CLICKS) -> tuple[DLRM, DLRM]:
    """The old model, and a copy with a history."""
    torch.manual_seed(0)
    old, table = dlrm(kind), items("clicked", "shown")
    return old, plug_into_dlrm(copy.deepcopy(old), table, encoder(), history, warm_start=warm_start)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}


def of_history(name: str) -> bool:
    return "sparse_arch.histories." in name


def is_added(name: str) -> bool:
    return name.endswith(".added")


@pytest.mark.parametrize("name", PLUGGED)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 6, 257])
def test_the_first_logits_are_the_old_models(rows, kind, name):
    old, new = plugged(kind, history=PLUGGED[name])
    lengths = (LENGTHS * 50)[:rows]
    asked = batch(lengths)
    before, after = (model(asked.dense_features, asked.sparse_features) for model in (old, new))
    assert len({*before.flatten().tolist()}) == rows
    if kind == "DLRM_DCN":
        torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    else:
        assert torch.equal(after, before)


@pytest.mark.parametrize("kind", KINDS)
def test_two_histories_start_as_the_old_model_too(kind):
    torch.manual_seed(0)
    old = dlrm(kind)
    new = plug_into_dlrm(copy.deepcopy(old), items("clicked", "bought"), [encoder(), encoder()], [CLICKS, BUYS])
    kjt, dense = features({"clicked": LENGTHS, "bought": LENGTHS[::-1]}), torch.randn(len(LENGTHS), DENSE)
    torch.testing.assert_close(new(dense, kjt), old(dense, kjt), rtol=0, atol=1e-5 if kind == "DLRM_DCN" else 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_old_weights_are_used_on_under_their_names(kind):
    torch.manual_seed(0)
    model = dlrm(kind)
    before = dict(model.named_parameters())
    plug_into_dlrm(model, items(), encoder(), CLICKS)
    after = dict(model.named_parameters())
    for name, weight in before.items():
        moved = name.replace("sparse_arch.", "sparse_arch.base.").replace("inter_arch.model", "inter_arch.base.model")
        if "crossnet" in name:
            grown = after[moved]
            assert torch.equal(grown[tuple(slice(n) for n in weight.shape)], weight), name
            assert grown.count_nonzero() == weight.count_nonzero()
        else:
            assert after[moved] is weight, name


@pytest.mark.parametrize("name", PLUGGED)
@pytest.mark.parametrize("kind", KINDS)
def test_the_added_map_learns_from_the_first_step_and_what_is_behind_it_from_the_second(kind, name):
    _, model = plugged(kind, history=PLUGGED[name])
    train = DLRMTrain(model)
    optimizer = torch.optim.SGD(train.parameters(), lr=0.5)
    learned = []
    for step in range(2):
        optimizer.zero_grad()
        train(batch(LENGTHS, step))[0].backward()
        learned.append({name for name, grad in gradients(train).items() if grad.any()})
        optimizer.step()
    assert {name for name in learned[0] if is_added(name)}
    assert not {name for name in learned[0] if of_history(name)}
    behind = {name for name, _ in train.named_parameters() if of_history(name)}
    assert behind <= learned[1]


def take_some_steps(model: DLRM) -> None:
    train = DLRMTrain(model)
    optimizer = torch.optim.Adam(train.parameters(), lr=0.02)
    for step in range(10):
        optimizer.zero_grad()
        train(batch(LENGTHS, step))[0].backward()
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_after_some_steps_order_and_times_matter(kind):
    _, model = plugged(kind)
    take_some_steps(model)
    asked = batch([5])
    ids, times = asked.sparse_features["clicked"].values(), asked.sparse_features["clicked_at"].values()
    logits = [model(asked.dense_features, asked.sparse_features).item()]
    swapped, late = ids.clone(), times.clone()
    swapped[[1, 2]] = ids[[2, 1]]
    late[-1] += 10**6
    for key, other in (("clicked", swapped), ("clicked_at", late)):
        kjt = features({"clicked": [5]})
        kjt[key].values().copy_(other)
        logits.append(model(asked.dense_features, kjt).item())
    assert len(set(logits)) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_after_some_steps_it_matters_which_item_is_shown(kind):
    _, model = plugged(kind, history=SHOWN)
    take_some_steps(model)
    asked = batch([5])
    before = model(asked.dense_features, asked.sparse_features)
    asked.sparse_features["shown"].values().add_(1).remainder_(ITEMS)
    assert model(asked.dense_features, asked.sparse_features) != before


def test_a_dot_interaction_multiplies_the_target_with_the_history_and_with_all_others():
    _, model = plugged("DLRM", history=SHOWN)
    asked = batch(LENGTHS)
    sparse = model.sparse_arch(asked.sparse_features)
    dense = model.dense_arch(asked.dense_features)
    crossed = model.inter_arch(dense, sparse)
    history, target = sparse[:, -2], sparse[:, -1]
    weight = model.sparse_arch.histories.embedding_collection.embeddings["t_item"].weight
    assert torch.equal(target, weight[asked.sparse_features["shown"].values()])
    for other in (history, dense, sparse[:, 0], sparse[:, 1]):
        product = (target * other).sum(1)
        assert any(torch.allclose(product, column, atol=1e-6) for column in crossed.T)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_warm_start_histories_count_from_the_beginning(kind):
    old, new = plugged(kind, warm_start=False)
    asked = batch(LENGTHS)
    before, after = (model(asked.dense_features, asked.sparse_features) for model in (old, new))
    assert (after - before).abs().max() > 1e-4


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_plugs_in_and_learns(system):
    torch.manual_seed(0)
    shape = SYSTEMS[system].small
    model = dlrm_of(shape.width)
    plug_into_dlrm(model, items(width=shape.width), shape.build(), CLICKS)
    train = DLRMTrain(model)
    optimizer = torch.optim.Adam(train.parameters(), lr=0.01)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss, _ = train(batch(LENGTHS))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(later < before for before, later in pairwise(losses[::4]))
    assert all(grad.isfinite().all() for grad in gradients(train).values())
    assert any(grad.any() for name, grad in gradients(train).items() if of_history(name) and "tower" in name)


def dlrm_of(width: int) -> DLRM:
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig

    tables = [
        EmbeddingBagConfig(name=f"t_{name}", embedding_dim=width, num_embeddings=30, feature_names=[name])
        for name in ("user", "place")
    ]
    return DLRM(EmbeddingBagCollection(tables=tables), DENSE, [8, width], [12, 1])


def test_the_added_interactions_are_all_dot_products_of_histories_and_the_histories():
    torch.manual_seed(0)
    dense, sparse = torch.randn(4, 3), torch.randn(4, 5, 3)
    arch = HistoryInteractionArch(InteractionArch(3), histories=2, width=3)
    got = arch(dense, sparse)
    old = InteractionArch(3)(dense, sparse[:, :3])
    assert torch.equal(got[:, : old.shape[1]], old)
    others = [dense, *(sparse[:, n] for n in range(3))]
    expected = [sparse[:, 3], sparse[:, 4]]
    expected += [(sparse[:, n] * other).sum(1, keepdim=True) for n in (3, 4) for other in others]
    expected += [(sparse[:, 3] * sparse[:, 4]).sum(1, keepdim=True)]
    torch.testing.assert_close(got[:, old.shape[1] :], torch.cat(expected, dim=1))
    assert arch.added_width == got.shape[1] - old.shape[1]


def test_a_widened_map_is_the_old_one_and_a_map_of_what_is_new():
    torch.manual_seed(0)
    old = nn.Linear(4, 3)
    wide = WidenedLinear(old, 2, warm_start=False)
    x = torch.randn(5, 6)
    torch.testing.assert_close(wide(x), old(x[:, :4]) + x[:, 4:] @ wide.added.T)
    assert wide.in_features == 6
    assert 0 < wide.added.abs().max() <= 6**-0.5


class Compiled(nn.Module):
    pass


def with_other_interaction() -> DLRM:
    model = dlrm()
    model.inter_arch = Compiled()
    return model


REFUSED = {
    "the-wrapper": (lambda: DLRMTrain(dlrm()), r"got DLRMTrain; give its .model"),
    "something-else": (lambda: nn.Linear(1, 1), r"got Linear; build one of torchrec.models.dlrm"),
    "twice": (lambda: plug_into_dlrm(dlrm(), items(), encoder(), CLICKS), r"has histories already"),
    "other-interaction": (with_other_interaction, r"got Compiled; plug before compiling"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_plugged_into_is_refused(name):
    build, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        plug_into_dlrm(build(), items(), encoder(), CLICKS)


def test_a_refused_dlrm_is_as_it_was():
    model = dlrm()
    parts = dict(model.named_children())
    with pytest.raises(ConfigError, match="as wide as the DLRM's features"):
        plug_into_dlrm(model, items(width=2 * WIDTH), encoder(2 * WIDTH), CLICKS)
    assert dict(model.named_children()) == parts
    assert not isinstance(model.sparse_arch, HistorySparseArch)
