"""A checkpoint that follows its data set: the grown model knows what the old one knew, and trains on."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ssd_torchrec.data.parquet import open_dataset
from ssd_torchrec.data.prepare.log import LogConfig
from ssd_torchrec.data.prepare.run import PrepareConfig, prepare
from ssd_torchrec.data.schema import DatasetMeta
from ssd_torchrec.distributed.checkpoint import load_checkpoint, load_weights, read_info
from ssd_torchrec.distributed.process import World
from ssd_torchrec.distributed.reshard import reshard
from ssd_torchrec.distributed.shard import ShardingConfig, Trainable
from ssd_torchrec.distributed.state import dense_state, model_state, table_state
from ssd_torchrec.encoders.tim4rec import TiM4RecConfig
from ssd_torchrec.errors import CheckpointError
from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.models.next_item import ITEM_WEIGHT
from ssd_torchrec.training.build import build
from ssd_torchrec.training.config import DataConfig, EvaluationConfig, RunConfig, TrainingConfig
from ssd_torchrec.training.grow import grow
from ssd_torchrec.training.job import checkpoint_at
from ssd_torchrec.training.run import config_of, evaluate_checkpoint, train

CONFIG = PrepareConfig(log=LogConfig(item="item", user_columns=("home",)), k_core=0, num_oov_buckets=3)
OLD_ITEMS, NEW_ITEMS, USERS = 20, 7, 30
OF_ONE = pytest.mark.parametrize("trained", ["adam"], indirect=True)
HOME = "contexts.embedding_bags.home.weight"
pytestmark = pytest.mark.xdist_group("test_grow")  # what is trained for all is trained by one worker


def write_log(file: Path, days: int, items: int) -> Path:
    """Ten events a user and day of the first `items` items, which need not be in the order of their ids."""
    rng = np.random.default_rng(0)
    raw = rng.permutation(1000)
    n = USERS * 10 * days
    home = np.where(np.arange(n) < USERS * 10, "oslo", "bonn")  # bonn comes with the second day
    events = {"item": raw[rng.integers(items, size=n)], "timestamp": 10**9 + rng.integers(1, 10**4, size=n).cumsum()}
    pq.write_table(pa.table({"user_id": np.arange(n) % USERS, "home": home, **events}), file)
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The data sets "old" and "new", which extends it."""
    folder = tmp_path_factory.mktemp("grow")
    prepare(write_log(folder / "old.parquet", 1, OLD_ITEMS), folder / "old", CONFIG)
    extended = replace(CONFIG, extends=str(folder / "old"))
    prepare(write_log(folder / "new.parquet", 2, OLD_ITEMS + NEW_ITEMS), folder / "new", extended)
    return folder


def run_on(data: Path, output: Path, name: str, optimizer: str = "auto", resume: str = "auto") -> RunConfig:
    return RunConfig(
        name=name,
        output=str(output),
        encoder=TiM4RecConfig(width=16, head_width=8, state=8),
        data=DataConfig(path=str(data), tokens_per_batch=256),
        sharding=ShardingConfig(optimizer=optimizer),
        training=TrainingConfig(epochs=2, log_every=1, warmup_steps=1, resume=resume),
    )


@pytest.fixture(scope="module", params=["adam", "rowwise_adagrad", "of two ranks"])
def trained(request, folder, tmp_path_factory) -> Path:
    """A checkpoint of the old data."""
    output = tmp_path_factory.mktemp("runs")
    optimizer = "adagrad" if request.param == "of two ranks" else request.param
    train(run_on(folder / "old", output, "old", optimizer), World())
    if request.param == "of two ranks":
        reshard(checkpoint_at(output / "old"), output / "two", ranks=2)
    return output / "two" if request.param == "of two ranks" else checkpoint_at(output / "old")


