"""Whatever ends a prepare, and whenever: under the name lies the old data set or the new one, whole."""

import shutil
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest

from ssd_torchrec.data.parquet import open_dataset
from ssd_torchrec.data.prepare.log import LogConfig
from ssd_torchrec.data.prepare.run import PrepareConfig, prepare
from tests.data.prepare.events import random_events

CONFIG = PrepareConfig(log=LogConfig(user="user_id", item="item", timestamp="timestamp"), k_core=2)
PREPARES = """
import os, signal, sys, threading
from ssd_torchrec.data import writer
from ssd_torchrec.data.prepare import run
from tests.data.prepare.test_kill import CONFIG

def end(here):
    if here == point:
        os.kill(os.getpid(), getattr(signal, name))

def at_a_step(step):
    end(step.name)

def replace_folder(target, new):
    end("before the swap")
    swap(target, new)
    end("after the swap")

def code_events(connection, *args, **options):
    if point == "within a query":
        threading.Timer(0.1, end, [point]).start()
        connection.execute("SELECT sum(sqrt(range)) FROM range(400_000_000)")  # seconds
    code(connection, *args, **options)

log, output, point, name = sys.argv[1:]
code, run.code_events = run.code_events, code_events
swap, writer.replace_folder = writer.replace_folder, replace_folder
print("begins", flush=True)
run.prepare(log, output, CONFIG, on_step=at_a_step)
print("ends", flush=True)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of two logs and a data set of the old one, and what both give."""
    folder, prints = tmp_path_factory.mktemp("made"), []
    for name, seed in (("new", 0), ("old", 1)):
        events = random_events(seed, 60_000, num_users=500, num_items=900, seconds=10**6)
        pq.write_table(events.drop_columns("position"), folder / f"{name}.parquet")
        prints.append(prepare(folder / f"{name}.parquet", folder / "set", CONFIG).fingerprint)
    return folder, prints


@pytest.fixture
def logs(tmp_path, made):
    """The same in `tmp_path`: fingerprints of the new and of the old."""
    folder, prints = made
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return prints


def begun(folder, point="never", name="SIGKILL"):
    """Prepare of the new log over the data set of the old, in a process that has begun."""
    words = [str(folder / "new.parquet"), str(folder / "set"), point, name]
    process = subprocess.Popen([sys.executable, "-c", PREPARES, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"begins\n", process.communicate()
    return process


def leftovers(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_killed_at_any_time_there_is_the_old_or_the_new(tmp_path, logs):
    process = begun(tmp_path)
    start = time.monotonic()
    process.communicate()
    whole_s = time.monotonic() - start
    prepare(tmp_path / "old.parquet", tmp_path / "set", CONFIG)
    for share in (0.02, 0.4, 0.75, 0.9):
        process = begun(tmp_path)
        time.sleep(share * whole_s)
        process.kill()
        process.communicate()
        assert open_dataset(tmp_path / "set").fingerprint in logs, share
    prepare(tmp_path / "old.parquet", tmp_path / "set", CONFIG)
    assert leftovers(tmp_path) == []


POINTS = {"within a query": "old", "log": "old", "before the swap": "old", "after the swap": "new", "data set": "new"}
ENDED = [("SIGKILL", point) for point in POINTS] + [("SIGTERM", "log"), ("SIGINT", "before the swap")]
ENDED += [("SIGTERM", "within a query"), ("SIGINT", "within a query")]


@pytest.mark.parametrize(("name", "point"), ENDED)
def test_ended_at_a_point(tmp_path, logs, name, point):
    process = begun(tmp_path, point, name)
    assert b"ends" not in process.communicate()[0]
    expected = {"SIGKILL": -signal.SIGKILL, "SIGTERM": 128 + signal.SIGTERM, "SIGINT": -signal.SIGINT}
    assert process.returncode == expected[name]
    new, old = logs
    assert open_dataset(tmp_path / "set").fingerprint == (old if POINTS[point] == "old" else new)
    if name == "SIGKILL":
        assert leftovers(tmp_path)
        prepare(tmp_path / "old.parquet", tmp_path / "set", CONFIG)
    assert leftovers(tmp_path) == []
