from dataclasses import replace

import numpy as np
import pytest
import torch
from torchrec import KeyedJaggedTensor

from ssd_torchrec.data.batch import Batch
from ssd_torchrec.data.batch_plan import BatchConfig
from ssd_torchrec.data.batches import Share, TrainingBatches
from ssd_torchrec.data.negatives import NegativeSampler
from ssd_torchrec.data.objective import ObjectiveConfig
from ssd_torchrec.data.split import LeaveOneOut, spans_of
from ssd_torchrec.data.statistics import item_counts
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.models.next_item import FullSoftmaxLoss, SampledSoftmaxLoss
from tests.data.samples import FIRST_ITEM, NUM_ITEMS, dataset, random_rows

WIDTH, SHARED, OWN = 5, 7, 4
TARGETS = {
    "drawn": [0, 3, 6, 3],
    "not-drawn": [7, 9, 10, 9],
    "both-and-none": [0, 9, -1, 3, 9, -1, 3, 10],
    "one": [8],
    "none-asked": [-1, -1],
    "no-events": [],
}
DTYPES = {"fp64": (torch.float64, 1e-12), "fp32": (torch.float32, 2e-5)}


def batch_of(target, log_q, num_shared, global_targets=None):
    target = torch.tensor(target, dtype=torch.int64)
    features = KeyedJaggedTensor(keys=["item"], values=target, lengths=torch.tensor([len(target)]))
    layout = JaggedLayout.from_lengths([len(target)])
    return Batch(features, layout, target, global_targets or max(len(target), 1), log_q=log_q, num_shared=num_shared)


def problem(target, dtype=torch.float64, seed=0):
    """Queries, of which those that are not asked hold NaN; candidates; the batch."""
    generator = torch.Generator().manual_seed(seed)
    queries = 2 * torch.randn(len(target), WIDTH, generator=generator, dtype=torch.float64)
    queries[torch.tensor(target, dtype=torch.int64) == -1] = torch.nan
    candidates = torch.randn(SHARED + OWN, WIDTH, generator=generator, dtype=torch.float64)
    log_q = -3 * torch.rand(SHARED + OWN, generator=generator)
    leaves = [x.to(dtype).requires_grad_() for x in (queries, candidates)]
    return (*leaves, batch_of(target, log_q, SHARED))


def written_out(queries, candidates, batch):
    """The mean over the targets by the formula, query by query, in fp64."""
    total = torch.zeros((), dtype=torch.float64)
    for query, t in zip(queries.double(), batch.target.tolist(), strict=True):
        if t >= 0:
            score = [query @ candidates[k].double() - batch.log_q[k].double() for k in range(len(candidates))]
            terms = [score[t]] + [score[k] for k in range(batch.num_shared) if k != t]
            total = total + torch.stack(terms).exp().sum().log() - score[t]
    return total / batch.global_targets


def gradients(loss, *of):
    return torch.autograd.grad(loss, of)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_loss_and_gradients_are_those_of_the_formula(target, dtype):
    queries, candidates, batch = problem(target, dtype[0])
    loss, local = SampledSoftmaxLoss()(queries, candidates, batch)
    asked = sum(t >= 0 for t in target)
    assert local.tolist() == pytest.approx([loss.item() * batch.global_targets, asked])
    truth = [x.detach().double().requires_grad_() for x in (queries, candidates)]
    wanted = written_out(*truth, batch)
    assert loss.item() == pytest.approx(wanted.item(), abs=dtype[1])
    got = gradients(loss, queries, candidates)
    expected = gradients(wanted, *truth) if asked else [torch.zeros_like(x) for x in truth]
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=dtype[1])


def test_gradients_are_those_of_small_differences():
    queries, candidates, batch = problem([0, 9, 3, 9, 10, 3])
    torch.autograd.gradcheck(lambda q, c: SampledSoftmaxLoss()(q, c, batch)[0], (queries, candidates))


@pytest.mark.parametrize("right", [-200.0, 0.0, 200.0])
def test_scores_far_apart_neither_overflow_nor_vanish(right):
    queries = torch.tensor([[1.0], [1.0]], requires_grad=True)
    candidates = torch.tensor([[3.0], [1.0], [right]], requires_grad=True)
    batch = batch_of([2, 0], torch.zeros(3), 2)
    loss, _ = SampledSoftmaxLoss()(queries, candidates, batch)
    assert loss.item() == pytest.approx(written_out(queries, candidates, batch).item(), abs=1e-5)
    assert all(gradient.isfinite().all() for gradient in gradients(loss, queries, candidates))


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["fp64", "fp32"])
def test_with_the_whole_catalogue_it_is_the_full_softmax(dtype, close):
    queries, candidates, batch = problem([0, 9, -1, 3, 9], dtype)
    whole = replace(batch, num_shared=SHARED + OWN, log_q=torch.zeros(SHARED + OWN))
    results = [loss(queries, candidates, whole) for loss in (SampledSoftmaxLoss(), FullSoftmaxLoss())]
    (loss, local), (full, local_full) = results
    assert loss.item() == pytest.approx(full.item(), abs=close)
    assert local.tolist() == pytest.approx(local_full.tolist(), abs=5 * close)
    for ours, theirs in zip(*(gradients(r[0], queries, candidates) for r in results), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=close)