def loaded(checkpoint: Path) -> tuple[Trainable, DatasetMeta]:
    """A checkpoint's model in this process, on whole tables, and its data set."""
    config = config_of(checkpoint, "", World())
    meta = open_dataset(config.data.path).meta
    trainable = build(replace(config, sharding=ShardingConfig()), meta, World())
    load_weights(checkpoint, trainable, vocabulary=meta.item_vocabulary_hash)
    return trainable, meta


def test_old_rows_and_their_state_stay_and_new_ones_begin_as_their_buckets(trained, folder, tmp_path):
    old_path = trained
    info = grow(old_path, tmp_path / "grown", folder / "new")
    (old, old_meta), (new, new_meta) = loaded(old_path), loaded(tmp_path / "grown")
    before, after = model_state(old), model_state(new)
    assert before.keys() == after.keys()
    same = [name for name in before if name.removeprefix("model.") not in (ITEM_WEIGHT, HOME)]
    assert all(torch.equal(before[name], after[name]) for name in same)

    rows, first_new = old_meta.num_table_rows, new_meta.num_table_rows - NEW_ITEMS
    weight = after[f"model.{ITEM_WEIGHT}"]
    assert (rows, len(weight)) == (first_new, first_new + NEW_ITEMS)
    assert torch.equal(weight[:rows], before[f"model.{ITEM_WEIGHT}"])
    vocabularies = [open_dataset(folder / name).vocabulary() for name in ("old", "new")]
    read_as = vocabularies[0].rows_of(vocabularies[1].ids[first_new - new_meta.first_item :])
    assert set(read_as) <= {1, 2, 3}
    assert torch.equal(weight[first_new:], weight[torch.from_numpy(read_as)])
    assert after[f"model.{HOME}"].shape == (2, 16)
    assert not after[f"model.{HOME}"][1].any()
    assert (info.state.step, info.state.vocabulary) == (0, new_meta.item_vocabulary_hash)
    assert info.state.config["data"]["path"] == str(folder / "new")


@pytest.mark.parametrize("trained", ["adam", "rowwise_adagrad"], indirect=True)
def test_optimizer_state_of_old_rows_stays_and_that_of_new_ones_is_zero(trained, folder, tmp_path):
    what = read_info(trained).table_optimizer
    grow(trained, tmp_path / "grown", folder / "new")
    states = []
    for path, data in ((trained, "old"), (tmp_path / "grown", "new")):
        meta = open_dataset(folder / data).meta
        trainable = build(config_of(path, "", World()), meta, World())
        load_checkpoint(path, trainable, vocabulary=meta.item_vocabulary_hash)
        states.append(table_state(trainable) | dense_state(trainable))
    before, after = states
    assert before.keys() == after.keys()
    of_items = {name for name in before if ITEM_WEIGHT in name and before[name].ndim}
    assert {name.rpartition(".")[2] for name in of_items} == (
        {"sum"} if "ada" in what[3:] else {"exp_avg", "exp_avg_sq"}
    )
    for name, value in before.items():
        kept = value if value.ndim == 0 else after[name][: len(value)]
        assert torch.equal(kept, value), name
        assert value.any(), name
        assert value.ndim == 0 or not after[name][len(value) :].any(), name


def test_a_grown_model_encodes_and_scores_as_the_old_one_did(trained, folder, tmp_path):
    grow(trained, tmp_path / "grown", folder / "new")
    raw = pq.read_table(folder / "new.parquet")["item"].to_numpy()[-200:]  # of known and of unknown items
    layout = JaggedLayout.from_lengths([150, 50])
    timestamps = torch.arange(200) * 1000
    scores, unknown = [], []
    for checkpoint in (trained, tmp_path / "grown"):
        trainable, meta = loaded(checkpoint)
        rows = open_dataset(config_of(checkpoint, "", World()).data.path).vocabulary().rows_of(raw)
        unknown.append(int((rows < meta.first_item).sum()))
        table = model_state(trainable)[f"model.{ITEM_WEIGHT}"]
        with torch.no_grad():
            encoded = trainable.module.eval().tower.encoder(table[torch.from_numpy(rows)], timestamps, layout)
        scores.append(encoded @ table[meta.first_item :][:OLD_ITEMS].T)
    assert unknown[0] > 10
    assert unknown[1] == 0
    assert torch.equal(*scores)


