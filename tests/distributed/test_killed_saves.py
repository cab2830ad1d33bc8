"""Saves that meet the end of their process, of the disk or of their rights: a checkpoint that loads is always there.

Each trial forks this process; the child saves and is killed at a random point, by a signal to itself before one of its
calls to the system or by one from outside at any time. Real kills and real errors of the kernel, nothing patched.
"""

import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ssd_torchrec.distributed.async_save import AsyncSaver
from ssd_torchrec.distributed.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from ssd_torchrec.distributed.shard import Trainable
from ssd_torchrec.errors import CheckpointError
from tests.distributed.example import train, trainable
from tests.distributed.test_checkpoint import BEFORE, DENSE, STATE, WHOLE

TRIALS = 20
NOBODY = 65534
REFUSED = 7  # exit status of a child whose save was refused with an error of ours


def save(folder: Path, t: Trainable, step: int, in_background: bool) -> None:
    state = replace(STATE, step=step)
    if in_background:
        saver = AsyncSaver()
        saver.save(folder, t, state, keep=1)
        saver.wait()
    else:
        save_checkpoint(folder, t, state, keep=1)


def forked(action: Callable[[], None]) -> int:
    """Pid of a child that does `action` and nothing else."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        action()
        status = 0
    except CheckpointError as error:
        print(error, file=sys.stderr)
        status = REFUSED
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def killed_before_call(number: int, action: Callable[[], None]) -> None:
    """Do `action`, and SIGKILL to this process before its call to the system of this number."""
    calls = 0

    def count(_event: str, _arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)  # of files, folders, renames, threads, imports; this process never gets rid of it
    action()
    Path(os.environ["CALLS"]).write_text(str(calls))


@pytest.fixture
def saved(tmp_path, alone) -> tuple[Path, Trainable]:
    """A checkpoint of step 1, of a table large enough to be met while it is written."""
    t = trainable(alone, WHOLE["adagrad"], DENSE, items=100_000)
    train(t, alone, BEFORE)
    save_checkpoint(tmp_path / "run", t, replace(STATE, step=1), keep=1)
    return tmp_path / "run", t


def assert_loads(folder: Path, t: Trainable, steps: tuple[int, ...]) -> int:
    newest = latest_checkpoint(folder)
    assert newest is not None
    step = load_checkpoint(newest, t, vocabulary="words").state.step
    assert step in steps
    return step


@pytest.mark.slow
@pytest.mark.parametrize("in_background", [False, True], ids=["at-once", "in-background"])
def test_twenty_saves_killed_at_random_points_leave_one_that_loads(in_background, saved, tmp_path, monkeypatch):
    folder, t = saved
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    began = time.monotonic()
    pid = forked(lambda: killed_before_call(0, lambda: save(folder, t, 2, in_background)))
    assert os.waitpid(pid, 0)[1] == 0
    duration_s, calls = time.monotonic() - began, int((tmp_path / "calls").read_text())
    assert calls > 50
    draw, killed, before = random.Random(0), 0, 2
    for trial in range(TRIALS):
        step = before + 1
        if trial % 2:
            number = draw.randrange(1, calls + 1)
            pid = forked(lambda n=number, s=step: killed_before_call(n, lambda: save(folder, t, s, in_background)))
        else:
            pid = forked(lambda s=step: save(folder, t, s, in_background))
            time.sleep(draw.uniform(0, duration_s))
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
        killed += os.WIFSIGNALED(status)
        before = assert_loads(folder, t, (before, step))
    assert killed > TRIALS // 2
    save(folder, t, before + 1, in_background)
    assert [path.name for path in folder.iterdir()] == [f"step-{before + 1:08d}"]


@pytest.mark.slow
def test_a_file_that_cannot_grow_gives_a_clear_error_and_leaves_the_last_checkpoint(saved, capfd):
    folder, t = saved
    largest = max(path.stat().st_size for path in (folder / "step-00000001").iterdir())
    for limit in (1, largest // 100, largest // 2, largest - 1):

        def save_limited(limit: int = limit) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
            try:
                save(folder, t, 2, False)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)  # to say what happened

        assert os.waitstatus_to_exitcode(os.waitpid(forked(save_limited), 0)[1]) == REFUSED
        assert_loads(folder, t, (1,))
        assert "File too large" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody who may not write there")
def test_a_folder_without_rights_gives_a_clear_error_and_leaves_the_last_checkpoint(saved, capfd):
    folder, t = saved
    for path in (folder, *folder.parents[:3]):
        path.chmod(0o755)

    def save_as_nobody() -> None:
        os.setuid(NOBODY)
        save(folder, t, 2, False)

    assert os.waitstatus_to_exitcode(os.waitpid(forked(save_as_nobody), 0)[1]) == REFUSED
    assert "PermissionError" in capfd.readouterr().err
    assert_loads(folder, t, (1,))
