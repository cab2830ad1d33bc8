"""A checkpoint goes on as if the run had never stopped, at any world size and split, or is refused by name."""

import json
import os
import pickle
import shutil
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch

from ssd_torchrec.distributed import checkpoint, checkpoint_files
from ssd_torchrec.distributed.checkpoint import (
    TrainState,
    latest_checkpoint,
    load_checkpoint,
    load_weights,
    read_info,
    save_checkpoint,
)
from ssd_torchrec.distributed.process import World
from ssd_torchrec.distributed.shard import DenseOptimizerConfig, ShardingConfig, Trainable
from ssd_torchrec.distributed.state import dense_state
from ssd_torchrec.errors import CheckpointError, ConfigError
from tests.distributed.example import train, trainable, whole_weights
from tests.distributed.world import spawn

STATE = TrainState(step=3, vocabulary="words", position={"epoch": 0, "batches": 3}, config={"width": 16})
DENSE = DenseOptimizerConfig(learning_rate=0.01)  # Adam: has state to lose
BEFORE, AFTER = range(3), range(3, 8)
CLOSE = 1e-6

SPLITS = {
    "row_wise": ShardingConfig(sharding="row_wise", optimizer="rowwise_adagrad"),
    "table_wise": ShardingConfig(sharding="table_wise", optimizer="rowwise_adagrad"),
    "row_wise-adagrad": ShardingConfig(sharding="row_wise", optimizer="adagrad"),
    "column_wise-adagrad": ShardingConfig(sharding="column_wise", optimizer="adagrad"),
}
WHOLE = {
    name: ShardingConfig(sharding="none", optimizer=name) for name in ("rowwise_adagrad", "adagrad", "sgd", "adam")
}


def save_and_go_on(
    world: World, folder: Path, sharding: ShardingConfig, dense: DenseOptimizerConfig = DENSE, **told: bool
) -> list[float]:
    t = trainable(world, sharding, dense, **told)
    train(t, world, BEFORE, **told)
    save_checkpoint(folder, t, STATE)
    return train(t, world, AFTER, **told)


def load_and_go_on(
    world: World, folder: Path, sharding: ShardingConfig, dense: DenseOptimizerConfig = DENSE, **told: bool
) -> list[float]:
    t = trainable(world, sharding, dense, **told)
    train(t, world, range(50, 52), **told)  # what was there before the load must not matter
    path = latest_checkpoint(folder)
    assert path is not None
    assert load_checkpoint(path, t, vocabulary="words").state == STATE
    return train(t, world, AFTER, **told)


def refusals(world: World, folder: Path) -> str:
    """The second rank finds its share of the files damaged: both must hear of it."""
    t = trainable(world, SPLITS["row_wise"], DENSE)
    path = save_checkpoint(folder, t, STATE)
    name = sorted(read_info(path).files)[1]  # the second rank looks at it
    if world.rank == 1:
        os.truncate(path / name, 10)
    torch.distributed.barrier()
    try:
        load_checkpoint(path, t, vocabulary="words")
    except CheckpointError as error:
        return str(error)
    return "nothing"


def full_disk_on_second(world: World, folder: Path) -> tuple[str, str | None]:
    t = trainable(world, SPLITS["row_wise"], DENSE)
    good = save_checkpoint(folder, t, STATE)
    if world.rank == 1:
        checkpoint_files.FileSystemWriter.write_data = no_space  # in this process only
    try:
        save_checkpoint(folder, t, replace(STATE, step=9))
    except CheckpointError as error:
        return str(error), str(latest_checkpoint(folder)) if latest_checkpoint(folder) == good else None
    return "nothing", None


def no_space(*_: Any) -> Any:
    raise OSError(28, "No space left on device")


def all_checks(world: World, folder: Path) -> dict[str, Any]:
    uninterrupted = {
        name: save_and_go_on(world, folder / name, SPLITS[name]) for name in ("row_wise", "row_wise-adagrad")
    }
    resumed = {
        (source, target): load_and_go_on(world, folder / source, SPLITS[target])
        for source, target in [
            ("row_wise", "row_wise"),
            ("row_wise", "table_wise"),
            ("row_wise-adagrad", "column_wise-adagrad"),
        ]
    }
    told = SPLITS["row_wise"], DENSE
    return {
        "uninterrupted": uninterrupted,
        "resumed": resumed,
        "told": save_and_go_on(world, folder / "told", *told, event_columns=True),
        "told, resumed": load_and_go_on(world, folder / "told", *told, event_columns=True),
        "damaged": refusals(world, folder / "damaged"),
        "full disk": full_disk_on_second(world, folder / "full"),
    }


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("two-ranks")
    return folder, spawn(all_checks, 2, folder)


