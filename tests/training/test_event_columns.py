"""A log whose actions decide what comes next, from `prepare` to recommendations and to a grown checkpoint.

    a[t]   one of 8 actions or, now and then, none; drawn without regard to the items
    x[t+1] one of the 4 items of a[t]; of all 32 where there was no action

Whoever does not see the actions has nothing to tell the next item from.
"""

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
from ssd_torchrec.distributed.checkpoint import load_weights, read_info
from ssd_torchrec.distributed.process import World
from ssd_torchrec.distributed.shard import ShardingConfig
from ssd_torchrec.encoders.sasrec import SASRecConfig
from ssd_torchrec.errors import CheckpointError, ConfigError, DataError
from ssd_torchrec.models.next_item import NextItemModel
from ssd_torchrec.training.build import build
from ssd_torchrec.training.config import DataConfig, EvaluationConfig, RunConfig, TrainingConfig
from ssd_torchrec.training.grow import grow
from ssd_torchrec.training.job import checkpoint_at
from ssd_torchrec.training.recommend import RecommendConfig, recommend
from ssd_torchrec.training.run import config_of, evaluate_checkpoint, train

ACTIONS, ITEMS_OF_EACH, USERS, LENGTH = 8, 4, 200, 20
NAMES = ["view", "cart", "buy", "like", "hide", "rate", "gift", "send"]
PREPARE = PrepareConfig(log=LogConfig(item="item", event_columns=("action", "idle")), k_core=0, num_oov_buckets=2)
ACTION = "model.event_columns.embeddings.action.weight"