@pytest.fixture(scope="module")
def anew(folder, tmp_path_factory) -> dict:
    """The encoder's config of a run that has the new data only."""
    output = tmp_path_factory.mktemp("anew")
    train(run_on(folder / "new", output, "anew"), World())
    return read_info(checkpoint_at(output / "anew")).state.config["encoder"]


def test_a_grown_checkpoint_is_evaluated_and_trained_on_from_its_first_epoch(trained, folder, anew, tmp_path):
    grow(trained, tmp_path / "grown", folder / "new")
    assert evaluate_checkpoint(tmp_path / "grown", "", EvaluationConfig(), World())["data"] == "new"
    config = run_on(folder / "new", tmp_path, "on", resume=str(tmp_path / "grown"))
    info = read_info(tmp_path / "grown")
    config = replace(config, sharding=ShardingConfig(optimizer=info.table_optimizer))
    result = train(config, World())
    assert (result["epochs"], result["data"]) == (2, "new")
    ours, its = (
        read_info(path).state.config["encoder"] for path in (checkpoint_at(tmp_path / "on"), tmp_path / "grown")
    )
    assert ours["log_gap_mean"] == its["log_gap_mean"]  # normalised as the weights know it, not anew
    assert its["log_gap_mean"] != anew["log_gap_mean"]


def test_a_grown_checkpoint_is_for_as_many_ranks(trained, folder, tmp_path):
    info = grow(trained, tmp_path / "grown", folder / "new")
    assert info == read_info(tmp_path / "grown")
    assert info.world_size == read_info(trained).world_size
    assert len([*(tmp_path / "grown").glob("*.distcp")]) == info.world_size


@OF_ONE
def test_a_data_set_that_does_not_extend_the_old_one_is_refused_and_leaves_nothing(trained, folder, tmp_path):
    prepare(folder / "new.parquet", tmp_path / "anew", CONFIG)  # the same items in other rows
    with pytest.raises(CheckpointError, match=r"must be of a vocabulary that .*anew extends, .*--extends"):
        grow(trained, tmp_path / "grown", tmp_path / "anew")
    prepare(write_log(tmp_path / "less.parquet", 1, 5), tmp_path / "less", CONFIG)
    with pytest.raises(CheckpointError, match=r"must be of a vocabulary that .*less extends"):
        grow(trained, tmp_path / "grown", tmp_path / "less")
    assert not [path for path in tmp_path.iterdir() if "grown" in path.name]


@OF_ONE
def test_other_context_features_are_refused_by_name(trained, folder, tmp_path):
    without = replace(CONFIG, log=replace(CONFIG.log, user_columns=()))
    prepare(folder / "old.parquet", tmp_path / "old", without)
    with pytest.raises(CheckpointError, match=r"must have the tables \['item'\], got \['home', 'item'\]"):
        grow(trained, tmp_path / "grown", tmp_path / "old")


@OF_ONE
def test_a_damaged_checkpoint_is_refused(trained, folder, tmp_path):
    damaged = Path(shutil.copytree(trained.resolve(), tmp_path / "damaged"))
    file = next(damaged.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"cut short or edited"):
        grow(damaged, tmp_path / "grown", folder / "new")
    assert not (tmp_path / "grown").exists()


@OF_ONE
def test_what_is_there_is_not_overwritten(trained, folder, tmp_path):
    (tmp_path / "grown").mkdir()
    with pytest.raises(CheckpointError, match=r"grown must not be there yet"):
        grow(trained, tmp_path / "grown", folder / "new")


@OF_ONE
def test_training_on_new_data_with_an_old_checkpoint_names_the_way_out(trained, folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"ssd-torchrec grow"):
        train(run_on(folder / "new", tmp_path, "new", resume=str(trained)), World())
