"""What a run leaves while it goes: runs/NAME/metrics.jsonl and TensorBoard events beside it.

    {"kind": "step", "step": 20, "wall_s": 1.9, "loss_nats": 6.91, "learning_rate": 0.0008, ...}
    {"kind": "evaluation", "step": 240, "wall_s": 31.4, "split": "valid", "ndcg@10": 0.113, ...}

wall_s are seconds since training began, evaluation and saving included; a resumed run goes on from what it kept. It
takes back what was logged after the step it goes on from: the file reads as if the run had never stopped.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard.writer import SummaryWriter

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Appends to a run's metrics, on one rank.

    Args:
        folder: the run's folder; made if missing.
        resume_step: completed steps of the checkpoint that the run goes on from, 0 for none; later lines are dropped.
        clock: seconds from any beginning.
    """

    def __init__(self, folder: Path, *, resume_step: int = 0, clock: Callable[[], float] = time.perf_counter) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS_FILE
        kept_s = _cut_after(path, resume_step)
        self._clock, self._began = clock, clock() - kept_s
        self._file = path.open("a")
        self._board = SummaryWriter(str(folder), purge_step=resume_step + 1)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Log a completed training step, e.g. loss_nats, learning_rate, events_per_s, epoch."""
        self._write({"kind": "step", "step": step}, values)
        for name, value in values.items():
            self._board.add_scalar(f"train/{name}", value, step)

    def evaluation(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Log the metrics of one evaluation.

        Args:
            split: "valid" or "test".
        """
        self._write({"kind": "evaluation", "step": step, "split": split}, values)
        for name, value in values.items():
            self._board.add_scalar(f"{split}/{name.replace('@', '_at_')}", value, step)
        self._board.flush()

    def close(self) -> None:
        """Write out what is buffered and close both logs."""
        self._file.close()
        self._board.close()

    def _write(self, head: dict[str, Any], values: Mapping[str, float]) -> None:
        # null is JSON's only number that is none; NaN would make the line unreadable to others
        head = {**head, "wall_s": round(self._clock() - self._began, 1)}
        body = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps(head | body) + "\n")
        self._file.flush()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, in order; a last line that a kill tore is left out."""
    path = folder / METRICS_FILE
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _cut_after(path: Path, step: int) -> float:
    """Drop later lines; the seconds of the last one that is kept."""
    if not path.exists():
        return 0.0
    kept = [line for line in read_metrics(path.parent) if line["step"] <= step] if step else []
    beside = path.with_name(path.name + ".writing")
    beside.write_text("".join(json.dumps(line) + "\n" for line in kept))
    os.replace(beside, path)
    return kept[-1]["wall_s"] if kept else 0.0