def write_log(file: Path, names: list[str], seed: int = 0) -> Path:
    """Events user by user; "idle" is a further column, always the same."""
    rng = np.random.default_rng(seed)
    action = rng.integers(ACTIONS, size=(USERS, LENGTH))
    none = rng.random(action.shape) < 0.05
    group = np.where(none, rng.integers(ACTIONS, size=action.shape), action)
    item = np.roll(group, 1, axis=1) * ITEMS_OF_EACH + rng.integers(ITEMS_OF_EACH, size=action.shape)
    named = np.where(none, None, np.array(names, object)[action]).ravel()
    table = {
        "user_id": np.repeat(np.arange(USERS), LENGTH),
        "item": 1000 + item.ravel(),
        "timestamp": 10**9 + rng.integers(1, 10**4, size=action.size).cumsum(),
        "action": pa.array(named.tolist(), pa.string()),
        "idle": ["so"] * action.size,
    }
    pq.write_table(pa.table(table), file)
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The data set "old", and "new", which extends it by an action."""
    folder = tmp_path_factory.mktemp("event-columns")
    prepare(write_log(folder / "old.parquet", NAMES), folder / "old", PREPARE)
    log = write_log(folder / "new.parquet", [*NAMES[:7], "zoom"], seed=1)
    prepare(log, folder / "new", replace(PREPARE, extends=str(folder / "old")))
    return folder


def run_on(data: Path, output: Path, name: str, *columns: str) -> RunConfig:
    return RunConfig(
        name=name,
        output=str(output),
        encoder=SASRecConfig(width=16, layers=1, heads=2, dropout=0.1),
        data=DataConfig(path=str(data), event_columns=columns, tokens_per_batch=512),
        sharding=ShardingConfig(learning_rate=0.01),
        training=TrainingConfig(epochs=12, log_every=10, warmup_steps=5, evaluate_every=6),
    )


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory) -> tuple[Path, dict]:
    """A run that is told the actions."""
    output = tmp_path_factory.mktemp("runs")
    return output / "told", train(run_on(folder / "old", output, "told", "action"), World())


def test_a_model_that_is_told_actions_beats_one_that_is_not(trained, folder, tmp_path):
    _, told = trained
    plain = train(run_on(folder / "old", tmp_path, "plain"), World())
    assert told["test"]["hr@10"] > 0.9
    assert told["test"]["ndcg@10"] > 0.5
    assert plain["test"]["hr@10"] < 0.5  # of 32 items 10 are a guess at 0.31
    assert plain["test"]["ndcg@10"] < 0.25


def test_checkpoints_hold_the_columns_and_are_evaluated_with_them(trained, folder):
    run, told = trained
    info = read_info(checkpoint_at(run))
    assert info.state.config["data"]["event_columns"] == ["action"]
    assert [name for name in info.tensors if "event_columns" in name] == [ACTION.removeprefix("model.")]
    again = evaluate_checkpoint(run, str(folder / "old"), EvaluationConfig(tokens_per_batch=300), World())
    assert again["test"] == pytest.approx(told["test"], abs=1e-9)


def test_a_checkpoint_of_other_columns_is_not_gone_on_from(trained, folder, tmp_path):
    config = run_on(folder / "old", tmp_path, "other")
    config = replace(config, training=replace(config.training, resume=str(trained[0])))
    with pytest.raises(CheckpointError, match=r"event_columns\.embeddings\.action\.weight"):
        train(config, World())


def test_columns_that_the_data_set_does_not_have_are_refused_before_any_work(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"which has \['action', 'idle'\], got \['colour'\]"):
        train(run_on(folder / "old", tmp_path, "run", "action", "colour"), World())
    assert not (tmp_path / "run").exists()


def recommended(run: Path, folder: Path, users: dict) -> list[dict]:
    pq.write_table(pa.table(users), folder / "users.parquet")
    recommend(run, folder / "users.parquet", folder / "items.parquet", RecommendConfig(k=4, filter_seen=False), World())
    return pq.read_table(folder / "items.parquet").to_pylist()


def test_the_last_action_of_a_history_decides_what_is_recommended(trained, tmp_path):
    run, _ = trained
    history = {"user_id": NAMES, "item": [[1003, 1030, 1017]] * 8, "timestamp": [[10**9, 10**9 + 50, 10**9 + 99]] * 8}
    answers = recommended(run, tmp_path, history | {"action": [["buy", None, name] for name in NAMES]})
    for number, answer in enumerate(answers):
        assert {(item - 1000) // ITEMS_OF_EACH for item in answer["item"]} == {number}
    with pytest.raises(DataError, match="or user_id, action, item, timestamp"):
        recommended(run, tmp_path, history)


def test_known_users_get_what_they_get_for_the_histories_that_they_bring(trained, folder, tmp_path):
    run, _ = trained
    log = pq.read_table(folder / "old.parquet", columns=["user_id", "item", "timestamp", "action"])
    log = log.slice(0, 30 * LENGTH)
    by_user = {
        name: [log[name][user * LENGTH : (user + 1) * LENGTH].to_pylist() for user in range(30)]
        for name in ("item", "timestamp", "action")
    }
    brought = recommended(run, tmp_path, {"user_id": range(30), **by_user})
    known = recommended(run, tmp_path, {"user_id": range(30)})
    assert [answer["item"] for answer in brought] == [answer["item"] for answer in known]
    np.testing.assert_allclose(*([answer["score"] for answer in of] for of in (brought, known)), rtol=1e-5, atol=1e-5)


def loaded(checkpoint: Path) -> NextItemModel:
    config = config_of(checkpoint, "", World())
    meta = open_dataset(config.data.path).meta
    trainable = build(config, meta, World())
    load_weights(checkpoint, trainable, vocabulary=meta.item_vocabulary_hash)
    assert isinstance(trainable.module, NextItemModel)
    return trainable.module.eval()


def test_new_values_begin_as_unknown_ones_in_a_grown_checkpoint(trained, folder, tmp_path):
    old = checkpoint_at(trained[0])
    grow(old, tmp_path / "grown", folder / "new")
    before, after = (loaded(path).event_columns.state_dict() for path in (old, tmp_path / "grown"))
    (was,), (now,) = before.values(), after.values()
    values = open_dataset(folder / "new").values()["action"].to_pylist()
    assert (len(was), len(now), values[0], values[-1]) == (9, 10, None, "zoom")
    assert was[0].any()
    assert torch.equal(now[:9], was)
    assert torch.equal(now[9], was[0])


def test_a_grown_checkpoint_trains_on_and_learns_the_new_value(trained, folder, tmp_path):
    grow(checkpoint_at(trained[0]), tmp_path / "grown", folder / "new")
    config = run_on(folder / "new", tmp_path, "on", "action")
    result = train(replace(config, training=replace(config.training, resume=str(tmp_path / "grown"))), World())
    assert result["test"]["hr@10"] > 0.9


def test_a_data_set_that_has_lost_the_column_is_refused(trained, folder, tmp_path):
    log = replace(PREPARE.log, event_columns=("idle",))
    prepare(folder / "old.parquet", tmp_path / "less", replace(PREPARE, log=log))
    with pytest.raises(ConfigError, match=r"which has \['idle'\], got \['action'\]"):
        grow(checkpoint_at(trained[0]), tmp_path / "grown", tmp_path / "less")
    assert not (tmp_path / "grown").exists()


def test_a_run_without_columns_grows_whatever_columns_the_data_set_has(folder, tmp_path):
    config = run_on(folder / "old", tmp_path, "plain")
    train(replace(config, training=replace(config.training, epochs=1)), World())
    info = grow(checkpoint_at(tmp_path / "plain"), tmp_path / "grown", folder / "new")
    assert not [name for name in info.tensors if "event_columns" in name]
