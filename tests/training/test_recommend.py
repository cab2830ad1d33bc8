"""Recommendations against brute force over all scores, in one process and in two; what is refused before any work."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ssd_torchrec.__main__ import main
from ssd_torchrec.data.batch import collate
from ssd_torchrec.data.generate import generate
from ssd_torchrec.data.parquet import UserHistories, open_dataset
from ssd_torchrec.data.rows import Rows
from ssd_torchrec.data.synthetic import SyntheticConfig
from ssd_torchrec.data.vocabulary import Vocabulary
from ssd_torchrec.data.writer import DatasetWriter
from ssd_torchrec.distributed.checkpoint import load_weights, read_info
from ssd_torchrec.distributed.process import World
from ssd_torchrec.encoders.tim4rec import TiM4RecConfig
from ssd_torchrec.errors import CheckpointError, ConfigError, DataError
from ssd_torchrec.models.next_item import NextItemModel
from ssd_torchrec.training import recommend as module
from ssd_torchrec.training.build import build
from ssd_torchrec.training.config import DataConfig, RunConfig, TrainingConfig
from ssd_torchrec.training.job import checkpoint_at
from ssd_torchrec.training.recommend import RecommendConfig, Recommended, recommend
from ssd_torchrec.training.run import train
from ssd_torchrec.training.run_folder import from_json

NUM_USERS = 60
SMALL = RecommendConfig(k=10, tokens_per_batch=300, users_per_pass=16, candidates_per_chunk=77)
EXACT = {"rtol": 1e-5, "atol": 1e-5}  # scores; a matrix product may be summed otherwise in other company


def named(folder: Path, plain: UserHistories) -> None:
    """The same histories, with strings for the names of users and items."""
    vocabulary = plain.vocabulary()
    names = Vocabulary([f"item {item}" for item in vocabulary.ids.to_pylist()], vocabulary.num_oov_buckets)
    known = {"name": "named", "vocabulary": names, "context": plain.meta.context, "raw_user_type": "string"}
    with DatasetWriter(folder, **known, events_per_row_group=500) as writer:
        for rows in plain:
            writer.append(rows, pa.array([f"user {user}" for user in rows.user_id], pa.large_string()))
        writer.finish()


@pytest.fixture(scope="module", params=["int64", "strings"])
def run(request, tmp_path_factory) -> Path:
    """A small run's folder."""
    output = tmp_path_factory.mktemp("runs")
    data = output / "data"
    generate(SyntheticConfig(num_users=NUM_USERS), data)
    if request.param == "strings":
        named(output / "named", open_dataset(data))
        data = output / "named"
    config = RunConfig(
        name="run",
        output=str(output),
        encoder=TiM4RecConfig(width=16, head_width=8, state=8),
        data=DataConfig(path=str(data), tokens_per_batch=512),
        training=TrainingConfig(epochs=1, warmup_steps=1),
    )
    train(config, World())
    return output / "run"


def data_of(run: Path) -> UserHistories:
    return open_dataset(from_json(RunConfig, read_info(checkpoint_at(run)).state.config).data.path)


def users_of(histories: UserHistories) -> list:
    return [user for group in range(histories.num_row_groups) for user in histories.raw_user_ids(group).to_pylist()]


def scores_of_all(run: Path, rows: Rows) -> torch.Tensor:
    """(rows, V) by the definition: everything at once."""
    histories = data_of(run)
    config = from_json(RunConfig, read_info(checkpoint_at(run)).state.config)
    trainable = build(config, histories.meta, World())
    load_weights(checkpoint_at(run), trainable, vocabulary=histories.meta.item_vocabulary_hash)
    model = trainable.module.eval()
    assert isinstance(model, NextItemModel)
    nothing = np.full(rows.num_events, -1)
    batch = collate(rows, nothing, histories.meta, global_targets=1, with_candidates=False)
    with torch.no_grad():
        items = model.item_vectors(torch.arange(histories.meta.first_item, histories.meta.num_table_rows))
        return model.last_queries(batch) @ items.T


def expected(run: Path, rows: Rows, k: int, *, filter_seen: bool) -> tuple[list[list], list[list[float]]]:
    """Raw ids and scores of the best k items of each row."""
    histories = data_of(run)
    ids = histories.vocabulary().ids.to_pylist()
    items, scores = [], []
    for row, score in enumerate(scores_of_all(run, rows).tolist()):
        seen = set((rows.item[rows.offsets[row] : rows.offsets[row + 1]] - histories.meta.first_item).tolist())
        left = [item for item in range(len(ids)) if not (filter_seen and item in seen)]
        best = sorted(left, key=lambda item: (-score[item], item))[:k]
        items.append([ids[item] for item in best])
        scores.append([score[item] for item in best])
    return items, scores


