"""What the README and the documents show must run, and say what they say."""

import re
from pathlib import Path

import pytest
import torch

from ssd_torchrec.__main__ import main

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


PLANS = re.findall(r"\| `(--(?:items|preset) .*?)` \| (.*?) \|", (ROOT / "docs" / "scale.md").read_text())


@pytest.mark.parametrize(("options", "verdict"), PLANS, ids=[options.replace("--", "") for options, _ in PLANS])
def test_the_planner_still_says_what_docs_scale_shows(options, verdict, capsys):
    assert main(["plan", *options.split()]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == verdict


def test_docs_scale_shows_plans():
    assert len(PLANS) >= 9
