from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ssd_torchrec.__main__ import main
from ssd_torchrec.data.parquet import open_dataset
from ssd_torchrec.distributed.checkpoint import load_weights, read_info
from ssd_torchrec.distributed.process import World
from ssd_torchrec.encoders.published import PUBLISHED_NAMES, published_state
from ssd_torchrec.encoders.registry import SYSTEMS
from ssd_torchrec.encoders.ssd4rec import SSD4RecConfig
from ssd_torchrec.errors import CheckpointError, ConfigError, DataError
from ssd_torchrec.training.build import build
from ssd_torchrec.training.config import DataConfig, EvaluationConfig, RunConfig
from ssd_torchrec.training.import_weights import import_weights
from ssd_torchrec.training.run import config_of, evaluate_checkpoint
from tests.data.samples import NUM_ITEMS, dataset, random_rows, with_action

CONFIG = SYSTEMS["mamba4rec"].small
ORDER = np.random.default_rng(0).permutation(NUM_ITEMS)  # raw id of each row of the published table but the first


@pytest.fixture
def published(tmp_path) -> tuple[Path, Path, RunConfig]:
    """Weights, items, and the run to make of them."""
    dataset(tmp_path / "data", random_rows([9, 12, 7, 20, 5]))
    torch.manual_seed(1)
    table = torch.randn(NUM_ITEMS + 1, CONFIG.width)
    names = PUBLISHED_NAMES[CONFIG.title](CONFIG)
    torch.save({"state_dict": published_state(CONFIG.build(), names, table)}, tmp_path / "weights.pth")
    (tmp_path / "items.txt").write_text("\n".join(map(str, ORDER)) + "\n")
    data = DataConfig(path=str(tmp_path / "data"))
    return (
        tmp_path / "weights.pth",
        tmp_path / "items.txt",
        RunConfig(encoder=CONFIG, data=data, output=str(tmp_path / "runs"), name="published"),
    )


def test_each_item_gets_its_row_and_the_encoder_its_weights(published):
    file, items, run = published
    folder = import_weights(file, items, run)
    best = folder / "checkpoints" / "best"
    histories = open_dataset(run.data.path)
    trainable = build(config_of(best, "", World()), histories.meta, World())
    load_weights(best, trainable, vocabulary=histories.meta.item_vocabulary_hash)
    state = torch.load(file)["state_dict"]
    table, (weight,) = state["item_embedding.weight"], trainable.module.items.parameters()
    first = histories.meta.first_item
    for row, raw in enumerate(ORDER, start=1):
        torch.testing.assert_close(weight[first + raw], table[row], rtol=0, atol=0)
    torch.testing.assert_close(weight[0], table[0], rtol=0, atol=0)
    got = published_state(trainable.module.tower.encoder, PUBLISHED_NAMES[CONFIG.title](CONFIG), table)
    assert all(torch.equal(got[name], tensor) for name, tensor in state.items())
    assert not trainable.module.tower.context_proj.weight.any()


def test_the_command_makes_a_run_that_can_be_evaluated(published, capsys):
    file, items, run = published
    output = str(Path(run.output) / "typed")
    words = [str(file), "--model", "mamba4rec", "--data", run.data.path, "--items", str(items), "--output", output]
    assert main(["import-weights", *words]) == 0
    assert main(["evaluate", output]) == 0
    assert "NDCG@10" in capsys.readouterr().out
    assert main(["import-weights", *words]) == 2
    assert "holds a run already" in capsys.readouterr().err


def test_event_columns_count_for_nothing_until_they_are_trained(published, tmp_path):
    file, items, run = published
    dataset(tmp_path / "data", with_action(random_rows([9, 12, 7, 20, 5])))
    plain = import_weights(file, items, run)
    told = import_weights(file, items, replace(run, name="told", data=replace(run.data, event_columns=("action",))))
    one, other = (evaluate_checkpoint(folder, "", EvaluationConfig(), World()) for folder in (plain, told))
    assert one["test"] == other["test"]
    assert [name for name in read_info(told / "checkpoints" / "best").tensors if "action" in name]


def refused(published, error, words, **changes):
    file, items, run = published
    given = {"file": file, "items": items, "run": run} | changes
    with pytest.raises(error, match=words):
        import_weights(given["file"], given["items"], given["run"])
    assert not Path(run.output).exists()


def test_an_encoder_that_nobody_published_is_refused(published):
    refused(
        published, ConfigError, "must be one of TiM4Rec", run=replace(published[2], encoder=SYSTEMS["gru4rec"].small)
    )


def test_weights_of_another_shape_or_program_are_refused(published):
    deeper = replace(published[2], encoder=replace(CONFIG, layers=3))
    refused(published, CheckpointError, "missing", run=deeper)
    refused(published, CheckpointError, "unknown", run=replace(deeper, encoder=SSD4RecConfig(beta=0.0)))


def test_files_that_hold_no_tensors_are_refused(published, tmp_path):
    torch.save([1, 2], tmp_path / "numbers.pth")
    refused(published, CheckpointError, "must hold a state dict", file=tmp_path / "numbers.pth")
    (tmp_path / "text.pth").write_text("weights")
    refused(published, CheckpointError, "must hold tensors only", file=tmp_path / "text.pth")


def test_paths_that_are_no_files_are_named(published, tmp_path):
    refused(published, CheckpointError, r"none\.pth must be a file, got nothing", file=tmp_path / "none.pth")
    refused(published, CheckpointError, "must be a file, got a folder", items=tmp_path)


def test_items_that_are_not_the_tables_are_refused(published, tmp_path):
    lines = published[1].read_text().splitlines()
    for name, text, words in (
        ("short", lines[:-1], "must name the 50 items"),
        ("twice", [lines[1], *lines[1:]], "got 49 of them"),
        ("words", ["apple", *lines[1:]], "must hold int64 ids"),
    ):
        (tmp_path / name).write_text("\n".join(text))
        refused(published, DataError, words, items=tmp_path / name)
