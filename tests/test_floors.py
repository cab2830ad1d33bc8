"""Imports go down only, so that a file can be read with just the floors below it in mind."""

import ast
from pathlib import Path

import ssd_torchrec

ROOT = Path(ssd_torchrec.__file__).parent
FLOORS = [
    ["errors"],
    ["jagged"],
    ["ops"],
    ["modules"],
    ["encoders"],
    ["data"],
    ["models"],
    ["distributed"],
    ["training", "serving", "doctor"],
    ["commands"],
    ["__main__", "__init__"],
]
FLOOR = {part: level for level, parts in enumerate(FLOORS) for part in parts}


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def test_imports_only_go_down():
    for file in ROOT.rglob("*.py"):
        here = file.relative_to(ROOT).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(file.read_text())):
            for name in imported(node):
                if name.startswith("ssd_torchrec."):
                    there = name.split(".")[1]
                    below = there == here or FLOOR[there] < FLOOR[here]
                    assert below, f"{file}:{node.lineno} imports {there}, which is not below {here}"


def test_only_their_floors_know_torchrec_and_process_groups():
    """ops, modules and encoders see tensors and layouts; process groups appear in distributed and training."""
    barred = {
        "torchrec": ["ops", "modules", "encoders"],
        "torch.distributed": ["ops", "modules", "encoders", "models", "data"],
    }
    for file in ROOT.rglob("*.py"):
        here = file.relative_to(ROOT).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(file.read_text())):
            for name in imported(node):
                for library, floors in barred.items():
                    reaches = name == library or name.startswith(library + ".")
                    assert not (reaches and here in floors), f"{file}:{node.lineno}: {here} may not import {library}"
