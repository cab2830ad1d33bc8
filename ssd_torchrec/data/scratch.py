"""Folders beside a target, in which what replaces it grows; what a killed process left there is cleared by the next.

# DIR/                       the target
# .DIR.partial-1a2b3c4d/     locked while its process lives; a lock ends with its process, however that ends
# .DIR.old-5e6f7a8b/         the old target, on file systems that cannot swap two names at once
"""

import ctypes
import fcntl
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@contextmanager
def scratch_folder(target: Path, kind: str) -> Iterator[Path]:
    """A new empty folder beside `target`, removed at the end; the leftovers of killed processes go first.

    Args:
        kind: tells the folders of one target apart by what they are for.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(target, kind)
    folder = _beside(target, kind)
    folder.mkdir()
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # no locks on this file system: the next process finds none to take and leaves it be
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def replace_folder(target: Path, new: Path) -> None:
    """Give `new` the name of `target`, and remove what had it.

    Where names can be swapped at once (Linux, on most file systems), there is always one of the two under the name.
    Elsewhere there may be none for a moment; killed in it, the next process puts the old one back.
    """
    if not target.exists():
        new.rename(target)
    elif _swapped(target, new):
        shutil.rmtree(new, ignore_errors=True)
    else:
        old = _beside(target, "old")
        target.rename(old)
        new.rename(target)
        shutil.rmtree(old, ignore_errors=True)


def _beside(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}-{uuid4().hex[:8]}")


def _leftovers(target: Path, kind: str) -> list[Path]:
    return sorted(target.parent.glob(f".{glob.escape(target.name)}.{kind}-*"))


def _clear_leftovers(target: Path, kind: str) -> None:
    for old in _leftovers(target, "old"):
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(target)
    for folder in _leftovers(target, kind):
        with suppress(OSError):  # locked, so its process lives; or somebody else cleared it
            handle = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(handle)


def _swapped(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where that cannot be done, and nothing was."""
    exchange = getattr(ctypes.CDLL(None), "renameat2", None)
    names = os.fsencode(one), os.fsencode(other)
    return exchange is not None and exchange(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0
