"""What `make train` promises, measured: minutes, so only in `make test-slow`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torchx.runner", reason="torchx is an extra")
ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_default_job_needs_time_and_learns_it(tmp_path):
    command = [sys.executable, "-m", "torchx.cli.main", "run"]
    command += ["torchx_components/train.py:tim4rec", "--output", str(tmp_path), "--name", "default"]
    subprocess.run([*command, "--", "--also-without-time"], cwd=ROOT, check=True, timeout=1100)
    result = json.loads((tmp_path / "default" / "result.json").read_text())
    assert result["world_size"] == 2
    assert result["sharding"]["item"].startswith("row_wise fused on rank 0, 1")
    assert result["table_optimizer"] == "rowwise_adagrad"
    for stage in ("valid", "test"):
        best = result["attainable"][stage]["ndcg@10"]
        assert result[stage]["ndcg@10"] >= 0.8 * best
        assert result["without_time"][stage]["ndcg@10"] <= 0.6 * best
        assert result[stage]["ndcg@10"] > 5 * result["most_popular"][stage]["ndcg@10"]
