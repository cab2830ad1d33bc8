"""The loop alone, on parts that only note what is asked of them."""

import os
import signal
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from ssd_torchrec.errors import Interrupted
from ssd_torchrec.training.config import TrainingConfig
from ssd_torchrec.training.interrupt import AGREE_EVERY
from ssd_torchrec.training.loop import Position, Steps, TrainingLoop

BATCHES = 5  # of an epoch


class Parts:
    """A run without a model: five batches an epoch, validation scores as given."""

    def __init__(self, scores: list[float], stop_at: int = -1) -> None:
        self.scores = iter(scores)
        self.stop_at = stop_at
        self.drawn: list[tuple[int, int]] = []
        self.done: list[tuple[int, int]] = []
        self.saved: list[tuple[Position, bool]] = []
        self.rate = 0.0
        self.rates: list[float] = []
        self.dropout: list[float] = []
        self.lines: list[tuple[int, float]] = []

    def batches(self, epoch: int, first: int):
        for number in range(first, BATCHES):
            self.drawn.append((epoch, number))
            yield epoch, number

    @contextmanager
    def pipeline(self):
        yield self

    def progress(self, batches) -> torch.Tensor:
        self.done.append(next(batches))
        self.rates.append(self.rate)
        self.dropout.append(float(torch.rand(())))
        if len(self.done) == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return torch.tensor([6.0, 3.0])

    def set_rate(self, factor: float) -> None:
        self.rate = factor

    def validate(self) -> dict[str, float]:
        return {"ndcg@10": next(self.scores)}

    def save(self, position: Position, best: bool) -> None:
        self.saved.append((position, best))

    def step(self, position: Position, loss_nats: float, learning_rate: float, targets_per_s: float) -> None:
        self.lines.append((position.step, loss_nats))

    def validated(self, position: Position, figures: dict[str, float]) -> None:
        pass

    def run(self, config: TrainingConfig, position: Position | None = None) -> Position:
        steps = Steps(
            pipeline=self.pipeline,  # type: ignore[arg-type]
            batches=self.batches,  # type: ignore[arg-type]
            set_rate=self.set_rate,
            validate=self.validate,
            save=self.save,
            reduce_sum=lambda x: x,
        )
        loop = TrainingLoop(config, steps, self, learning_rate=1.0, total_steps=BATCHES * config.epochs, rank=0)
        return loop.run(position or Position())


CONFIG = TrainingConfig(epochs=3, warmup_steps=2, checkpoint_every=0, log_every=2)


def test_every_batch_of_every_epoch_is_a_step():
    parts = Parts([0.1, 0.2, 0.3])
    end = parts.run(CONFIG)
    assert parts.done == [(e, b) for e in range(3) for b in range(BATCHES)]
    assert (end.epoch, end.batches, end.step) == (3, 0, 15)


def test_going_on_from_any_position_does_what_is_left_and_nothing_else():
    whole = Parts([0.1, 0.2, 0.3])
    whole.run(CONFIG)
    resumed = Parts([0.2, 0.3])
    resumed.run(CONFIG, Position(epoch=1, batches=3, step=8, best_epoch=1, best_score=0.1))
    assert resumed.drawn[0] == (1, 3)
    assert resumed.done == whole.done[8:]
    assert resumed.rates == whole.rates[8:]
    assert resumed.dropout == whole.dropout[8:]


def test_the_best_validation_is_marked_and_remembered():
    parts = Parts([0.2, 0.3, 0.1])
    end = parts.run(CONFIG)
    assert [best for _, best in parts.saved] == [True, True, False]
    assert (end.best_epoch, end.best_score, end.since_best) == (2, 0.3, 1)


def test_patience_ends_the_run():
    parts = Parts([0.3, 0.2, 0.1])
    assert parts.run(replace(CONFIG, patience=1)).epoch == 2


def test_validation_can_be_rarer_than_epochs_but_always_ends_a_run():
    parts = Parts([0.1, 0.2])
    parts.run(replace(CONFIG, evaluate_every=2))
    assert [position.epoch for position, _ in parts.saved] == [2, 3]


def test_checkpoints_come_every_so_many_steps_at_completed_batches():
    parts = Parts([0.1, 0.2, 0.3])
    parts.run(replace(CONFIG, checkpoint_every=4))
    between = [p for p, _ in parts.saved if p.step % 4 == 0]
    assert [(p.step, p.epoch, p.batches) for p in between] == [(4, 0, 4), (8, 1, 3), (12, 2, 2)]


def test_sigterm_saves_at_the_next_agreed_step_and_ends_the_run():
    parts = Parts([0.1, 0.2, 0.3], stop_at=1)
    with pytest.raises(Interrupted, match="--name"):
        parts.run(CONFIG)
    assert len(parts.done) == AGREE_EVERY
    (saved,) = parts.saved
    assert saved[0].step == AGREE_EVERY
    assert saved[1] is False


def test_sigterm_is_back_to_what_it_was_after_the_run():
    before = signal.getsignal(signal.SIGTERM)
    Parts([0.1, 0.2, 0.3]).run(CONFIG)
    assert signal.getsignal(signal.SIGTERM) == before


def test_logged_loss_is_a_mean_over_targets():
    parts = Parts([0.1, 0.2, 0.3])
    parts.run(CONFIG)
    assert parts.lines[0] == (2, 2.0)


def test_dropout_of_a_step_depends_on_seed_and_step():
    one, same, other = (Parts([0.1, 0.2, 0.3]) for _ in range(3))
    one.run(CONFIG)
    same.run(CONFIG)
    other.run(replace(CONFIG, seed=1))
    assert one.dropout == same.dropout
    assert not set(one.dropout) & set(other.dropout)
    assert len(set(one.dropout)) == len(one.dropout)
