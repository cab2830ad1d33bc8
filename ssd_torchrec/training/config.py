"""What a run is: one frozen value, printed to config.json, overridable field by field from the command line."""

from dataclasses import dataclass, field, replace
from typing import Literal

from ssd_torchrec.data.batch_plan import BatchConfig
from ssd_torchrec.data.split import LeaveOneOut, Split, SplitByTime
from ssd_torchrec.distributed.shard import DenseOptimizerConfig, ShardingConfig
from ssd_torchrec.encoders.tim4rec import PRESETS as TIM4REC_PRESETS
from ssd_torchrec.encoders.tim4rec import TiM4RecConfig
from ssd_torchrec.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which histories, cut how."""

    path: str = ""
    """Folder of a data set. Empty: the generated default, made once under the output folder."""

    split: Literal["leave-one-out", "time"] = "leave-one-out"
    """leave-one-out: a user's last event is the test target, the one before the validation target; time: two cuts."""

    valid_from_s: int = 0
    """Split by time: unix seconds at which training ends and validation begins."""

    test_from_s: int = 0
    """Split by time: unix seconds at which the test begins."""

    tokens_per_batch: int = 4096
    """Events of one global batch, over all ranks. A longer history is a batch of its own; nothing is cut."""

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

    encoder: TiM4RecConfig = field(default_factory=TiM4RecConfig)
    """The sequence encoder; its width is the width of the tables."""

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
        if self.also_without_time and self.encoder.time_mode == "none":
            raise ConfigError(
                "also-without-time compares with a time gate, got encoder.time-mode none; drop one of them"
            )


def generated_run() -> RunConfig:
    """The default job: learns the generated law in about a minute on two cores; docs/decisions.md has what lost."""
    return RunConfig(
        encoder=TiM4RecConfig(dropout=0.1, time_dropout=0.1),
        data=DataConfig(tokens_per_batch=2048),
        dense=DenseOptimizerConfig(learning_rate=5e-3, clip_norm=1.0),
        training=TrainingConfig(epochs=8),
    )


def ml_1m_run() -> RunConfig:
    """MovieLens-1M to its best with 64 channels; docs/decisions.md has what lost."""
    return RunConfig(
        encoder=replace(TIM4REC_PRESETS["ml-1m-64d"], dropout=0.15, time_dropout=0.1),
        data=DataConfig(tokens_per_batch=2048),
        sharding=ShardingConfig(optimizer="rowwise_adagrad", learning_rate=0.1),
        dense=DenseOptimizerConfig(optimizer="muon", learning_rate=4e-3, clip_norm=1.0),
        training=TrainingConfig(epochs=40, warmup_steps=200, evaluate_every=4, checkpoint_every=1000),
    )


def beauty_run() -> RunConfig:
    """Amazon Beauty to its best with 64 channels: few events an item, so few epochs."""
    return RunConfig(
        encoder=TIM4REC_PRESETS["beauty-64d"],
        data=DataConfig(tokens_per_batch=2048),
        sharding=ShardingConfig(optimizer="rowwise_adagrad", learning_rate=0.05),
        dense=DenseOptimizerConfig(optimizer="muon", learning_rate=4e-3, clip_norm=1.0),
        training=TrainingConfig(epochs=16, warmup_steps=200),
    )


def presets() -> dict[str, tuple[str, RunConfig]]:
    """Runs by name, each with a line about it: the generated default, and the published sizes for data of your own."""
    runs = {"tim4rec": ("TiM4Rec, 64 wide, on the generated data that needs time", generated_run())}
    recipes = {"ml-1m-64d": ml_1m_run(), "beauty-64d": beauty_run()}
    for name, encoder in TIM4REC_PRESETS.items():
        run = recipes.get(name) or replace(RunConfig(), encoder=encoder)
        trained = "trained to its best" if name in recipes else "at its published size"
        runs[f"tim4rec-{name}"] = (f"TiM4Rec {trained} for {name}; give --data.path", run)
    return runs
