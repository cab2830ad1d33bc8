"""Runs of ranking models: they learn what histories tell, and are resumed, reported and refused as other runs."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ssd_torchrec.__main__ import main
from ssd_torchrec.data.ranking.clicks import ClicksConfig, clicks_meta, draw_clicks, generate_clicks
from ssd_torchrec.data.ranking.folder import RankingWriter
from ssd_torchrec.data.ranking.rows import RankingRows
from ssd_torchrec.data.ranking.schema import RankingMeta
from ssd_torchrec.distributed.checkpoint import read_info
from ssd_torchrec.distributed.process import World
from ssd_torchrec.distributed.shard import DenseOptimizerConfig, ShardingConfig
from ssd_torchrec.encoders.gru4rec import GRU4RecConfig
from ssd_torchrec.encoders.tim4rec import TiM4RecConfig
from ssd_torchrec.errors import CheckpointError, ConfigError, DataError
from ssd_torchrec.models.ranking import RankingModel
from ssd_torchrec.training.config import TrainingConfig
from ssd_torchrec.training.job import checkpoint_at
from ssd_torchrec.training.ranking_config import RankingDataConfig, RankingModelConfig, RankingRunConfig
from ssd_torchrec.training.ranking_metrics import assess
from ssd_torchrec.training.ranking_run import build_ranking, evaluate_ranking, train_ranking
from tests.distributed.world import spawn

SMALL = ClicksConfig(num_rows=1200, longest=8)
ENCODER = TiM4RecConfig(width=16, layers=1, head_width=8, state=8, dropout=0.0, time_dropout=0.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranking") / "clicks"
    generate_clicks(SMALL, folder)
    return folder


@pytest.fixture
def config(data, tmp_path) -> RankingRunConfig:
    return run_on(data, tmp_path)


def run_on(data: Path, output: Path) -> RankingRunConfig:
    return RankingRunConfig(
        name="run",
        output=str(output),
        encoder=ENCODER,
        data=RankingDataConfig(path=str(data), rows_per_batch=64),
        sharding=ShardingConfig(optimizer="adagrad"),
        dense=DenseOptimizerConfig(learning_rate=4e-3),
        training=TrainingConfig(epochs=2, log_every=1, warmup_steps=1),
    )


MODELS = [("dot", "encoder"), ("dcn", "encoder"), ("projection", "encoder"), ("dcn", "mean"), ("projection", "none")]
ALIKE = [("dot", "mean"), ("projection", "mean"), ("dot", "none"), ("dcn", "none")]


@pytest.mark.parametrize(
    ("interaction", "history"), [*MODELS, *(pytest.param(*model, marks=pytest.mark.slow) for model in ALIKE)]
)
def test_every_model_leaves_figures_and_a_report(interaction, history, config):
    config = replace(config, model=RankingModelConfig(interaction=interaction, history=history))
    result = train_ranking(config, World())
    folder = Path(config.output) / "run"
    assert json.loads((folder / "result.json").read_text()) == result
    for part in ("valid", "test"):
        assert result[part].keys() == {"auc", "ne", "calibration"}
        assert 0 < result[part]["auc"] < 1
    assert result["model"] == f"dlrm-{interaction}, history: {'tim4rec' if history == 'encoder' else history}"
    report = (folder / "report.html").read_text()
    assert "CALIBRATION" in report
    assert (folder / "checkpoints" / "best").is_dir()


@pytest.mark.parametrize("interaction", ["dot", "dcn", "projection"])
def test_a_target_is_one_more_feature_of_its_historys_table(interaction, config, data):
    meta = RankingMeta.read(data)
    models = []
    for target in (False, True):
        asked = replace(config, model=RankingModelConfig(interaction=interaction, target=target))
        module = build_ranking(asked, meta, World()).module
        assert isinstance(module, RankingModel)
        models.append(module.dlrm.sparse_arch)
    without, with_target = models
    assert without.sparse_feature_names == ["segment", "candidate", "clicked"]
    assert with_target.sparse_feature_names == ["segment", "candidate", "clicked", "candidate"]
    (table,) = with_target.histories.embedding_collection.embedding_configs()
    assert (table.name, table.feature_names) == ("t_clicked", ["clicked", "candidate"])
    filler = RankingRows.filler(meta).batch().sparse_features
    assert with_target(filler).shape == (1, 4, 16)


def test_a_run_with_a_target_is_evaluated_and_told_from_one_without(config):
    asked = replace(config, model=RankingModelConfig(target=True))
    result = train_ranking(asked, World())
    assert result["model"] == "dlrm-dot, history: tim4rec and target"
    again = evaluate_ranking(Path(config.output) / "run", "", World())
    assert again["test"] == result["test"]
    without = replace(config, training=replace(config.training, resume="auto"))
    with pytest.raises(CheckpointError, match="must be of the same model"):
        train_ranking(without, World())


def test_data_that_names_no_target_is_refused(config, data, tmp_path):
    folder = tmp_path / "unnamed"
    shutil.copytree(data, folder)
    replace(RankingMeta.read(data), targets={}).write(folder)
    asked = replace(config, model=RankingModelConfig(target=True), data=RankingDataConfig(path=str(folder)))
    with pytest.raises(
        ConfigError, match=r"model.target is for data sets that name the item shown, got clicks without"
    ):
        train_ranking(asked, World())


@pytest.mark.parametrize("history", ["mean", "none"])
def test_a_target_without_an_encoder_is_refused(history):
    with pytest.raises(ConfigError, match=rf"got True with history {history}; take history encoder"):
        RankingModelConfig(history=history, target=True)


@pytest.mark.slow
@pytest.mark.parametrize("target", [False, True], ids=["history", "history-and-target"])
def test_two_processes_end_where_one_does(target, data, tmp_path, config):
    model = RankingModelConfig(target=target)
    alone = train_ranking(replace(config, model=model), World())
    spawn(train_shared, 2, replace(run_on(data, tmp_path / "two"), model=model))
    together = json.loads((tmp_path / "two" / "run" / "result.json").read_text())
    for part in ("valid", "test"):
        for name, figure in alone[part].items():
            close = 2e-3 if name == "auc" else 1e-5  # a rounding turns a pair of scores around
            assert together[part][name] == pytest.approx(figure, abs=close), (part, name)
    assert together["world_size"] == 2
    assert together["sharding"]["t_clicked"].startswith("row_wise")


def train_shared(world: World, config: RankingRunConfig) -> None:
    train_ranking(config, world)


def test_evaluating_a_run_gives_the_figures_it_ended_with(config, data, capsys):
    result = train_ranking(config, World())
    run = Path(config.output) / "run"
    again = evaluate_ranking(run, "", World())
    assert {part: again[part] for part in ("valid", "test")} == {part: result[part] for part in ("valid", "test")}
    assert main(["evaluate", str(run), "--data", str(data)]) == 0
    assert f"{result['test']['auc']:.4f}" in capsys.readouterr().out


def test_next_item_and_ranking_models_do_not_take_each_others_checkpoints(config, data, tmp_path, capsys):
    train_ranking(config, World())
    run = str(Path(config.output) / "run")
    for words in (
        ["recommend", run, "users.csv", "--output", "x.parquet"],
        ["train", "tim4rec", "--training.resume", run],
    ):
        assert main([*words, *(["--output", str(tmp_path / "other")] if words[0] == "train" else [])]) == 2
        assert "next-item and ranking models do not take each other's checkpoints" in capsys.readouterr().err
    assert main(["grow", run, str(tmp_path / "grown"), "--data", str(data)]) == 2
    assert "must be of a next-item model" in capsys.readouterr().err


def test_a_run_goes_on_where_it_was_left(config):
    unharmed = train_ranking(replace(config, name="unharmed"), World())
    half = replace(config, training=replace(config.training, epochs=1, decay="constant"))
    whole = replace(config, training=replace(config.training, decay="constant"))
    train_ranking(half, World())
    resumed = train_ranking(whole, World())
    straight = train_ranking(replace(whole, name="straight"), World())
    assert resumed["valid"] == straight["valid"] != unharmed["valid"]
    assert resumed["epochs"] == 2


def test_figures_are_those_of_the_definitions(config):
    rows, _ = draw_clicks(SMALL)
    logits = torch.randn(len(rows), generator=torch.Generator().manual_seed(0))
    shares = np.array_split(np.arange(len(rows)), 7)
    batches = (replace_logits(rows.take(share), logits[share]) for share in shares)
    most = max(map(len, shares))
    figures = assess(Told(), batches, rows_per_rank=most, num_rows=len(rows), shift=-0.5, world=World())
    p = torch.sigmoid(logits.double() - 0.5)
    label = torch.from_numpy(rows.label).double()
    share = label.mean()
    entropy = -(label * p.log() + (1 - label) * (1 - p).log()).mean()
    of_share = -(share * share.log() + (1 - share) * (1 - share).log())
    clicked, other = logits[label == 1], logits[label == 0]
    auc = (clicked[:, None] > other[None]).double().mean()
    assert figures["ne"] == pytest.approx((entropy / of_share).item(), abs=1e-5)
    assert figures["calibration"] == pytest.approx((p.sum() / label.sum()).item(), abs=1e-5)
    assert figures["auc"] == pytest.approx(auc.item(), abs=1e-5)


class Told(torch.nn.Module):
    """Knows its logits: the first dense feature."""

    def forward(self, dense, _) -> torch.Tensor:
        return dense[:, :1]


def replace_logits(rows: RankingRows, logits: torch.Tensor):
    dense = rows.dense.copy()
    dense[:, 0] = logits.numpy()
    return replace(rows, dense=dense).batch()


@pytest.mark.slow
def test_negatives_left_out_of_training_are_put_back_into_the_probabilities(data, tmp_path):
    """Trained on a fifth of the negatives, predictions on all rows are right on average; uncorrected they are not."""
    config = ClicksConfig(num_rows=8000, longest=4)
    rows, _ = draw_clicks(config)
    kept = (rows.label == 1) | (np.random.default_rng(0).random(len(rows)) < 0.2)
    train = np.arange(6000)[kept[:6000]]
    calibrations = []
    for share in (0.2, 1.0):
        folder = tmp_path / f"share-{share}"
        with RankingWriter(folder, replace(clicks_meta(config), negative_share=share)) as writer:
            writer.append("train", rows.take(train))
            for part, begin in (("valid", 6000), ("test", 7000)):
                writer.append(part, rows.take(np.arange(begin, begin + 1000)))
            writer.finish()
        run = replace(run_on(folder, tmp_path / str(share)), model=RankingModelConfig(history="none"))
        run = replace(run, training=replace(run.training, epochs=6))
        calibrations.append(train_ranking(run, World())["test"]["calibration"])
    assert calibrations[0] == pytest.approx(1, abs=0.12)
    assert calibrations[1] > 1.5


@pytest.mark.slow
def test_histories_help_where_they_mean_something_and_do_no_harm_where_they_do_not(tmp_path):
    """On generated clicks, whose labels hang on the last item and the gap before it; and on the same, shuffled."""
    figures = {}
    for shuffled in (False, True):
        folder = tmp_path / f"shuffled-{shuffled}"
        generate_clicks(ClicksConfig(num_rows=40_000, longest=20, shuffled=shuffled), folder)
        for preset in ("dlrm", "dlrm-plain"):
            words = [
                "train",
                preset,
                "--data.path",
                str(folder),
                "--output",
                str(tmp_path),
                "--name",
                f"{preset}-{shuffled}",
            ]
            assert main([*words, "--sharding.optimizer", "adam"]) == 0
            result = json.loads((tmp_path / f"{preset}-{shuffled}" / "result.json").read_text())
            figures[preset, shuffled] = result["test"]["auc"]
    assert figures["dlrm", False] > figures["dlrm-plain", False] + 0.06
    assert figures["dlrm", True] == pytest.approx(figures["dlrm-plain", True], abs=0.02)


def test_gap_statistics_are_frozen_into_the_checkpoint(config):
    train_ranking(config, World())
    encoder = read_info(checkpoint_at(Path(config.output) / "run")).state.config["encoder"]
    assert encoder["log_gap_mean"] not in (0.0, TiM4RecConfig().log_gap_mean)


def test_the_component_trains_on_generated_clicks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ssd_torchrec.training.ranking_run.ClicksConfig", lambda: SMALL)
    words = ["train", "dlrm", "--output", str(tmp_path), "--name", "run", "--training.epochs", "1"]
    assert main([*words, "--data.rows-per-batch", "128"]) == 0
    assert "AUC" in capsys.readouterr().out
    assert (tmp_path / "data" / "clicks" / "ranking.json").is_file()


REFUSED = {
    "no-data": ({"data": RankingDataConfig(path="nowhere")}, DataError, r"nowhere must be a ranking data set"),
    "too-few-rows": (
        {"data": RankingDataConfig(rows_per_batch=5000)},
        ConfigError,
        r"must be 5000 rows for a batch, got 960",
    ),
    "bf16": ({"training": TrainingConfig(precision="bf16")}, ConfigError, r"bf16 is for CUDA"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_refused(name, config, data):
    change, kind, message = REFUSED[name]
    if "data" in change and not change["data"].path:
        change = {"data": replace(change["data"], path=str(data))}
    with pytest.raises(kind, match=message):
        train_ranking(replace(config, **change), World())


def test_another_models_checkpoint_is_refused(config):
    train_ranking(config, World())
    with pytest.raises(CheckpointError, match="must be of the same model"):
        train_ranking(replace(config, encoder=GRU4RecConfig(width=16)), World())


@pytest.mark.parametrize("change", [{"cross_rank": 0}, {"over_layers": ()}, {"dense_layers": (0,)}])
def test_a_model_that_makes_no_sense_is_refused(change):
    with pytest.raises(ConfigError, match=r"must be at least"):
        RankingModelConfig(**change)