def test_two_ranks_resume_to_the_last_bit(two_ranks):
    for result in two_ranks[1]:
        assert result["resumed"]["row_wise", "row_wise"] == result["uninterrupted"]["row_wise"]


@pytest.mark.parametrize("resumed", [("row_wise", "table_wise"), ("row_wise-adagrad", "column_wise-adagrad")])
def test_two_ranks_resume_under_another_split(resumed, two_ranks):
    result = two_ranks[1][0]
    assert result["resumed"][resumed] == pytest.approx(result["uninterrupted"][resumed[0]], abs=CLOSE)


@pytest.mark.parametrize("split", ["row_wise", "row_wise-adagrad"])
def test_one_rank_resumes_what_two_saved(split, two_ranks, group_of_one):
    folder, results = two_ranks
    resumed = load_and_go_on(group_of_one, folder / split, SPLITS[split])
    assert resumed == pytest.approx(results[0]["uninterrupted"][split], abs=CLOSE)


@pytest.mark.parametrize("split", ["row_wise", "row_wise-adagrad"])
def test_whole_tables_resume_what_two_ranks_saved(split, two_ranks, alone):
    folder, results = two_ranks
    resumed = load_and_go_on(alone, folder / split, WHOLE[SPLITS[split].optimizer])
    assert resumed == pytest.approx(results[0]["uninterrupted"][split], abs=CLOSE)


def test_event_columns_are_saved_and_resumed_with_their_state(two_ranks, alone):
    folder, results = two_ranks
    for result in results:
        assert result["told, resumed"] == result["told"] != result["uninterrupted"]["row_wise"]
    whole = WHOLE[SPLITS["row_wise"].optimizer]
    resumed = load_and_go_on(alone, folder / "told", whole, event_columns=True)
    assert resumed == pytest.approx(results[0]["told"], abs=CLOSE)


def test_damage_that_one_rank_sees_is_refused_by_all(two_ranks):
    for result in two_ranks[1]:
        assert "must have" in result["damaged"]
        assert "cut short" in result["damaged"]


def test_a_full_disk_on_one_rank_leaves_the_last_good_checkpoint(two_ranks):
    for message, good in (result["full disk"] for result in two_ranks[1]):
        assert "on rank 1: OSError: [Errno 28] No space left on device" in message
        assert good is not None


@pytest.mark.parametrize("optimizer", WHOLE)
def test_one_process_resumes_to_the_last_bit(optimizer, tmp_path, alone):
    uninterrupted = save_and_go_on(alone, tmp_path, WHOLE[optimizer])
    assert load_and_go_on(alone, tmp_path, WHOLE[optimizer]) == uninterrupted


def test_muon_resumes_with_the_momentum_of_its_matrices(tmp_path, alone):
    dense = DenseOptimizerConfig(optimizer="muon", learning_rate=0.01)
    uninterrupted = save_and_go_on(alone, tmp_path, WHOLE["sgd"], dense)
    assert load_and_go_on(alone, tmp_path, WHOLE["sgd"], dense) == uninterrupted
    state = dense_state(trainable(alone, WHOLE["sgd"], dense))
    assert "dense.tower.encoder.layers.0.mixer.in_proj.weight.momentum_buffer" in state


def test_split_tables_resume_what_whole_ones_saved(tmp_path, alone, monkeypatch, request):
    uninterrupted = save_and_go_on(alone, tmp_path, WHOLE["rowwise_adagrad"])
    world = request.getfixturevalue("group_of_one")
    resumed = load_and_go_on(world, tmp_path, SPLITS["row_wise"])
    assert resumed == pytest.approx(uninterrupted, abs=CLOSE)


@pytest.fixture
def saved(tmp_path, alone) -> tuple[Path, Trainable]:
    t = trainable(alone, WHOLE["adagrad"], DENSE)
    train(t, alone, BEFORE)
    return save_checkpoint(tmp_path / "run", t, STATE), t


def test_a_checkpoint_tells_what_it_is_of(saved):
    info = read_info(saved[0])
    assert info.state == STATE
    assert (info.table_optimizer, info.dense_optimizer, info.world_size, info.plan) == ("adagrad", "adam", 1, {})
    assert info.tensors["items.embeddings.item.weight"] == ["float32", 48, 16]
    assert {"torch", "torchrec"} <= info.versions.keys()


def changed_weights(t: Trainable, attempt: Any) -> bool:
    before = {name: weight.clone() for name, weight in whole_weights(t).items()}
    attempt()
    after = whole_weights(t)
    return not all(torch.equal(before[name], after[name]) for name in before)


