"""Whole runs in this process: what is left of them, what is refused before they begin."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ssd_torchrec.data.generate import generate
from ssd_torchrec.data.objective import ObjectiveConfig
from ssd_torchrec.data.parquet import open_dataset
from ssd_torchrec.data.synthetic import SyntheticConfig
from ssd_torchrec.distributed.checkpoint import latest_checkpoint, read_info
from ssd_torchrec.distributed.process import World
from ssd_torchrec.distributed.shard import ShardingConfig
from ssd_torchrec.encoders.registry import SYSTEMS
from ssd_torchrec.encoders.tim4rec import TiM4RecConfig
from ssd_torchrec.errors import CheckpointError, ConfigError, DataError, DivergedError
from ssd_torchrec.training.config import DataConfig, EvaluationConfig, RunConfig, TrainingConfig
from ssd_torchrec.training.histories import Histories
from ssd_torchrec.training.presets import presets
from ssd_torchrec.training.run import config_of, evaluate_checkpoint, train
from ssd_torchrec.training.run_folder import as_json, from_json

METRICS = {f"{metric}@{k}" for metric in ("hr", "ndcg", "mrr") for k in (10, 20, 50)}
pytestmark = pytest.mark.xdist_group("test_run")  # the run that others look at is made by one worker


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "generated"
    generate(SyntheticConfig(num_users=60), folder)
    return folder


@pytest.fixture
def config(data, tmp_path) -> RunConfig:
    return RunConfig(
        name="run",
        output=str(tmp_path),
        encoder=TiM4RecConfig(width=16, head_width=8, state=8),
        data=DataConfig(path=str(data), tokens_per_batch=512),
        training=TrainingConfig(epochs=2, log_every=1, warmup_steps=1),
    )


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> tuple[Path, dict]:
    """A run that others look at."""
    output = tmp_path_factory.mktemp("runs")
    run = RunConfig(
        name="run",
        output=str(output),
        encoder=TiM4RecConfig(width=16, head_width=8, state=8),
        data=DataConfig(path=str(data), tokens_per_batch=512),
        training=TrainingConfig(epochs=2, log_every=1, warmup_steps=1),
        also_without_time=True,
    )
    return output / "run", train(run, World())


def test_a_run_leaves_all_that_the_readme_promises(finished):
    folder, _ = finished
    left = {path.name for path in folder.iterdir()}
    assert {"config.json", "metrics.jsonl", "result.json", "report.html", "checkpoints", "without-time"} <= left
    assert any(name.startswith("events.out.tfevents") for name in left)
    assert (folder / "checkpoints" / "best").is_dir()


def test_result_has_every_figure_for_model_and_baselines(finished):
    folder, result = finished
    assert json.loads((folder / "result.json").read_text()) == result
    for judge in (result, result["most_popular"], result["attainable"], result["without_time"]):
        assert judge["valid"].keys() == judge["test"].keys() == METRICS
    assert (result["epochs"], result["world_size"], result["device"]) == (2, 1, "cpu")
    assert result["train_events_per_s"] > 0
    assert result["versions"]["torch"]


def test_losses_of_a_run_fall(finished):
    lines = [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss_nats"] for line in lines if line["kind"] == "step"]
    assert losses[-1] < losses[0]


def test_gap_statistics_are_frozen_into_config_and_checkpoint(finished, data):
    folder, _ = finished
    noted = json.loads((folder / "config.json").read_text())["encoder"]
    saved = read_info(folder / "checkpoints" / "best").state.config["encoder"]
    assert noted["log_gap_mean"] == saved["log_gap_mean"] != TiM4RecConfig().log_gap_mean


def test_evaluating_a_run_gives_the_figures_it_ended_with(finished):
    folder, result = finished
    again = evaluate_checkpoint(folder, "", EvaluationConfig(candidates_per_chunk=77, tokens_per_batch=300), World())
    for stage in ("valid", "test"):
        assert again[stage] == pytest.approx(result[stage], abs=1e-9)
        assert again["most_popular"][stage] == pytest.approx(result["most_popular"][stage], abs=1e-9)


def test_a_checkpoint_of_a_bf16_run_is_used_in_fp32_on_a_cpu(finished, monkeypatch):
    best = finished[0] / "checkpoints" / "best"
    info = read_info(best)
    training = info.state.config["training"] | {"precision": "bf16"}
    in_bf16 = replace(info, state=replace(info.state, config=info.state.config | {"training": training}))
    monkeypatch.setattr("ssd_torchrec.training.job.read_info", lambda _: in_bf16)
    assert config_of(best, "", World()).training.precision == "fp32"
    on_gpu = World(device=torch.device("cuda"))
    assert config_of(best, "elsewhere", on_gpu).training.precision == "bf16"
    assert config_of(best, "elsewhere", on_gpu).data.path == "elsewhere"


def test_filtering_seen_items_changes_the_ranking_and_drops_the_best_score(finished):
    folder, result = finished
    filtered = evaluate_checkpoint(folder, "", EvaluationConfig(filter_seen=True), World())
    assert filtered["test"]["hr@50"] >= result["test"]["hr@50"]
    assert filtered["attainable"] is None


def test_a_run_is_not_mixed_with_one_that_is_there(finished):
    folder, _ = finished
    config = from_json(RunConfig, json.loads((folder / "config.json").read_text()))
    again = replace(config, training=replace(config.training, resume="none"), also_without_time=False)
    before = (folder / "config.json").read_text()
    with pytest.raises(ConfigError, match="holds a run already"):
        train(again, World())
    assert (folder / "config.json").read_text() == before


def test_another_optimizer_on_resume_is_refused_unless_reset(finished):
    folder, _ = finished
    config = from_json(RunConfig, json.loads((folder / "config.json").read_text()))
    other = replace(
        config, sharding=ShardingConfig(optimizer="adagrad"), training=replace(config.training, epochs=3), name="other"
    )
    other = replace(other, training=replace(other.training, resume=str(folder)), also_without_time=False)
    with pytest.raises(CheckpointError, match="adam"):
        train(other, World())
    assert not (folder.parent / "other" / "config.json").exists()
    reset = replace(other, training=replace(other.training, reset_optimizer=True))
    assert train(reset, World())["epochs"] == 3


def test_a_run_begun_from_another_that_it_does_not_beat_has_a_best_of_its_own(finished):
    folder, _ = finished
    config = from_json(RunConfig, json.loads((folder / "config.json").read_text()))
    training = replace(config.training, epochs=3, resume=str(folder))
    still = replace(config.dense, learning_rate=1e-12), replace(config.sharding, learning_rate=1e-12)
    later = replace(config, name="later", training=training, also_without_time=False, dense=still[0], sharding=still[1])
    begun_at = read_info(folder / "checkpoints" / "best").state.position["epoch"]
    assert train(later, World())["best_epoch"] == begun_at + 1


def test_a_checkpoint_of_another_model_is_refused(finished):
    folder, _ = finished
    config = from_json(RunConfig, json.loads((folder / "config.json").read_text()))
    wider = replace(config, encoder=replace(config.encoder, width=32), name="wider", also_without_time=False)
    wider = replace(wider, training=replace(wider.training, resume=str(folder)))
    with pytest.raises(CheckpointError, match="same model"):
        train(wider, World())


def test_a_checkpoint_of_another_vocabulary_is_refused(finished, tmp_path):
    folder, _ = finished
    generate(SyntheticConfig(num_users=60, num_oov_buckets=2, group_size=5), tmp_path / "foreign")
    with pytest.raises(CheckpointError, match="vocabulary"):
        evaluate_checkpoint(folder, str(tmp_path / "foreign"), EvaluationConfig(), World())


def test_saving_in_the_background_changes_nothing_of_a_run(config):
    often = replace(config, training=replace(config.training, checkpoint_every=1))
    runs = {"at-once": often, "meanwhile": replace(often, training=replace(often.training, async_save=True))}
    results, saved = {}, {}
    for name, run in runs.items():
        results[name] = train(replace(run, name=name), World())
        folder = Path(config.output) / name / "checkpoints"
        saved[name] = sorted(path.name for path in folder.iterdir()), (folder / "best").readlink()
    for stage in ("valid", "test"):
        assert results["at-once"][stage] == results["meanwhile"][stage]
    assert saved["at-once"] == saved["meanwhile"]


@pytest.mark.parametrize("async_save", [False, True], ids=["at-once", "in-background"])
def test_a_run_that_diverges_names_its_last_good_checkpoint(async_save, config):
    config = replace(config, training=replace(config.training, async_save=async_save))
    train(config, World())
    wild = replace(
        config,
        dense=replace(config.dense, learning_rate=1e30, clip_norm=None),
        training=replace(config.training, epochs=4, warmup_steps=0),
    )
    good = latest_checkpoint(Path(config.output) / "run" / "checkpoints")
    with pytest.raises(DivergedError, match=f"last good checkpoint: {good}"):
        train(wild, World())
    assert latest_checkpoint(Path(config.output) / "run" / "checkpoints") == good


def test_split_by_time_trains_before_the_first_cut(config, data):
    timestamps = sorted(t for rows in open_dataset(data) for t in rows.timestamp.tolist())
    cuts = {"valid_from_s": timestamps[len(timestamps) * 7 // 10], "test_from_s": timestamps[len(timestamps) * 8 // 10]}
    by_time = replace(config, data=replace(config.data, split="time", **cuts))
    result = train(by_time, World())
    assert result["attainable"] is None  # known for leave-one-out only
    assert 0 <= result["test"]["ndcg@10"] <= 1


def test_a_split_that_leaves_nothing_to_train_on_is_refused(config):
    early = replace(config, data=replace(config.data, split="time", valid_from_s=1, test_from_s=2))
    with pytest.raises(ConfigError, match="no event to train on"):
        train(early, World())
    assert not (Path(config.output) / "run").exists()


def test_a_data_set_that_is_not_there_is_refused(config):
    with pytest.raises(DataError, match=r"meta\.json"):
        train(replace(config, data=replace(config.data, path="nowhere")), World())


def test_half_precision_on_cpu_is_refused(config):
    half = replace(config, training=replace(config.training, precision="bf16"))
    with pytest.raises(ConfigError, match="bf16 is for CUDA"):
        train(half, World())


def test_the_default_data_set_is_generated_once(tmp_path, monkeypatch):
    small = SyntheticConfig(num_users=30)
    monkeypatch.setattr("ssd_torchrec.training.histories.SyntheticConfig", lambda: small)
    first = Histories.open(RunConfig(output=str(tmp_path)), World())
    written = (tmp_path / "data/generated/meta.json").stat().st_mtime_ns
    Histories.open(RunConfig(output=str(tmp_path)), World())
    assert first.histories.meta.num_users == 30
    assert (tmp_path / "data/generated/meta.json").stat().st_mtime_ns == written


@pytest.mark.parametrize("name", presets())
def test_every_preset_survives_its_json(name):
    _, run = presets()[name]
    assert from_json(RunConfig, json.loads(json.dumps(as_json(run)))) == run


SEES_AHEAD = {
    "ssd4rec": SYSTEMS["ssd4rec"].small,
    "bi_tim4rec": SYSTEMS["bi_tim4rec"].small,
    "bert4rec": SYSTEMS["bert4rec"].small,
    "tim4rec-window": SYSTEMS["tim4rec"].presets["window-ml-1m-64d"],
    "recmamba-end": SYSTEMS["recmamba"].presets["lifelong-1k"],
}


@pytest.mark.parametrize("encoder", SEES_AHEAD.values(), ids=SEES_AHEAD)
def test_an_encoder_that_sees_ahead_is_not_asked_at_every_event(encoder):
    with pytest.raises(ConfigError, match="it would be told what it is asked"):
        RunConfig(encoder=encoder)
    RunConfig(encoder=encoder, objective=ObjectiveConfig(targets="sampled"))


def test_histories_longer_than_the_encoder_takes_are_refused():
    encoder = SYSTEMS["sasrec"].small
    with pytest.raises(ConfigError, match="must be at most the 200 events"):
        RunConfig(encoder=encoder, data=DataConfig(max_length=201))
    assert RunConfig(encoder=encoder).max_length == 200
    assert RunConfig(encoder=encoder, data=DataConfig(max_length=7)).max_length == 7


def test_a_hidden_event_takes_a_place_where_it_is_asked_at():
    masked = ObjectiveConfig(targets="masked", mask_share=0.2)
    assert RunConfig(encoder=SYSTEMS["bert4rec"].small, objective=masked).max_asked == 199
    assert RunConfig(objective=masked).max_asked == 0
    with pytest.raises(ConfigError, match="must be of 2 events"):
        _ = RunConfig(objective=masked, data=DataConfig(max_length=1)).max_asked


@pytest.mark.parametrize("system", ["gru4rec", "ssd4rec_star"])
def test_only_a_gate_can_be_left_out(system):
    with pytest.raises(ConfigError, match="also-without-time compares with a time gate"):
        RunConfig(encoder=SYSTEMS[system].small, also_without_time=True)


def test_a_config_from_before_there_were_other_encoders_is_of_the_first():
    content = as_json(RunConfig())
    assert content["encoder"].pop("kind") == "TiM4RecConfig"
    assert from_json(RunConfig, content) == RunConfig()


def test_a_config_of_an_encoder_that_is_not_here_is_refused():
    content = as_json(RunConfig())
    content["encoder"]["kind"] = "OracleConfig"
    with pytest.raises(CheckpointError, match="OracleConfig must be one of TiM4RecConfig"):
        from_json(RunConfig, content)


def test_a_config_of_a_newer_version_is_refused_by_field():
    with pytest.raises(CheckpointError, match=r"TrainingConfig has no \['telepathy'\]"):
        from_json(TrainingConfig, {"epochs": 1, "telepathy": True})


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"warmup_steps": -1},
        {"keep_checkpoints": 0},
        {"log_every": 0},
        {"seed": -1},
        {"evaluate_every": 0},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_counts_below_their_least_are_refused(wrong):
    (field,) = wrong
    with pytest.raises(ConfigError, match=f"training.{field} must be at least"):
        TrainingConfig(**wrong)
