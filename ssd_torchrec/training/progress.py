"""How far a run is: a live bar on a terminal, a line every few seconds where output is collected line by line.

Launchers collect: TorchX and schedulers read what a process writes from a file and put a prefix before each line.
There a bar that redraws itself turns to noise, so the same figures come as lines, with a small bar drawn in each.
"""

import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as LiveProgress
from rich.table import Column

from ssd_torchrec.training.metrics import SELECTION_METRIC

BAR_CELLS = 20
PLAIN_EVERY_S = 5.0


class Progress:
    """Shows the figures of the latest step, on one rank.

    Args:
        total_steps: step at which the run is complete.
        description: a word or two before the bar.
        first_step: steps done before, by the run that is resumed; the time left is judged by what comes after them.
        file: where to; a terminal gets the live bar.
        clock: monotonic seconds.
        selection: the validation figure to show.
    """

    def __init__(
        self,
        total_steps: int,
        description: str,
        *,
        first_step: int = 0,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        selection: str = SELECTION_METRIC,
    ) -> None:
        self._total = total_steps
        self._description = description
        self._first_step = first_step
        self._file = sys.stdout if file is None else file
        self._clock = clock
        self._selection = selection
        self._started_s = clock()
        self._printed_s = float("-inf")
        self._unprinted = ""
        self._valid = ""
        self._live = self._file.isatty()
        self._bar = LiveProgress(
            TextColumn("{task.description}", table_column=Column(min_width=len(description), no_wrap=True)),
            BarColumn(BAR_CELLS, table_column=Column(min_width=BAR_CELLS)),
            TextColumn(
                "{task.fields[figures]}", table_column=Column(ratio=1, no_wrap=True)
            ),  # a narrow window cuts these
            console=Console(file=self._file),
            disable=not self._live,
            expand=True,
        )
        self._task = self._bar.add_task(description, total=total_steps, completed=first_step, figures="starting")

    def __enter__(self) -> "Progress":
        self._started_s = self._clock()
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._unprinted:
            self._print(self._unprinted)
        self._bar.stop()

    def update(
        self,
        step: int,
        loss_nats: float,
        learning_rate: float,
        events_per_s: float,
        valid: Mapping[str, float] | None = None,
    ) -> None:
        """Show a completed step.

        Args:
            step: counts from 1.
            events_per_s: over all ranks.
            valid: metrics of a validation made at this step; the one that selects stays in view until the next one.
        """
        if valid is not None:
            self._valid = f"valid {self._selection} {valid[self._selection]:.4f}  "
        done = f"{100 * step // max(self._total, 1):3d} %  {duration(self._left_s(step))} left  loss {loss_nats:.4f}"
        speed = f"{events_per_s:,.0f} events/s  lr {learning_rate:.1e}  step {step}/{self._total}"
        figures = f"{done}  {self._valid}{speed}"
        if self._live:
            self._bar.update(self._task, completed=step, figures=figures)
            return
        self._unprinted = f"{self._description} {drawn_bar(step, self._total)} {figures}"
        due = self._clock() - self._printed_s >= PLAIN_EVERY_S
        if due or valid is not None or step >= self._total:
            self._print(self._unprinted)

    def note(self, text: str) -> None:
        """Print a line that stays, above the bar where there is one."""
        if self._live:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            self._write(text)

    def _print(self, line: str) -> None:
        self._write(line)
        self._printed_s = self._clock()
        self._unprinted = ""

    def _write(self, line: str) -> None:
        self._file.write(line + "\n")  # one write a line: launchers read the file while it grows
        self._file.flush()

    def _left_s(self, step: int) -> float:
        done = step - self._first_step
        return (self._clock() - self._started_s) / done * (self._total - step) if done > 0 else 0.0


def drawn_bar(step: int, total_steps: int) -> str:
    """A bar of fixed width in plain characters, full at the last step: `[#####...............]`."""
    filled = BAR_CELLS * min(step, total_steps) // max(total_steps, 1)
    return f"[{'#' * filled:.<{BAR_CELLS}}]"


def duration(seconds: float) -> str:
    """Minutes and seconds, `4:05`; from an hour on `1:04:05`. Rounded to the second."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