DAMAGE = {
    "truncated-tensors": ("__0_0.distcp", lambda f: os.truncate(f, f.stat().st_size - 1), "cut short or edited"),
    "edited-tensors": ("__0_0.distcp", lambda f: flip(f, f.stat().st_size // 2), "SHA-256 differs"),
    "missing-tensors": ("__0_0.distcp", lambda f: f.unlink(), "must hold __0_0.distcp, which is gone"),
    "truncated-metadata": (".metadata", lambda f: os.truncate(f, 100), "cut short or edited"),
    "edited-metadata": (".metadata", lambda f: flip(f, 50), "SHA-256 differs"),
    "truncated-info": ("checkpoint.json", lambda f: os.truncate(f, 300), "must be a checkpoint's, got JSONDecodeError"),
    "edited-info": ("checkpoint.json", lambda f: f.write_text(f.read_text().replace("words", "birds")), "was edited"),
    "missing-info": ("checkpoint.json", lambda f: f.unlink(), "must be a checkpoint's, got FileNotFoundError"),
}


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 0xFF
    file.write_bytes(content)


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_refused_before_any_weight_is_touched(name, saved, alone):
    path, _ = saved
    file, damage, message = DAMAGE[name]
    damage(path / file)
    fresh = trainable(alone, WHOLE["adagrad"], DENSE)

    def attempt() -> None:
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(path, fresh, vocabulary="words")

    assert not changed_weights(fresh, attempt)


def rewritten(path: Path, **changes: Any) -> None:
    """Change checkpoint.json and sign it again, as someone who means it would."""
    content = json.loads((path / "checkpoint.json").read_text())
    del content["sum"]
    checkpoint_files.write_json_with_sum(path / "checkpoint.json", content | changes)


def test_a_newer_format_is_refused(saved):
    rewritten(saved[0], format=2)
    with pytest.raises(CheckpointError, match="must have format 1, got 2; use the version"):
        read_info(saved[0])


def test_a_foreign_vocabulary_is_refused(saved):
    path, t = saved
    with pytest.raises(CheckpointError, match="item vocabulary other, got words"):
        load_checkpoint(path, t, vocabulary="other")


def test_a_foreign_model_is_refused_by_what_differs(saved, alone):
    path, _ = saved
    larger = trainable(alone, WHOLE["adagrad"], DENSE, items=46)
    with pytest.raises(
        CheckpointError, match=r"is float32 \(48, 16\) in the checkpoint and float32 \(49, 16\) in the model"
    ):
        load_checkpoint(path, larger, vocabulary="words")
    without = trainable(alone, WHOLE["adagrad"], DENSE, context=False)
    with pytest.raises(CheckpointError, match=r"the model lacks contexts.embedding_bags.segment.weight"):
        load_checkpoint(path, without, vocabulary="words")


@pytest.mark.parametrize("part", ["tables", "dense"])
def test_another_optimizer_is_refused_unless_it_may_start_anew(part, saved, alone):
    path, t = saved
    tables = WHOLE["adam"] if part == "tables" else WHOLE["adagrad"]
    dense = DenseOptimizerConfig(optimizer="sgd") if part == "dense" else DENSE
    other = trainable(alone, tables, dense)
    train(other, alone, range(1))
    with pytest.raises(CheckpointError, match=f"its {part} with .*; set the optimizer to"):
        load_checkpoint(path, other, vocabulary="words")
    load_checkpoint(path, other, vocabulary="words", reset_optimizer=True)
    expected = whole_weights(t)
    assert all(torch.equal(weight, expected[name]) for name, weight in whole_weights(other).items())
    states = dict(other.optimizer.optimizers)
    assert not any(v.any() for s in states[part].state.values() for v in s.values() if isinstance(v, torch.Tensor))
    kept = states["dense" if part == "tables" else "tables"]
    assert any(v.any() for s in kept.state.values() for v in s.values() if isinstance(v, torch.Tensor))


def test_weights_load_under_any_optimizer(saved, alone):
    path, t = saved
    other = trainable(alone, WHOLE["sgd"], DENSE)
    load_weights(path, other, vocabulary="words")
    expected = whole_weights(t)
    assert all(torch.equal(weight, expected[name]) for name, weight in whole_weights(other).items())


class Harmful:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("exit 1",)


def signed_metadata(path: Path, metadata: object) -> None:
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    files = {name: checkpoint_files.digest(path / name) for name in checkpoint_files.files_of(path)}
    rewritten(path, files=files)


def test_metadata_that_would_run_code_is_refused(saved):
    path, t = saved
    signed_metadata(path, Harmful())
    with pytest.raises(CheckpointError, match=r"reference to posix\.system; do not load"):
        load_checkpoint(path, t, vocabulary="words")


class Python3_11_2(pickle.Pickler):
    """Pickles members of enumerations as attributes, as Python did before 3.11.4."""

    def reducer_override(self, member: object) -> Any:
        return (getattr, (type(member), member.name)) if isinstance(member, Enum) else NotImplemented


def test_metadata_written_by_an_older_python_loads(saved):
    path, t = saved
    metadata = checkpoint_files.read_metadata(path, checkpoint_files.files_of(path))
    with (path / ".metadata").open("wb") as file:
        Python3_11_2(file).dump(metadata)
    assert b"getattr" in (path / ".metadata").read_bytes()
    rewritten(path, files={name: checkpoint_files.digest(path / name) for name in checkpoint_files.files_of(path)})
    load_checkpoint(path, t, vocabulary="words")


class Attribute:
    def __reduce__(self) -> tuple[Any, tuple[Any, str]]:
        return getattr, (torch.Size, "__class__")


def test_metadata_that_reaches_for_any_other_attribute_is_refused(saved):
    path, t = saved
    signed_metadata(path, Attribute())
    with pytest.raises(CheckpointError, match=r"attribute __class__ of .*; do not load"):
        load_checkpoint(path, t, vocabulary="words")


@pytest.mark.parametrize("trick", ["bytes", "elsewhere"])
def test_metadata_that_leads_out_of_the_tensors_is_refused(trick, saved):
    path, t = saved
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    metadata = checkpoint_files.read_metadata(path, checkpoint_files.files_of(path))
    if trick == "bytes":
        name = next(iter(metadata.state_dict_metadata))
        metadata.state_dict_metadata[name] = BytesStorageMetadata()
    else:
        next(iter(metadata.storage_data.values())).relative_path = "../../elsewhere"
    signed_metadata(path, metadata)
    with pytest.raises(CheckpointError, match="BytesStorageMetadata" if trick == "bytes" else "elsewhere; do not load"):
        load_checkpoint(path, t, vocabulary="words")


def test_only_the_newest_and_the_best_are_kept(tmp_path, alone):
    t = trainable(alone, WHOLE["sgd"], DENSE)
    for step in range(1, 6):
        save_checkpoint(tmp_path, t, replace(STATE, step=step), keep=2, best=step == 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "step-00000002", "step-00000004", "step-00000005"]
    assert read_info(tmp_path / "best").state.step == 2
    newest = latest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.name == "step-00000005"
    load_checkpoint(tmp_path / "best", t, vocabulary="words")


def test_a_second_checkpoint_of_a_step_supersedes_the_first(tmp_path, alone):
    t = trainable(alone, WHOLE["sgd"], DENSE)
    save_checkpoint(tmp_path, t, STATE, keep=1)
    again = save_checkpoint(tmp_path, t, replace(STATE, position={"epoch": 1, "batches": 0}), keep=1, best=True)
    assert latest_checkpoint(tmp_path) == again
    assert read_info(again).state.position == {"epoch": 1, "batches": 0}
    assert len(list(tmp_path.glob("step-*"))) == 1


def test_keeping_none_is_refused(tmp_path, alone):
    t = trainable(alone, WHOLE["sgd"], DENSE)
    with pytest.raises(ConfigError, match="got keep=0"):
        save_checkpoint(tmp_path, t, STATE, keep=0)


def test_a_run_without_checkpoints_has_no_latest(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "nowhere") is None


class Killed(BaseException):
    """Ends a save where it stands, as SIGKILL would: nothing of ours catches it."""


STAGES = [
    (checkpoint_files, "write_tensors"),
    (checkpoint, "_digests"),
    (checkpoint_files, "write_json_with_sum"),
    (checkpoint, "_publish"),
    (checkpoint, "_sync_folder"),
    (checkpoint, "_drop_old"),
    (shutil, "rmtree"),
]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage[1])
def test_a_run_killed_while_saving_has_a_checkpoint_to_resume(stage, when, tmp_path, alone, monkeypatch):
    t = trainable(alone, WHOLE["sgd"], DENSE)
    save_checkpoint(tmp_path, t, replace(STATE, step=1), keep=1)
    where, name = stage
    original = getattr(where, name)

    def killed(*args: Any, **options: Any) -> None:
        if when == "after":
            original(*args, **options)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(where, name, killed)
        with pytest.raises(Killed):
            save_checkpoint(tmp_path, t, replace(STATE, step=2), keep=1)
    newest = latest_checkpoint(tmp_path)
    assert newest is not None
    assert load_checkpoint(newest, t, vocabulary="words").state.step in (1, 2)
    last = save_checkpoint(tmp_path, t, replace(STATE, step=3), keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [last.name]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, alone):
    t = trainable(alone, WHOLE["sgd"], DENSE)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"saving to .* failed on rank 0: NotADirectoryError"):
        save_checkpoint(tmp_path / "file" / "run", t, STATE)
