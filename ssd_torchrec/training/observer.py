"""What a run tells while it goes: a progress bar and two logs on rank 0, nothing on the others."""

from contextlib import ExitStack
from pathlib import Path

from ssd_torchrec.training.loop import Position
from ssd_torchrec.training.metrics import SELECTION_METRIC
from ssd_torchrec.training.progress import Progress
from ssd_torchrec.training.tracking import MetricsLog


class RunObserver:
    """Follows one training; a context manager.

    Args:
        folder: the run's folder.
        description: a word or two before the bar.
        position: where the run begins or goes on; what was logged after it is dropped.
        total_steps: steps of the whole run.
        speaks: whether this rank does.
        selection: the validation figure to keep in view.
    """

    def __init__(
        self,
        folder: Path,
        description: str,
        position: Position,
        total_steps: int,
        *,
        speaks: bool,
        selection: str = SELECTION_METRIC,
    ) -> None:
        self._speaks = speaks
        self._stack = ExitStack()
        self._last = (0.0, 0.0, 0.0)
        if speaks:
            self._log = MetricsLog(folder, resume_step=position.step)
            self._progress = Progress(total_steps, description, first_step=position.step, selection=selection)

    def __enter__(self) -> "RunObserver":
        if self._speaks:
            self._stack.enter_context(self._log)
            self._stack.enter_context(self._progress)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def step(self, position: Position, loss_nats: float, learning_rate: float, targets_per_s: float) -> None:
        """A line of the log and a move of the bar."""
        if not self._speaks:
            return
        self._last = (loss_nats, learning_rate, targets_per_s)
        values = {"loss_nats": loss_nats, "learning_rate": learning_rate, "events_per_s": targets_per_s}
        self._log.step(position.step, values | {"epoch": float(position.epoch)})
        self._progress.update(position.step, *self._last)

    def validated(self, position: Position, figures: dict[str, float]) -> None:
        """Validation figures after an epoch."""
        if not self._speaks:
            return
        self._log.evaluation(position.step, "valid", figures)
        self._progress.update(position.step, *self._last, valid=figures)
