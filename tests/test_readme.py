"""What the README shows must run."""

import re
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_python_in_the_readme_runs_and_does_what_it_says():
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    shown: dict = {}
    exec(block, shown)
    assert shown["encoded"].shape == (5, 64)
    assert torch.allclose(shown["encoded"], shown["before"], atol=1e-6)
    assert shown["after"].shape == (2, 64)
    assert shown["state"].num_events.tolist() == [4, 1, 2]


def test_every_folder_of_the_readme_tree_is_there():
    tree = README.split("## The tree")[1].split("##")[0]
    named = re.findall(r"[\w/]+(?:/|\.py|\.md)(?=\s)", tree)
    assert len(named) > 10
    for name in named:
        assert (ROOT / name).exists() or (ROOT / "ssd_torchrec" / name).exists(), name
