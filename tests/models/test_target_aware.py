"""Candidates are scored by their row's state, encoded once, and by their vectors of the history's own table."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec import EmbeddingCollection, KeyedJaggedTensor

from ssd_torchrec.encoders.encoder import Encoder
from ssd_torchrec.encoders.registry import SYSTEMS
from ssd_torchrec.errors import ConfigError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.models.target_aware import CandidateScorer
from tests.models.clicks import CLICKS, ITEMS, SHOWN, WIDTH, encoder, features, items

LENGTHS = [3, 0, 7, 1, 5]
CANDIDATES = {"any-number": [2, 3, 0, 1, 4], "one-each": [1] * 5, "none-at-the-ends": [0, 2, 2, 2, 0], "none": [0] * 5}


def scorer(hidden: tuple[int, ...] = (12, 6)) -> CandidateScorer:
    """All weights drawn: time has no say in new ones, and the last layer is zero."""
    torch.manual_seed(0)
    model = CandidateScorer(items("clicked", "shown"), encoder(), CLICKS, "shown", hidden=hidden)
    with torch.no_grad():
        for weight in model.head.parameters():
            weight.normal_(std=0.3)
    return model


def vectors(model: CandidateScorer, ids: Tensor) -> Tensor:
    return model.embedding_collection.embeddings["t_item"].weight[ids]


def by_hand(model: CandidateScorer, kjt: KeyedJaggedTensor) -> list[Tensor]:
    """Each candidate on its own, its row's history encoded for it alone."""
    logits = []
    of_row = [kjt[key].to_dense() for key in ("clicked", "clicked_at", "shown")]
    for ids, times, candidates in zip(*of_row, strict=True):
        for candidate in candidates:
            state = torch.zeros(WIDTH)
            if len(ids):
                layout = JaggedLayout.from_lengths([len(ids)])
                state = model.head.tower.encoders[0](vectors(model, ids), times, layout)[-1]
            vector = vectors(model, candidate)
            added = model.head.mlp(torch.cat([state, vector, state * vector]))
            logits.append(state @ vector + added.squeeze())
    return logits


@pytest.mark.parametrize("hidden", [(12, 6), (8,), ()])
@pytest.mark.parametrize("name", CANDIDATES)
def test_each_candidate_is_scored_as_if_it_were_alone(name, hidden):
    model, kjt = scorer(hidden), features({"clicked": LENGTHS}, shown=CANDIDATES[name])
    got, expected = model(kjt), by_hand(model, kjt)
    assert got.shape == (sum(CANDIDATES[name]),)
    torch.testing.assert_close(got, torch.stack(expected) if expected else torch.zeros(0))


def test_a_row_is_encoded_once_however_many_candidates_it_has():
    model, seen = scorer(), []
    model.head.tower.encoders[0].register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    model(features({"clicked": LENGTHS}, shown=[40, 30, 0, 20, 10]))
    assert seen == [sum(LENGTHS)]


def test_several_candidates_of_a_row_score_as_that_row_once_for_each():
    model, kjt = scorer(), features({"clicked": [4]}, shown=[3])
    parts = {key: kjt[key].values() for key in ("clicked", "clicked_at", "shown")}
    repeated = KeyedJaggedTensor.from_lengths_sync(
        keys=list(parts),
        values=torch.cat([parts["clicked"].repeat(3), parts["clicked_at"].repeat(3), parts["shown"]]),
        lengths=torch.tensor([4, 4, 4, 4, 4, 4, 1, 1, 1]),
    )
    torch.testing.assert_close(model(kjt), model(repeated))


def test_a_new_scorer_begins_with_dot_products():
    model = CandidateScorer(items("clicked", "shown"), encoder(), CLICKS, "shown")
    kjt = features({"clicked": LENGTHS}, shown=CANDIDATES["any-number"])
    states = model.head.tower(model.embedding_collection(kjt), kjt)
    rows = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(CANDIDATES["any-number"]))
    expected = (states[rows] * vectors(model, kjt["shown"].values())).sum(1)
    assert expected.any()
    assert torch.equal(model(kjt), expected)


@pytest.mark.parametrize("name", CANDIDATES)
def test_every_weight_has_a_gradient_in_every_batch(name):
    model = scorer()
    model(features({"clicked": [0] * 5}, shown=CANDIDATES[name])).sum().backward()
    assert not [name for name, weight in model.named_parameters() if weight.grad is None]


def train(model: nn.Module, rows: int, steps: int) -> list[float]:
    """Losses of a rule that only who compares knows: candidates of the last item's half of the catalogue are taken."""
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.02), []
    for step in range(steps):
        kjt = features({"clicked": [3] * rows}, seed=step, shown=[2] * rows)
        last, shown = kjt["clicked"].values().view(rows, 3)[:, -1:], kjt["shown"].values().view(rows, 2)
        labels = ((last < ITEMS // 2) == (shown < ITEMS // 2)).flatten().float()
        optimizer.zero_grad()
        loss = binary_cross_entropy_with_logits(model(kjt), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_it_learns_which_candidates_go_with_a_history():
    torch.manual_seed(0)
    model = CandidateScorer(items("clicked", "shown"), encoder(), CLICKS, "shown", hidden=(16,))
    losses = train(model, rows=64, steps=80)
    assert sum(losses[-5:]) / 5 < 0.3 < 0.65 < losses[0]


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_scores_and_learns(system):
    torch.manual_seed(0)
    shape = SYSTEMS[system].small
    table = items("clicked", "shown", width=shape.width)
    model = CandidateScorer(table, shape.build(), CLICKS, "shown", hidden=(8,))
    train(model, rows=4, steps=2)
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())


def built(table: EmbeddingCollection | None = None, encoder: Encoder | None = None, **given: object) -> CandidateScorer:
    asked = {"history": CLICKS, "candidate_key": "shown"} | given
    return CandidateScorer(table or items("clicked", "shown"), encoder or small(), **asked)  # type: ignore[arg-type]


def small() -> Encoder:
    return encoder()


REFUSED = {
    "other-table": (
        lambda: built(table=items("clicked")),
        r"candidate_key must be a feature of t_item, the table of clicked \(clicked\), got shown; add it",
    ),
    "the-history-itself": (lambda: built(candidate_key="clicked"), r"must differ from the history's keys, got clicked"),
    "its-times": (lambda: built(candidate_key="clicked_at"), r"must differ from the history's keys, got clicked_at"),
    "target-in-the-history": (lambda: built(history=SHOWN), r"must have no target_key, got shown; give it as"),
    "no-width": (lambda: built(hidden=(8, 0)), r"hidden must be at least 1 wide each, got \(8, 0\)"),
    "wide-encoder": (lambda: built(encoder=encoder(32)), r"as wide as its table, got 32 and 16"),
    "unknown-items": (
        lambda: built(history=replace(CLICKS, item_key="read")),
        r"item_key must be a feature of the EmbeddingCollection \(clicked, shown\), got read",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_when_it_is_built(name):
    build, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        build()
