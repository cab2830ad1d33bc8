"""The data set of a run, cut into what trains and what is asked for."""

from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from ssd_torchrec.data.batch_plan import BatchConfig
from ssd_torchrec.data.batches import EvaluationBatches, Share, TrainingBatches
from ssd_torchrec.data.generate import generate
from ssd_torchrec.data.parquet import UserHistories, open_dataset
from ssd_torchrec.data.schema import META_FILE, Scores, is_outdated
from ssd_torchrec.data.split import Spans, Stage, spans_of
from ssd_torchrec.data.statistics import item_counts
from ssd_torchrec.data.synthetic import SyntheticConfig
from ssd_torchrec.distributed.process import World, all_or_none
from ssd_torchrec.errors import ConfigError, DataError
from ssd_torchrec.training.config import DataConfig, EvaluationConfig, RunConfig

DEFAULT_DATA = "data/generated"  # below the output folder


@dataclass(frozen=True, eq=False)
class Histories:
    """A data set, cut as a run cuts it."""

    histories: UserHistories
    spans: Spans
    counts: Tensor  # (V,) int64 training events of each item

    @classmethod
    def open(cls, config: RunConfig, world: World) -> "Histories":
        """Open the run's data set, generating the default one first if none is named. Collective."""
        histories = open_dataset(data_folder(config, world)).with_event_columns(config.data.event_columns)
        spans = spans_of(histories, config.data.rule())
        if not spans.counts().training_targets:
            raise ConfigError(
                f"{histories.folder} has no event to train on under this split ({spans.counts()}); "
                "take another split, or other cut points"
            )
        return cls(histories, spans, item_counts(histories, spans))

    def training(self, config: RunConfig, world: World) -> TrainingBatches:
        """This rank's share of the training batches."""
        batches = replace(config.data.batches(config.training.seed), max_length=config.max_length)
        return TrainingBatches(
            self.histories, self.spans, batches, _share(world), config.objective, self.counts.numpy()
        )

    def asked(self, stage: Stage, config: RunConfig, evaluation: EvaluationConfig, world: World) -> EvaluationBatches:
        """This rank's share of the histories that a stage asks about."""
        batches = BatchConfig(tokens_per_batch=evaluation.tokens_per_batch, max_length=config.max_asked)
        return EvaluationBatches(
            self.histories, self.spans, stage, batches, _share(world), asks_at_mask=config.objective.asks_at_mask
        )

    def attainable(self, data: DataConfig, evaluation: EvaluationConfig, *, timed: bool = True) -> Scores | None:
        """The best scores the data permits under this protocol, where they are known: generated data, leave-one-out.

        Args:
            timed: whether to whoever looks at the timestamps, or to who does not.
        """
        if data.split != "leave-one-out" or evaluation.filter_seen:
            return None
        return self.histories.meta.attainable if timed else self.histories.meta.attainable_without_time


def _share(world: World) -> Share:
    return Share(rank=world.rank, world_size=world.size)


def data_folder(config: RunConfig, world: World) -> Path:
    """Where the run's data set lies; the generated default is written by rank 0 while the others wait."""
    if config.data.path:
        return Path(config.data.path)
    folder = Path(config.output) / DEFAULT_DATA
    with all_or_none(f"generating {folder}", DataError):
        if world.rank == 0 and (not (folder / META_FILE).exists() or is_outdated(folder)):
            generate(SyntheticConfig(), folder)
    return folder
