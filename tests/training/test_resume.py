"""A run that was stopped and one that was killed, each resumed, end in the figures of the run that was neither.

One run of the command line is compared with another, from outside: the second is sent SIGTERM, resumed, killed with
SIGKILL at a random step, and resumed again. Its checkpoint is then evaluated by one process, whoever trained it.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ssd_torchrec.data.generate import generate
from ssd_torchrec.data.synthetic import SyntheticConfig
from tests.training.jobs import finish, logged, result, start

STEPS_AN_EPOCH = 5
EPOCHS = 6  # long enough that a signal sent in the first half finds the run still going
OPTIONS = f"""--encoder.width 16 --encoder.head-width 8 --encoder.state 8 --data.tokens-per-batch 1024
    --training.epochs {EPOCHS} --training.checkpoint-every 2 --training.log-every 1""".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "generated"
    generate(SyntheticConfig(num_users=200), folder)
    return folder


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        log = folder / "metrics.jsonl"
        if log.exists() and f'"step": {step},' in log.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step}; exit status {process.poll()}")


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL for the launcher and for its workers, which it puts into sessions of their own."""
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, *map(int, workers)):
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_stopped_and_killed_run_ends_as_one_that_was_not(processes, data, tmp_path):
    unharmed, harmed = tmp_path / "unharmed", tmp_path / "harmed"
    finish(start(processes, data, tmp_path, "unharmed", OPTIONS))

    stopped = start(processes, data, tmp_path, "harmed", OPTIONS)
    wait_for_step(harmed, 1, stopped)
    stopped.send_signal(signal.SIGTERM)
    stopped.communicate(timeout=120)
    saved = sorted(path.name for path in (harmed / "checkpoints").glob("step-*"))
    assert saved, "SIGTERM must leave a checkpoint"
    assert not (harmed / "result.json").exists()

    killed = start(processes, data, tmp_path, "harmed", OPTIONS)
    wait_for_step(harmed, random.randint(STEPS_AN_EPOCH + 1, EPOCHS * STEPS_AN_EPOCH // 2), killed)
    kill(killed)
    assert not (harmed / "result.json").exists()

    assert "going on from" in finish(start(processes, data, tmp_path, "harmed", OPTIONS))
    for figures in ("valid", "test", "best_epoch", "most_popular"):
        assert result(harmed)[figures] == result(unharmed)[figures]
    assert logged(harmed) == logged(unharmed)

    alone = subprocess.run(
        [sys.executable, "-m", "ssd_torchrec", "evaluate", str(harmed)], capture_output=True, text=True, timeout=120
    )
    assert alone.returncode == 0, alone.stderr[-3000:]
    for metric in ("hr@10", "ndcg@20", "mrr@50"):
        assert f"{result(harmed)['test'][metric]:.4f}" in alone.stdout


@pytest.mark.slow
def test_a_lost_worker_costs_a_restart_from_the_last_checkpoint(data, tmp_path):
    finish(start(2, data, tmp_path, "unharmed", OPTIONS))
    job = start(2, data, tmp_path, "harmed", OPTIONS, restarts=1)
    wait_for_step(tmp_path / "harmed", STEPS_AN_EPOCH + 1, job)
    worker = int(Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()[-1])
    os.kill(worker, signal.SIGKILL)
    assert "going on from" in finish(job)
    for figures in ("valid", "test", "best_epoch"):
        assert result(tmp_path / "harmed")[figures] == result(tmp_path / "unharmed")[figures]


@pytest.mark.slow
@pytest.mark.parametrize("worlds", [(2, 1), (1, 2)], ids=["2-to-1", "1-to-2"])
def test_a_run_resumed_at_another_world_size_goes_on_with_the_same_batches(worlds, data, tmp_path):
    alike = {"--encoder.dropout": "0", "--encoder.time-dropout": "0", "--sharding.optimizer": "adagrad"}
    options = [*OPTIONS, *(word for option in alike.items() for word in option)]
    finish(start(1, data, tmp_path, "unharmed", options))
    stopped = start(worlds[0], data, tmp_path, "harmed", options)
    wait_for_step(tmp_path / "harmed", STEPS_AN_EPOCH + 2, stopped)  # in the middle of an epoch
    stopped.send_signal(signal.SIGTERM)
    stopped.communicate(timeout=120)
    assert not (tmp_path / "harmed" / "result.json").exists()
    assert "going on from" in finish(start(worlds[1], data, tmp_path, "harmed", options))
    assert result(tmp_path / "harmed")["world_size"] == worlds[1]
    one, other = (
        [(line["step"], line["epoch"], line["loss_nats"]) for line in logged(tmp_path / name) if line["kind"] == "step"]
        for name in ("unharmed", "harmed")
    )
    assert [line[:2] for line in one] == [line[:2] for line in other]
    assert [line[2] for line in one] == pytest.approx([line[2] for line in other], abs=1e-5)
