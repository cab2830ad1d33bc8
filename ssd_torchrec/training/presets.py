"""Runs to start from, by name."""

from dataclasses import replace

from ssd_torchrec.data.objective import ObjectiveConfig
from ssd_torchrec.distributed.shard import DenseOptimizerConfig, ShardingConfig
from ssd_torchrec.encoders.encoder import EncoderConfig
from ssd_torchrec.encoders.registry import SYSTEMS
from ssd_torchrec.encoders.tim4rec import PRESETS as TIM4REC_PRESETS
from ssd_torchrec.training.config import DataConfig, RunConfig, TrainingConfig


def generated_run() -> RunConfig:
    """The default job: learns the generated law in about a minute on two cores; docs/decisions.md has what lost."""
    return RunConfig(
        encoder=SYSTEMS["tim4rec"].small,
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


def objective_of(name: str, encoder: EncoderConfig, preset: str = "") -> ObjectiveConfig:
    """What a system is trained on: what its paper has, but for all targets at once where the encoder is causal."""
    if name == "bert4rec":
        return ObjectiveConfig(targets="masked", mask_share=0.2)
    share = 20 / encoder.length_cap if encoder.length_cap > 200 else 0.1  # long histories cost their square
    objective = ObjectiveConfig() if encoder.causal else ObjectiveConfig(targets="sampled", target_share=share)
    if name == "ssd4rec":
        return replace(objective, hide_share=0.2 if preset in ("beauty", "kuairand") else 0.1)
    return replace(objective, loss="bce") if name == "recmamba" else objective


def presets() -> dict[str, tuple[str, RunConfig]]:
    """Runs by name, each with a line about it: on the generated data, and at published sizes for data of your own."""
    recipes = {"tim4rec-ml-1m-64d": ml_1m_run(), "tim4rec-beauty-64d": beauty_run()}
    runs = {}
    for name, system in SYSTEMS.items():
        small = replace(generated_run(), encoder=system.small, objective=objective_of(name, system.small))
        runs[name] = (f"{system.about}; on the generated data", small)
        for preset, encoder in system.presets.items():
            full = f"{name}-{preset}"
            published = replace(RunConfig(), encoder=encoder, objective=objective_of(name, encoder, preset))
            trained = "trained to its best" if full in recipes else "at its published size"
            runs[full] = (f"{trained} for {preset}; give --data.path", recipes.get(full, published))
    return runs