def asked_by_id(folder: Path, users: list) -> Path:
    pq.write_table(pa.table({"user_id": users}), folder / "users.parquet")
    return folder / "users.parquet"


def asked_with_histories(folder: Path, histories: UserHistories, rows: Rows, users: list) -> Path:
    vocabulary = histories.vocabulary()
    table = {"user_id": pa.array(users), "item": lists(vocabulary.ids_of(rows.item), rows.offsets)}
    table["timestamp"] = lists(pa.array(rows.timestamp), rows.offsets)
    table |= {name: lists(pa.array(bags.values), bags.offsets) for name, bags in rows.context.items()}
    pq.write_table(pa.table(table), folder / "users.parquet")
    return folder / "users.parquet"


def lists(values: pa.Array, offsets: np.ndarray) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)


def check(output: Path, users: list, answers: tuple[list[list], list[list[float]]]) -> None:
    written = pq.read_table(output)
    assert written.column_names == ["user_id", "item", "score"]
    assert written["score"].type == pa.list_(pa.float32())
    assert written["user_id"].to_pylist() == users
    items, scores = answers
    assert written["item"].to_pylist() == items
    for got, known in zip(written["score"].to_pylist(), scores, strict=True):
        np.testing.assert_allclose(got, known, **EXACT)


@pytest.mark.parametrize("filter_seen", [True, False], ids=["unseen", "all-items"])
def test_known_users_get_what_brute_force_gives_in_the_order_asked_for(run, tmp_path, filter_seen):
    histories = data_of(run)
    every, rows = users_of(histories), Rows.concatenate(list(histories))
    chosen = np.random.default_rng(0).permutation(len(every))[:40]
    chosen = np.concatenate([chosen, chosen[:3]])  # some twice
    users = [every[at] for at in chosen]
    output = tmp_path / "items.parquet"
    written = recommend(run, asked_by_id(tmp_path, users), output, replace(SMALL, filter_seen=filter_seen), World())
    check(output, users, expected(run, rows.take(chosen, rows.lengths[chosen]), SMALL.k, filter_seen=filter_seen))
    assert (written.num_users, written.num_items, written.num_without_items) == (43, 43 * SMALL.k, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["items.parquet", "users.parquet"]


def test_histories_that_are_brought_get_what_brute_force_gives(run, tmp_path):
    histories = data_of(run)
    rows = Rows.concatenate(list(histories))[:20]
    cut = rows.take(np.arange(20), np.minimum(rows.lengths, 5) * (np.arange(20) != 3))  # the fourth brings nothing
    users = [f"guest {number}" for number in range(20)]
    output = tmp_path / "items.parquet"
    written = recommend(run, asked_with_histories(tmp_path, histories, cut, users), output, SMALL, World())
    items, scores = expected(run, cut, SMALL.k, filter_seen=True)
    items[3], scores[3] = [], []
    check(output, users, (items, scores))
    assert (written.num_without_items, written.num_unknown) == (1, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["items.parquet", "users.parquet"]


def test_items_that_nobody_knows_do_not_keep_a_user_from_an_answer(run, tmp_path):
    histories = data_of(run)
    unknown = 10**12 if pa.types.is_int64(histories.vocabulary().ids.type) else "never seen"
    rows = Rows.concatenate(list(histories))
    table = {"user_id": [1], "item": [[unknown]], "timestamp": [[10**9]]}
    table |= {name: pa.array([[]], pa.list_(pa.int64())) for name in rows.context}
    file = tmp_path / "users.parquet"
    pq.write_table(pa.table(table), file)
    recommend(run, file, tmp_path / "items.parquet", SMALL, World())
    written = pq.read_table(tmp_path / "items.parquet").to_pylist()[0]
    assert len(set(written["item"])) == SMALL.k
    assert unknown not in written["item"]


def test_fewer_items_come_where_fewer_are_left(run, tmp_path):
    histories = data_of(run)
    user, rows = users_of(histories)[0], histories.read(0)[:1]
    config = replace(SMALL, k=10**6)
    recommend(run, asked_by_id(tmp_path, [user]), tmp_path / "items.parquet", config, World())
    check(tmp_path / "items.parquet", [user], expected(run, rows, 10**6, filter_seen=True))
    written = pq.read_table(tmp_path / "items.parquet")["item"][0].as_py()
    assert len(written) == histories.meta.num_items - len(set(rows.item.tolist()))


def test_portions_do_not_change_the_answers(run, tmp_path, monkeypatch):
    file = asked_by_id(tmp_path, users_of(data_of(run)))
    recommend(run, file, tmp_path / "one.parquet", RecommendConfig(k=5), World())
    monkeypatch.setattr(module, "USERS_PER_WRITE", 7)
    small = RecommendConfig(k=5, tokens_per_batch=1, users_per_pass=1, candidates_per_chunk=100)
    recommend(run, file, tmp_path / "other.parquet", small, World())
    one, other = pq.read_table(tmp_path / "one.parquet"), pq.read_table(tmp_path / "other.parquet")
    assert one["item"].to_pylist() == other["item"].to_pylist()
    np.testing.assert_allclose(np.ravel(one["score"].to_pylist()), np.ravel(other["score"].to_pylist()), **EXACT)


def test_unknown_users_are_refused_or_left_out(run, tmp_path):
    known = users_of(data_of(run))[0]
    stranger = 10**12 if isinstance(known, int) else "nobody"
    file, output = asked_by_id(tmp_path, [stranger, known]), tmp_path / "items.parquet"
    output.write_text("old")
    with pytest.raises(DataError, match="1 of 2 are not"):
        recommend(run, file, output, SMALL, World())
    assert output.read_text() == "old"
    written = recommend(run, file, output, replace(SMALL, skip_unknown=True), World())
    assert pq.read_table(output)["user_id"].to_pylist() == [known]
    assert (written.num_users, written.num_unknown) == (1, 1)
    nobody = recommend(run, asked_by_id(tmp_path, [stranger]), output, replace(SMALL, skip_unknown=True), World())
    assert (nobody.num_users, nobody.num_unknown, pq.read_table(output).num_rows) == (0, 1, 0)


def test_weights_that_are_not_finite_are_refused_and_the_old_file_stays(run, tmp_path, monkeypatch):
    def broken(checkpoint, trainable, **vocabulary):
        load_weights(checkpoint, trainable, **vocabulary)
        with torch.no_grad():
            next(trainable.module.tower.parameters()).fill_(torch.nan)

    monkeypatch.setattr(module, "load_weights", broken)
    output = tmp_path / "items.parquet"
    output.write_text("old")
    with pytest.raises(CheckpointError, match="scores must be finite"):
        recommend(run, asked_by_id(tmp_path, users_of(data_of(run))[:2]), output, SMALL, World())
    assert output.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["items.parquet", "users.parquet"]


def test_an_output_that_cannot_be_written_is_refused(run, tmp_path):
    file = asked_by_id(tmp_path, users_of(data_of(run))[:1])
    folder = tmp_path / "folder.parquet"
    folder.mkdir()
    for output in (tmp_path / "no" / "items.parquet", folder, tmp_path / "items.csv"):
        with pytest.raises(ConfigError, match=r"must be a file that ends in \.parquet, new or old, in a folder"):
            recommend(run, file, output, SMALL, World())
    with pytest.raises(ConfigError, match="another file than the one with the users"):
        recommend(run, file, file, SMALL, World())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.parquet", "users.parquet"]


@pytest.mark.parametrize("field", ["k", "tokens_per_batch", "users_per_pass", "candidates_per_chunk"])
def test_counts_below_1_are_refused(field):
    with pytest.raises(ConfigError, match=f"{field} must be at least 1, got 0"):
        RecommendConfig(**{field: 0})


def test_another_vocabulary_is_refused(run, tmp_path):
    other = tmp_path / "other"
    generate(SyntheticConfig(num_users=30, group_size=11), other)
    file = asked_by_id(tmp_path, users_of(open_dataset(other))[:1])
    with pytest.raises(CheckpointError):
        recommend(run, file, tmp_path / "items.parquet", replace(SMALL, data=str(other)), World())


def test_what_was_written_is_said_in_a_line():
    written = Recommended(num_users=2000, num_items=9000, num_without_items=3, num_unknown=4, elapsed_s=2.0)
    assert str(written) == (
        "9,000 items for 2,000 users in 2.0 s, 1,000 users/s, 3 users without any, 4 unknown users left out"
    )


@pytest.mark.slow
@pytest.mark.parametrize("run", ["strings"], indirect=True)
def test_two_processes_write_what_one_writes(run, tmp_path, capsys):
    histories = data_of(run)
    rows = Rows.concatenate(list(histories))
    file = asked_with_histories(tmp_path, histories, rows, users_of(histories))
    options = ["--k", "7", "--tokens-per-batch", "25", "--users-per-pass", "9", "--candidates-per-chunk", "64"]
    words = ["recommend", str(run), str(file), *options, "--output"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ssd_torchrec"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(
        [sys.executable, *launcher, *words, str(tmp_path / "two.parquet")],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert main([*words, str(tmp_path / "one.parquet")]) == 0
    printed, _ = job.communicate(timeout=240)
    assert job.returncode == 0, printed[-3000:]
    for said in (printed, capsys.readouterr().out):
        assert said.count(f"{7 * NUM_USERS} items for {NUM_USERS} users") == 1  # rank 0 speaks for all
    for processes in ("one", "two"):
        check(tmp_path / f"{processes}.parquet", users_of(histories), expected(run, rows, 7, filter_seen=True))
