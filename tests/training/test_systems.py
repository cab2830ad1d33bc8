"""Every system learns through its component: what TorchX would run, run here."""

import json
import shlex
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow.parquet as pq
import pytest

from ssd_torchrec.__main__ import main
from ssd_torchrec.data.objective import Negatives
from ssd_torchrec.data.parquet import open_dataset
from ssd_torchrec.data.rows import Rows, offsets_of
from ssd_torchrec.data.vocabulary import Vocabulary
from ssd_torchrec.data.writer import DatasetWriter
from ssd_torchrec.encoders.registry import SYSTEMS

runner = pytest.importorskip("torchx.runner", reason="torchx is an extra")
TRAIN = Path(__file__).parents[2] / "torchx_components" / "train.py"
TASTES, ITEMS_OF_A_TASTE, USERS = 4, 10, 200
QUICK = ["--training.epochs", "5", "--training.warmup-steps", "5", "--data.tokens-per-batch", "256"]
QUICK += ["--sharding.learning-rate", "0.01"]  # some 50 steps


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Users who keep to one of four tastes nine times in ten: their history tells it, popularity and context do not."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(8, 20, size=USERS)
    taste = np.repeat(rng.integers(TASTES, size=USERS), lengths)
    taste = np.where(rng.random(len(taste)) < 0.9, taste, rng.integers(TASTES, size=len(taste)))
    vocabulary = Vocabulary(np.arange(TASTES * ITEMS_OF_A_TASTE), num_oov_buckets=1)
    rows = Rows(
        user_id=np.arange(USERS),
        item=vocabulary.first_item + taste * ITEMS_OF_A_TASTE + rng.integers(ITEMS_OF_A_TASTE, size=len(taste)),
        timestamp=1_600_000_000 + np.rint(60 * np.exp(rng.normal(size=len(taste)))).astype(np.int64).cumsum(),
        offsets=offsets_of(lengths),
    )
    folder = tmp_path_factory.mktemp("data") / "tastes"
    with DatasetWriter(folder, name="tastes", vocabulary=vocabulary) as writer:
        writer.append(rows)
        writer.finish()
    return folder


def words_of(component: str, *flags: str) -> list[str]:
    """What the component has our command line do."""
    with runner.get_runner() as torchx:
        app = torchx.dryrun_component(f"{TRAIN}:{component}", list(flags), "local_cwd", cfg={})._app
    words = shlex.split(app.roles[0].args[1])
    return words[words.index("ssd_torchrec") + 1 :]


PEERS = (
    "sasrec",
    "tisasrec",
    "bert4rec",
    "gru4rec",
    "caser",
    "lrurec",
)  # whom the state-space systems are held against


@pytest.mark.parametrize(
    "system", [pytest.param(system, marks=[pytest.mark.slow] * (system in PEERS)) for system in SYSTEMS]
)
def test_every_system_learns_more_than_what_is_popular(system, data, tmp_path):
    flags = ["-j", "1x1", "--data", str(data), "--output", str(tmp_path), "--name", "run"]
    assert main(words_of(system, *flags, "--", *QUICK)) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["model"] == system
    for stage in ("valid", "test"):
        assert result[stage]["ndcg@10"] > 1.5 * result["most_popular"][stage]["ndcg@10"]


@pytest.mark.slow
@pytest.mark.parametrize("negatives", get_args(Negatives))
def test_against_items_drawn_for_the_batch_as_much_is_learned(negatives, data, tmp_path):
    flags = ["-j", "1x1", "--data", str(data), "--output", str(tmp_path), "--name", "run"]
    drawn = ["--objective.loss", "sampled_softmax", "--objective.negatives", negatives]
    drawn += [] if negatives == "in_batch" else ["--objective.num-negatives", "16"]  # of 40 items
    assert main(words_of("tim4rec", *flags, "--", *QUICK, *drawn)) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    for stage in ("valid", "test"):
        assert result[stage]["ndcg@10"] > 1.5 * result["most_popular"][stage]["ndcg@10"]


@pytest.mark.slow
def test_what_was_learned_at_hidden_items_is_recommended_at_one(data, tmp_path):
    flags = ["-j", "1x1", "--data", str(data), "--output", str(tmp_path), "--name", "run"]
    assert main(words_of("bert4rec", *flags, "--", *QUICK, "--data.max-length", "6")) == 0
    (tmp_path / "users.csv").write_text("user_id\n" + "\n".join(map(str, range(50))) + "\n")
    output = str(tmp_path / "items.parquet")
    words = ["recommend", str(tmp_path / "run"), str(tmp_path / "users.csv"), "--output", output, "--no-filter-seen"]
    assert main([*words, "--k", "5"]) == 0
    recommended = [items.as_py() for items in pq.read_table(output)["item"]]
    rows = open_dataset(data).read(0)
    same = []
    for user, items in enumerate(recommended):
        last = rows.item[rows.offsets[user] : rows.offsets[user + 1]][-6:] - open_dataset(data).meta.first_item
        taste = np.bincount(last // ITEMS_OF_A_TASTE).argmax()
        same.append(np.mean(np.array(items) // ITEMS_OF_A_TASTE == taste))
    assert np.mean(same) > 0.4  # 0.25 by chance, with a deviation of 0.03
