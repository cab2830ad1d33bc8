"""The examples run, and differ by what they say they differ."""

import difflib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ssd_torchrec.data.ranking.clicks import ClicksConfig, generate_clicks

EXAMPLES = Path(__file__).parents[1] / "examples"
PUBLIC_ARGUMENTS = {  # of the public training script of DLRM
    "epochs",
    "batch_size",
    "limit_train_batches",
    "embedding_dim",
    "dense_arch_layer_sizes",
    "over_arch_layer_sizes",
    "interaction_type",
    "dcn_num_layers",
    "dcn_low_rank_dim",
    "learning_rate",
    "seed",
}


def code_of(name: str) -> list[str]:
    """Lines of an example behind its docstring."""
    return (EXAMPLES / name).read_text().split('"""', 2)[2].splitlines()


def test_histories_take_under_25_lines_of_a_dlrm_script():
    plain, plugged = code_of("dlrm_plain.py"), code_of("dlrm_with_history.py")
    changes = [line for line in difflib.ndiff(plain, plugged) if line[0] in "+-"]
    assert 0 < len(changes) < 25
    removed = [line for line in changes if line[0] == "-"]
    assert len(removed) == 1  # an import that grows
    assert "from torchrec import" in removed[0]


def test_arguments_have_the_names_of_the_public_script():
    text = (EXAMPLES / "dlrm_plain.py").read_text()
    assert {name for name in PUBLIC_ARGUMENTS if f'"--{name}"' in text} == PUBLIC_ARGUMENTS


@pytest.mark.slow
@pytest.mark.parametrize("interaction", ["original", "dcn"])
@pytest.mark.parametrize("example", ["dlrm_plain.py", "dlrm_with_history.py"])
def test_an_example_trains_on_two_processes(example, interaction, tmp_path):
    generate_clicks(ClicksConfig(num_rows=2000, longest=10), tmp_path / "clicks")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    options = [
        "--epochs",
        "1",
        "--batch_size",
        "64",
        "--interaction_type",
        interaction,
        "--data",
        str(tmp_path / "clicks"),
    ]
    run = subprocess.run(
        [*launcher, str(EXAMPLES / example), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "test AUC 0." in run.stdout
