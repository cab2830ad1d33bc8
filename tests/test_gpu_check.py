"""The parts of `make gpu-check` and of its benchmark that need no GPU to be seen working."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.ops_on_gpu.contenders import Batch
from benchmarks.ops_on_gpu.peers import Packed, Padded
from benchmarks.ops_on_gpu.rows import Rows
from benchmarks.ops_on_gpu.tuning import worth_a_try
from ssd_torchrec.jagged import JaggedLayout

ROOT = Path(__file__).parents[1]


def test_rows_are_there_after_a_cut_in_the_middle_of_a_line(tmp_path):
    rows = Rows(tmp_path / "rows.jsonl")
    rows.add("a", {"ms": 1.0})
    with rows.path.open("a") as file:
        file.write('{"key": "b", "m')
    again = Rows(rows.path)
    assert "a" in again
    assert "b" not in again
    again.add("b", {"ms": 2.0})
    assert [row["ms"] for row in Rows(rows.path)] == [1.0, 2.0]


@pytest.mark.parametrize("layout", [Packed, Padded], ids=["packed", "padded"])
def test_events_come_back_from_the_layouts_of_peers(layout):
    lengths = [3, 5, 1, 4, 2, 6, 1, 2]
    batch = Batch(lengths, JaggedLayout.from_lengths(lengths))
    laid = layout(batch)
    events = torch.randn(sum(lengths), 2, 3)
    there, back = (laid.pack, laid.unpack) if layout is Packed else (laid.pad, laid.events)
    assert there(events).shape == (*laid.shape, 2, 3)
    assert torch.equal(back(there(events)), events)


def test_packed_rows_are_whole_and_told_apart():
    lengths = [3, 5, 1, 4, 2, 6, 1, 2]
    batch = Batch(lengths, JaggedLayout.from_lengths(lengths))
    packed = Packed(batch)
    assert packed.shape == (2, 12)
    ids = packed.seq_idx.flatten()[packed.slot]
    assert torch.equal(ids, batch.layout.row_of_event.int())
    steps = packed.slot.diff()[batch.layout.row_of_event.diff() == 0]
    assert bool((steps == 1).all())


def test_tiles_that_a_smaller_one_covers_are_not_tried():
    configs = [
        SimpleNamespace(kwargs={"BLOCK_SIZE_M": m, "BLOCK_SIZE_N": n}) for m, n in [(128, 256), (64, 64), (64, 32)]
    ]
    sizes = {"hdim": 32, "dstate": 32, "chunk_size": 256}
    kept = worth_a_try(configs, "_chunk_state_fwd_kernel", sizes)
    assert [config.kwargs["BLOCK_SIZE_N"] for config in kept] == [32]
    assert worth_a_try(configs, "_chunk_scan_fwd_kernel", sizes) == [configs[0], configs[2]]
    assert worth_a_try(configs, "a_kernel_of_ours", sizes) == configs


TESTS = """
def test_sound(): pass
def test_broken(): assert {holds}
"""


@pytest.mark.slow
def test_tests_that_passed_are_not_run_again(tmp_path):
    file = tmp_path / "test_few.py"
    file.write_text(TESTS.format(holds=False))
    assert gpu_check.run_tests("few", [str(file)], tmp_path, budget_s=60) == 1
    outcomes = [json.loads(line)["outcome"] for line in (tmp_path / "few.jsonl").read_text().splitlines()]
    assert sorted(outcomes) == ["failed", "passed"]  # in any order: more than one process may run them
    file.write_text(TESTS.format(holds=True))
    assert gpu_check.run_tests("few", [str(file)], tmp_path, budget_s=60) == 0
    assert "\n1 passed in " in (tmp_path / "few.log").read_text()  # not both


def test_a_command_ends_at_its_budget_and_its_words_are_kept(tmp_path):
    command = [sys.executable, "-c", "import time; print('seen', flush=True); time.sleep(60)"]
    assert gpu_check.run(command, tmp_path / "log", budget_s=3) is None
    assert (tmp_path / "log").read_text().startswith("seen")
    assert gpu_check.run([sys.executable, "-c", "exit(7)"], tmp_path / "log", budget_s=60) == 7


def test_the_benchmark_can_be_rehearsed_without_a_gpu(tmp_path):
    command = [sys.executable, "-m", "benchmarks.ops", "--rehearse", "--part", "gated_norm", "--output", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    ours = [r for r in Rows(tmp_path / "ops-rehearsal.jsonl") if r.get("contender") == "ours" and "rows" in r]
    assert ours
    assert all(row["both_ways"]["device_ms"] > 0 for row in ours)
    assert "## gated_norm, causal, forward and backward" in (tmp_path / "ops-rehearsal.md").read_text()


def test_make_hands_part_and_folder_on():
    variables = ["PYTHON=/opt/python", "PART=ops", "OUTPUT=/out", "BUDGET_S=60"]
    plan = subprocess.run(
        ["make", "--dry-run", *variables, "gpu-check"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    assert "/opt/python -m benchmarks.gpu_check" in plan
    assert "--part ops --output /out --budget-s 60" in plan
