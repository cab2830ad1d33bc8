"""A checkpoint written in the background holds the model as it was when it was asked for, whatever came after."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ssd_torchrec.distributed import checkpoint_files
from ssd_torchrec.distributed.async_save import AsyncSaver
from ssd_torchrec.distributed.checkpoint import latest_checkpoint, load_checkpoint, read_info, save_checkpoint
from ssd_torchrec.distributed.process import World
from ssd_torchrec.distributed.unshard import unshard
from ssd_torchrec.distributed.whole_file import WholeFile
from ssd_torchrec.errors import CheckpointError, ConfigError
from tests.distributed.example import train, trainable
from tests.distributed.test_checkpoint import AFTER, BEFORE, DENSE, SPLITS, STATE, WHOLE, no_space
from tests.distributed.world import spawn


def both_ways(world: World, folder: Path) -> None:
    """In folder/KIND/at-once and folder/KIND/meanwhile checkpoints of the same step; steps go on during the second."""
    for name, sharding in SPLITS.items() if world.size > 1 else WHOLE.items():
        t = trainable(world, sharding, DENSE)
        train(t, world, BEFORE)
        save_checkpoint(folder / name / "at-once", t, STATE)
        saver = AsyncSaver()
        saver.save(folder / name / "meanwhile", t, STATE)
        train(t, world, AFTER)
        saver.wait()


def assert_the_same(folder: Path) -> None:
    paths = [latest_checkpoint(folder / way) for way in ("at-once", "meanwhile")]
    assert paths[0] is not None
    assert paths[1] is not None
    infos = [read_info(path) for path in paths]
    assert replace(infos[0], files={}) == replace(infos[1], files={})
    wholes = []
    for number, path in enumerate(paths):
        unshard(path, folder / f"{number}.safetensors")
        wholes.append(WholeFile.open(folder / f"{number}.safetensors"))
    assert wholes[0].entries == wholes[1].entries
    for name in wholes[0].entries:
        assert torch.equal(wholes[0].tensor(name), wholes[1].tensor(name)), name


@pytest.mark.parametrize("world_size", [1, 2])
def test_it_holds_what_was_there_when_it_was_asked_for(world_size, tmp_path, request):
    if world_size == 1:
        both_ways(request.getfixturevalue("alone"), tmp_path)
    else:
        spawn(both_ways, 2, tmp_path)
    for name in WHOLE if world_size == 1 else SPLITS:
        assert_the_same(tmp_path / name)


def test_steps_do_not_wait_for_the_disk_but_a_second_save_does(tmp_path, alone, monkeypatch):
    t = trainable(alone, WHOLE["sgd"], DENSE)
    may_write, original = threading.Event(), checkpoint_files.write_tensors

    def slow(*args: Any) -> None:
        assert may_write.wait(60)
        original(*args)

    monkeypatch.setattr(checkpoint_files, "write_tensors", slow)
    saver = AsyncSaver()
    saver.save(tmp_path, t, replace(STATE, step=1))
    train(t, alone, BEFORE)
    assert latest_checkpoint(tmp_path) is None
    may_write.set()
    saver.save(tmp_path, t, replace(STATE, step=2))
    first = latest_checkpoint(tmp_path)
    assert first is not None
    saver.wait()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("meet", ["wait", "save"])
def test_what_fails_is_raised_where_training_meets_it_once(meet, tmp_path, alone, monkeypatch):
    t = trainable(alone, WHOLE["sgd"], DENSE)
    good = save_checkpoint(tmp_path, t, STATE)
    saver = AsyncSaver()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files.FileSystemWriter, "write_data", no_space)
        saver.save(tmp_path, t, replace(STATE, step=9))
        with pytest.raises(CheckpointError, match=r"on rank 0: OSError: .*No space left"):
            saver.wait() if meet == "wait" else saver.save(tmp_path, t, replace(STATE, step=10))
    assert latest_checkpoint(tmp_path) == good
    saver.save(tmp_path, t, replace(STATE, step=11))
    saver.wait()
    path = latest_checkpoint(tmp_path)
    assert path is not None
    assert load_checkpoint(path, t, vocabulary="words").state.step == 11


def full_disk_on_second(world: World, folder: Path) -> str:
    t = trainable(world, SPLITS["row_wise"], DENSE)
    good = save_checkpoint(folder, t, STATE)
    if world.rank == 1:
        checkpoint_files.FileSystemWriter.write_data = no_space  # in this process only
    saver = AsyncSaver()
    saver.save(folder, t, replace(STATE, step=9))
    try:
        saver.wait()
    except CheckpointError as error:
        return str(error) if latest_checkpoint(folder) == good else "the good one is gone"
    return "nothing"


@pytest.mark.slow
def test_all_ranks_hear_of_a_full_disk_on_one(tmp_path):
    for heard in spawn(full_disk_on_second, 2, tmp_path):
        assert "on rank 1: OSError: [Errno 28] No space left on device" in heard


def test_keeping_none_is_refused_before_anything_is_copied(tmp_path, alone):
    t = trainable(alone, WHOLE["sgd"], DENSE)
    with pytest.raises(ConfigError, match=r"keep=0"):
        AsyncSaver().save(tmp_path, t, STATE, keep=0)
