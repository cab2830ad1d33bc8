"""Every system learns through its component: what TorchX would run, run here."""

import json
import shlex
from pathlib import Path

import pytest

from ssd_torchrec.__main__ import main
from ssd_torchrec.data.generate import generate
from ssd_torchrec.data.synthetic import SyntheticConfig
from ssd_torchrec.encoders.registry import SYSTEMS

runner = pytest.importorskip("torchx.runner", reason="torchx is an extra")
TRAIN = Path(__file__).parents[2] / "torchx_components" / "train.py"
QUICK = ["--training.epochs", "3", "--training.warmup-steps", "10", "--data.tokens-per-batch", "512"]
QUICK += ["--sharding.learning-rate", "0.02"]  # 50 steps: at the default the tables hardly move


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "generated"
    generate(SyntheticConfig(num_users=400, num_classes=3, group_size=5, longest=30), folder)
    return folder


def words_of(component: str, *flags: str) -> list[str]:
    """What the component has our command line do."""
    with runner.get_runner() as torchx:
        app = torchx.dryrun_component(f"{TRAIN}:{component}", list(flags), "local_cwd", cfg={})._app
    words = shlex.split(app.roles[0].args[1])
    return words[words.index("ssd_torchrec") + 1 :]


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_learns_more_than_what_is_popular(system, data, tmp_path):
    flags = ["-j", "1x1", "--data", str(data), "--output", str(tmp_path), "--name", "run"]
    assert main(words_of(system, *flags, "--", *QUICK)) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["model"] == system
    for stage in ("valid", "test"):
        assert result[stage]["ndcg@10"] > 1.5 * result["most_popular"][stage]["ndcg@10"]
