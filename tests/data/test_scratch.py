import ctypes
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from ssd_torchrec.data import scratch
from ssd_torchrec.data.scratch import replace_folder, scratch_folder

HOLDS_ONE = """
import sys, time
from pathlib import Path
from ssd_torchrec.data.scratch import scratch_folder
with scratch_folder(Path(sys.argv[1]), "partial") as folder:
    print(folder.name, flush=True)
    time.sleep(60)
"""


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture
def neighbour(tmp_path):
    """Another process that holds a scratch folder of `tmp_path / "set"`."""
    command = [sys.executable, "-c", HOLDS_ONE, str(tmp_path / "set")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield process, process.stdout.readline().strip()
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_scratch_folder_is_empty_and_goes_at_the_end_and_at_an_error(tmp_path):
    with suppress(KeyboardInterrupt), scratch_folder(tmp_path / "deep" / "set", "partial") as folder:
        assert folder.parent == tmp_path / "deep"
        (folder / "file").write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path / "deep") == []


def test_leftovers_of_a_killed_process_are_cleared_and_those_of_a_living_one_are_not(tmp_path, neighbour):
    process, theirs = neighbour
    with scratch_folder(tmp_path / "set", "partial") as ours:
        assert names(tmp_path) == sorted([theirs, ours.name])
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert names(tmp_path) == [theirs]
    with scratch_folder(tmp_path / "set", "spill"):
        assert theirs in names(tmp_path)  # of another kind
    with scratch_folder(tmp_path / "set*", "partial"):
        assert theirs in names(tmp_path)  # of another target
    with scratch_folder(tmp_path / "set", "partial"):
        assert theirs not in names(tmp_path)


@pytest.mark.parametrize("swaps", [True, False])
@pytest.mark.parametrize("there_was_one", [True, False])
def test_the_new_folder_takes_the_name(tmp_path, monkeypatch, swaps, there_was_one):
    if not swaps:
        monkeypatch.setattr(scratch, "_swapped", lambda one, other: False)
    target, new = tmp_path / "set", tmp_path / "new"
    for folder in (target, new) if there_was_one else (new,):
        folder.mkdir()
        (folder / "file").write_text(folder.name)
    replace_folder(target, new)
    assert names(tmp_path) == ["set"]
    assert (target / "file").read_text() == "new"


def test_names_are_swapped_at_once_where_the_system_can(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not hasattr(ctypes.CDLL(None), "renameat2"):
        pytest.skip("the C library has no renameat2")
    assert scratch._swapped(tmp_path / "one", tmp_path / "other")
    assert (names(tmp_path / "one"), names(tmp_path / "other")) == (["other"], ["one"])
    assert not scratch._swapped(tmp_path / "one", tmp_path / "nowhere")


def test_there_is_no_moment_without_a_target_where_names_can_be_swapped(tmp_path, monkeypatch):
    test_names_are_swapped_at_once_where_the_system_can(tmp_path)  # or skip
    monkeypatch.setattr(Path, "rename", None)
    replace_folder(tmp_path / "one", tmp_path / "other")
    assert names(tmp_path) == ["one"]


def test_an_old_target_that_was_put_aside_comes_back(tmp_path):
    (tmp_path / ".set.old-12345678").mkdir()
    with scratch_folder(tmp_path / "set", "partial"):
        assert (tmp_path / "set").is_dir()
    os.mkdir(tmp_path / ".set.old-12345678")
    with scratch_folder(tmp_path / "set", "partial"):
        pass
    assert names(tmp_path) == ["set"]
