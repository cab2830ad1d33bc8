"""What a run of a ranking model is: one frozen value, printed to config.json, overridable from the command line."""

from dataclasses import dataclass, field, replace
from typing import Literal

from ssd_torchrec.distributed.shard import DenseOptimizerConfig, ShardingConfig
from ssd_torchrec.encoders.registry import AnyEncoderConfig
from ssd_torchrec.encoders.tim4rec import TiM4RecConfig
from ssd_torchrec.errors import ConfigError
from ssd_torchrec.training.config import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class RankingDataConfig:
    """Which impressions."""

    path: str = ""
    """Folder of a ranking data set. Empty: generated clicks, made once under the output folder."""

    rows_per_batch: int = 512
    """Impressions of one global batch, over all ranks: a multiple of their number."""


@dataclass(frozen=True, kw_only=True)
class RankingModelConfig:
    """A DLRM of torchrec.models.dlrm; its features are as wide as the encoder."""

    interaction: Literal["dot", "dcn", "projection"] = "dot"
    """DLRM, DLRM_DCN or DLRM_Projection."""

    history: Literal["encoder", "mean", "none"] = "encoder"
    """What becomes of histories: the encoder's last output, the mean of their items' vectors in a bag, or nothing."""

    target: bool = False
    """Whether the item shown is looked up in the table of its history too, so that both are compared in one space; for
    data sets that name it."""

    dense_layers: tuple[int, ...] = (64,)
    """Layers of the dense part before the one as wide as the features."""

    over_layers: tuple[int, ...] = (64, 32)
    """Layers of the top before the logit."""

    cross_layers: int = 2
    """Cross layers of dcn."""

    cross_rank: int = 16
    """Rank of their matrices."""

    branch_layers: tuple[int, ...] = (64,)
    """Layers of each branch of projection before its last, which is `branch_features` features wide."""

    branch_features: int = 4
    """Features that each branch of projection ends in."""

    def __post_init__(self) -> None:
        if self.target and self.history != "encoder":
            raise ConfigError(
                f"target must be False where no encoder reads histories, got True with history {self.history}; take "
                "history encoder"
            )
        for name in ("cross_layers", "cross_rank", "branch_features"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}; raise it")
        for name in ("dense_layers", "over_layers", "branch_layers"):
            if any(width < 1 for width in getattr(self, name)):
                raise ConfigError(f"{name} must be at least 1 wide each, got {getattr(self, name)}; raise them")
        if not self.over_layers:
            raise ConfigError("over_layers must be at least one layer, got none; give some widths, such as 64")


@dataclass(frozen=True, kw_only=True)
class RankingRunConfig:
    """A run of `ssd-torchrec train dlrm`."""

    name: str = ""
    """Folder of the run below `output`; empty: the launcher's job id, or a name from the clock."""

    output: str = "./runs"
    """Where runs are kept."""

    model: RankingModelConfig = field(default_factory=RankingModelConfig)
    """The DLRM."""

    encoder: AnyEncoderConfig = field(default_factory=TiM4RecConfig)
    """What reads histories; its width is the width of all tables."""

    data: RankingDataConfig = field(default_factory=RankingDataConfig)
    """Impressions."""

    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    """How tables are cut over the processes, and their fused optimizer."""

    dense: DenseOptimizerConfig = field(default_factory=lambda: DenseOptimizerConfig(learning_rate=2e-3, clip_norm=1.0))
    """What updates everything that is no table."""

    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Schedule, checkpoints, seed; the best weights have the highest validation AUC."""


def ranking_presets() -> dict[str, tuple[str, RankingRunConfig]]:
    """Runs to start from by name, each with a line about it; on generated clicks unless --data.path says otherwise."""
    run = RankingRunConfig(
        encoder=TiM4RecConfig(width=16, layers=1, head_width=8, state=16, dropout=0.0, time_dropout=0.0),
        sharding=ShardingConfig(optimizer="rowwise_adagrad", learning_rate=0.1),
        dense=DenseOptimizerConfig(learning_rate=4e-3, clip_norm=1.0),
        training=TrainingConfig(epochs=5),
    )
    return {
        "dlrm": ("DLRM with histories read by TiM4Rec", run),
        "dlrm-dcn": ("DLRM_DCN likewise", replace(run, model=RankingModelConfig(interaction="dcn"))),
        "dlrm-projection": (
            "DLRM_Projection likewise",
            replace(run, model=RankingModelConfig(interaction="projection")),
        ),
        "dlrm-plain": ("DLRM without histories", replace(run, model=RankingModelConfig(history="none"))),
    }