def test_autocast_changes_nothing():
    queries, candidates, batch = problem([0, 9, -1, 3, 9], torch.float32)
    plain, _ = SampledSoftmaxLoss()(queries, candidates, batch)
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = SampledSoftmaxLoss()(queries, candidates, batch)
    assert torch.equal(plain, cast)
    for one, other in zip(*(gradients(loss, queries, candidates) for loss in (plain, cast)), strict=True):
        assert torch.equal(one, other)


def gradients_by_popularity(score, targets_of, times=300):
    """By whether log_q is subtracted: mean gradient by an item's score over draws of negatives and targets."""
    items, mean = len(score), {True: 0.0, False: 0.0}
    counts = np.rint(1000 / (1 + np.arange(items)) ** 1.5).astype(np.int64) + 1
    sampler = NegativeSampler("popularity", 40, counts)
    for number in range(times):
        shared, right = sampler.shared(number), targets_of(number)
        listed = np.concatenate([shared.item, np.setdiff1d(right, shared.item)])
        place = [listed.tolist().index(item) for item in right]
        for corrects in mean:
            log_q = torch.from_numpy(shared.log_q(listed)) * corrects
            asked, one_hot = score.clone().requires_grad_(), torch.eye(items, dtype=score.dtype)
            batch = batch_of(place, log_q, len(shared.item))
            loss, _ = SampledSoftmaxLoss()(asked.expand(len(right), -1), one_hot[torch.from_numpy(listed)], batch)
            mean[corrects] = mean[corrects] + gradients(loss, asked)[0] / times
    return mean


def test_subtracting_log_q_brings_the_gradient_near_that_of_the_full_softmax():
    score = torch.randn(60, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    right = [0, 2, 9, 30, 59, 2]
    full = score.clone().requires_grad_()
    loss, _ = FullSoftmaxLoss()(full.expand(6, -1), torch.eye(60, dtype=torch.float64), batch_of(right, None, 0))
    (truth,) = gradients(loss, full)
    error = {c: (g - truth).norm().item() for c, g in gradients_by_popularity(score, lambda _: right).items()}
    assert error[True] < error[False] / 2


def test_with_log_q_the_chances_learned_are_the_true_ones():
    """Scores that are the log of the chances by which targets come are where the full softmax is at rest."""
    score = torch.randn(60, generator=torch.Generator().manual_seed(4), dtype=torch.float64).log_softmax(0)
    chances = score.exp().numpy()
    mean = gradients_by_popularity(score, lambda number: np.random.default_rng([7, number]).choice(60, 400, p=chances))
    assert mean[True].norm() < 0.02  # the noise of 300 draws
    assert mean[False].norm() > 0.1


@pytest.mark.parametrize("negatives", ["uniform", "log_uniform", "popularity", "in_batch"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_have_the_loss_of_one(negatives, world_size, tmp_path):
    histories = dataset(tmp_path / "set", random_rows([5, 12, 0, 30, 45, 1, 7, 22, 3, 18]))
    spans = spans_of(histories, LeaveOneOut())
    counts = item_counts(histories, spans).numpy()
    objective = ObjectiveConfig(loss="sampled_softmax", negatives=negatives, num_negatives=20)
    table = torch.randn(FIRST_ITEM + NUM_ITEMS, WIDTH, generator=torch.Generator().manual_seed(0))
    alone, *ranks = (
        TrainingBatches(histories, spans, BatchConfig(tokens_per_batch=40), share, objective, counts).epoch(0)
        for share in [Share(), *(Share(rank=rank, world_size=world_size) for rank in range(world_size))]
    )

    def loss_of(batch, size):
        queries = torch.stack([batch.features["timestamp"].values() % n for n in (7, 11, 13, 17, 19)], dim=1) / 10
        loss, _ = SampledSoftmaxLoss(size)(queries, table[batch.features["candidate"].values()], batch)
        return loss.item()

    losses = [[loss_of(batch, 1) for batch in alone], [loss_of(batch, world_size) for batch in ranks[0]]]
    for rank in ranks[1:]:
        losses[1] = [so_far + loss_of(batch, world_size) for so_far, batch in zip(losses[1], rank, strict=True)]
    assert len(losses[0]) > 3
    assert losses[0] == pytest.approx([total / world_size for total in losses[1]], abs=1e-6)
