"""The database in which logs are worked on, out of core: its limits, its end whatever happens, and how far it is."""

import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import duckdb
import pyarrow as pa

from ssd_torchrec.data.prepare.core import Counts
from ssd_torchrec.errors import ConfigError, DataError

LOG = "log"  # the step that comes first


@dataclass(frozen=True, kw_only=True)
class DatabaseConfig:
    """What duckdb may take."""

    memory_limit: str = "1GiB"
    """What duckdb may take before it spills to disk; the process needs some 0.5 GiB beside it."""

    threads: int = 0
    """Threads of duckdb; 0: one a core."""

    temporary: str = ""
    """Folder for what duckdb has no memory for, up to some times the log; empty: beside the output."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9]+(\.[0-9]+)?(MiB|GiB|TiB|MB|GB|TB)", self.memory_limit):
            raise ConfigError(f"memory_limit must be a number and its unit, got {self.memory_limit!r}; write 2GiB")
        if self.threads < 0:
            raise ConfigError(f"threads must be at least 0, got {self.threads}; leave it at its default")

    def beside(self, output: Path) -> Path:
        """What scratch folders are made beside."""
        return Path(self.temporary).absolute() / output.name if self.temporary else output


@dataclass(frozen=True)
class Step:
    """What prepare has come to."""

    name: str
    counts: Counts
    elapsed_s: float  # since the step before


def database(folder: Path, config: DatabaseConfig) -> duckdb.DuckDBPyConnection:
    """A database in a folder, which also takes what there is no memory for."""
    settings: dict[str, Any] = {"memory_limit": config.memory_limit, "temp_directory": str(folder / "spill")}
    if config.threads:
        settings["threads"] = config.threads
    connection = duckdb.connect(str(folder / "log.duckdb"), config=settings)
    connection.execute("SET enable_progress_bar = false")
    return connection


class Clock:
    """Tells of each step how long it took."""

    def __init__(self, on_step: Callable[[Step], None]) -> None:
        self._on_step, self._last = on_step, time.monotonic()

    def lap(self, name: str, counts: Counts) -> None:
        """Tell of a step that ends now."""
        before, self._last = self._last, time.monotonic()
        self._on_step(Step(name, counts, self._last - before))


@contextmanager
def explained(output: Path, temporary: Path, config: DatabaseConfig) -> Iterator[None]:
    """Errors of the disk and of the database in our words."""
    try:
        yield
    except duckdb.OutOfMemoryException as error:
        raise ConfigError(
            f"memory_limit must suffice for this log, {config.memory_limit} did not: {_first_line(error)}; raise it, "
            f"lower --threads, or free space in {temporary}"
        ) from error
    except duckdb.InterruptException:
        raise
    except (OSError, pa.ArrowException, duckdb.Error) as error:
        raise DataError(
            f"{output} and {temporary} must take what prepare writes, but {_first_line(error)}; free space there, or "
            "give another --output or --temporary"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


@contextmanager
def sigterm_unwinds() -> Iterator[None]:
    """Let SIGTERM clean up before it ends the process, with the status of a process it ended."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    terminated = False

    def unwind(_signal: int, _frame: FrameType | None) -> None:
        nonlocal terminated
        terminated = True
        sys.exit(128 + signal.SIGTERM)

    previous = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    except (RuntimeError, duckdb.InterruptException) as error:
        # how duckdb passes on what a signal handler raised
        if isinstance(error, RuntimeError) and str(error) != "Query interrupted":
            raise
        if terminated:
            sys.exit(128 + signal.SIGTERM)
        raise KeyboardInterrupt from error
    finally:
        signal.signal(signal.SIGTERM, previous)
