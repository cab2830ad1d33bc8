"""A pytest plugin: outcomes are written as tests end, and tests named in a file are left out.

pytest -p benchmarks.outcomes --outcomes tests.jsonl --leave-out passed.json
"""

import json
from pathlib import Path

import pytest

NO_FAULT = "ignore:.*does not have a deterministic implementation"
"""The tests ask PyTorch for deterministic kernels, to have fresh memory filled; that it has none for a cumulative sum
on a GPU is no fault of who asks for one. Whether our kernels are is tested by running them twice."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, help="file of one JSON object a test")
    parser.addoption("--leave-out", type=Path, help="JSON list of tests not to run")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", NO_FAULT)
    outcomes = config.getoption("--outcomes")
    if outcomes and not hasattr(config, "workerinput"):  # of many processes, the one that hears from all
        config.pluginmanager.register(_Writer(outcomes))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    leave_out = config.getoption("--leave-out")
    names = set(json.loads(leave_out.read_text())) if leave_out else set()
    config.hook.pytest_deselected(items=[item for item in items if _name(item.nodeid) in names])
    items[:] = [item for item in items if _name(item.nodeid) not in names]


def _name(nodeid: str) -> str:
    """Without the group that pytest-xdist writes behind it."""
    return nodeid.rpartition("@")[0] if nodeid.rpartition("@")[2].isidentifier() and "@" in nodeid else nodeid


class _Writer:
    """A test ends with its teardown, and failed if any of its phases did."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._outcomes: dict[str, str] = {}
        self._reasons: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = _name(report.nodeid)
        if self._outcomes.get(name) not in ("failed", "skipped"):
            self._outcomes[name] = report.outcome
        if report.outcome == "failed":
            said = [line[1:].strip() for line in report.longreprtext.splitlines() if line.startswith("E ")]
            self._reasons[name] = "; ".join(said[:3])[:400]
        if report.when == "teardown":
            row = {"test": name, "outcome": self._outcomes.pop(name)}
            if name in self._reasons:
                row["because"] = self._reasons.pop(name)
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
