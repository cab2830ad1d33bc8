"""What a run is: one frozen value, printed to config.json, overridable field by field from the command line."""

from dataclasses import dataclass, field
from typing import Literal

from ssd_torchrec.data.batch_plan import BatchConfig
from ssd_torchrec.data.objective import ObjectiveConfig
from ssd_torchrec.data.split import LeaveOneOut, Split, SplitByTime
from ssd_torchrec.distributed.shard import DenseOptimizerConfig, ShardingConfig
from ssd_torchrec.encoders.bi_tim4rec import BiTiM4RecConfig
from ssd_torchrec.encoders.registry import AnyEncoderConfig
from ssd_torchrec.encoders.tim4rec import TiM4RecConfig
from ssd_torchrec.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which histories, cut how."""

    path: str = ""
    """Folder of a data set. Empty: the generated default, made once under the output folder."""

    event_columns: tuple[str, ...] = ()
    """Event columns of the data set, such as an action or a category, that the model is told with each event's item.
    Its others are not read."""

    split: Literal["leave-one-out", "time"] = "leave-one-out"
    """leave-one-out: a user's last event is the test target, the one before the validation target; time: two cuts."""

    valid_from_s: int = 0
    """Split by time: unix seconds at which training ends and validation begins."""

    test_from_s: int = 0
    """Split by time: unix seconds at which the test begins."""

    tokens_per_batch: int = 4096
    """Events of one global batch, over all ranks. A longer history is a batch of its own."""

    max_length: int = 0
    """Newest events of a history that the encoder sees, in training and after; 0 for as many as it takes."""

    window_events: int = 2**22
    """Events held in memory at once, about; batches are formed within such a window of shuffled row groups."""

    length_noise: float = 0.25
    """Deviation of the noise on the logarithm of a history's length, by which the histories of a window are sorted."""

    def __post_init__(self) -> None:
        self.batches(seed=0)
        self.rule()

    def batches(self, seed: int) -> BatchConfig:
        """How global batches are formed, in the order that `seed` decides."""
        return BatchConfig(
            tokens_per_batch=self.tokens_per_batch,
            window_events=self.window_events,
            length_noise=self.length_noise,
            max_length=self.max_length,
            seed=seed,
        )

    def rule(self) -> Split:
        """Which events train, and which are asked for."""
        return LeaveOneOut() if self.split == "leave-one-out" else SplitByTime(self.valid_from_s, self.test_from_s)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How the weights are learned."""

    epochs: int = 10
    """Passes over every training target."""

    warmup_steps: int = 50
    """Steps of linear rise from 0 to the peak."""

    decay: Literal["linear", "constant"] = "linear"
    """After the warm-up: down to 0 at the last step, or level."""

    patience: int = 0
    """Stop after this many evaluations without a better validation NDCG@10; 0 for never."""

    evaluate_every: int = 1
    """Epochs between validations."""

    checkpoint_every: int = 200
    """Steps between checkpoints; one is written at the end of each evaluated epoch besides. 0 for only those."""

    keep_checkpoints: int = 2
    """Newest checkpoints to keep; the best one is kept besides."""

    async_save: bool = False
    """Train on while a checkpoint is written, from a copy of the weights and optimizer state in the host's memory."""

    resume: str = "auto"
    """auto: go on from this run's newest checkpoint if there is one; none: refuse to touch a run that is there; else a
    checkpoint, or a run, to start from."""

    reset_optimizer: bool = False
    """Resume although the checkpoint was trained with another optimizer, with fresh optimizer state."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast of the encoder, CUDA only."""

    log_every: int = 10
    """Steps between lines of metrics.jsonl."""

    seed: int = 0
    """Decides the initial weights, the order of batches and the dropout of every step."""

    def __post_init__(self) -> None:
        at_least = {"epochs": 1, "warmup_steps": 0, "patience": 0, "evaluate_every": 1, "checkpoint_every": 0}
        at_least |= {"keep_checkpoints": 1, "log_every": 1, "seed": 0}
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ConfigError(f"training.{name} must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How quality is measured: the full catalogue is ranked, ties count against the model."""

    filter_seen: bool = False
    """Leave items of the user's history out of the ranking, as production does; the papers do not."""

    tokens_per_batch: int = 16384
    """Events of one global evaluation batch."""

    candidates_per_chunk: int = 8192
    """Items scored at a time; the (users, items) score matrix is never whole."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run of `ssd-torchrec train`. A variant is `dataclasses.replace` of another run."""

    name: str = ""
    """Folder of the run below `output`; empty: the launcher's job id, or a name from the clock."""

    output: str = "./runs"
    """Where runs are kept."""

    encoder: AnyEncoderConfig = field(default_factory=TiM4RecConfig)
    """The sequence encoder; its width is the width of the tables."""

    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What training asks of it."""

    data: DataConfig = field(default_factory=DataConfig)
    """Histories and split."""

    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    """How tables are cut over the processes, and their fused optimizer."""

    dense: DenseOptimizerConfig = field(default_factory=lambda: DenseOptimizerConfig(learning_rate=2e-3, clip_norm=1.0))
    """What updates everything that is no table. Its schedule is the tables' too; its clipping is not: fused tables step
    inside backward, before a norm is known."""

    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Schedule, checkpoints, seed."""

    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Ranking protocol."""

    also_without_time: bool = False
    """Train a second time with the time gate off and print both."""

    def __post_init__(self) -> None:
        if self.also_without_time and not self.can_go_without_time:
            raise ConfigError(
                f"also-without-time compares with a time gate, got {self.encoder.title} without one of its own or with "
                "published gates; drop one of them"
            )
        if self.objective.targets == "all" and not self.encoder.causal:
            raise ConfigError(
                f"objective.targets must be sampled or masked for {self.encoder.title} as it is configured: its output "
                "at an event has seen later events of the row, so with all targets it would be told what it is asked"
            )
        if 0 < self.encoder.length_cap < self.data.max_length:
            raise ConfigError(
                f"data.max_length must be at most the {self.encoder.length_cap} events that the encoder takes, got "
                f"{self.data.max_length}; lower it, or raise the encoder's own"
            )

    @property
    def can_go_without_time(self) -> bool:
        """Whether the encoder is also one without its time gate."""
        return isinstance(self.encoder, TiM4RecConfig | BiTiM4RecConfig) and self.encoder.time_mode in (
            "causal",
            "both",
        )

    @property
    def max_length(self) -> int:
        """Newest events of a history that the encoder sees; 0 for all."""
        return self.data.max_length or self.encoder.length_cap

    @property
    def max_asked(self) -> int:
        """The same when the next item is asked for: a hidden event after the last takes a place."""
        if self.max_length == 1 and self.objective.asks_at_mask:
            raise ConfigError("histories must be of 2 events for masked targets, got a max_length of 1; raise it")
        return max(self.max_length - self.objective.asks_at_mask, 0)
