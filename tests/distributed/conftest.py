"""A process group of one, in the test's own process; and what makes a file's worlds once."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ssd_torchrec.distributed.process import World, process_group
from tests.distributed.world import free_port


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file goes to one worker of pytest-xdist, so that the worlds its tests look at are not started in each."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture
def alone() -> World:
    """A process without a group, as without torchrun."""
    return World()


@pytest.fixture
def group_of_one(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """One process with a group, as torchrun --nproc-per-node 1 makes it."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    world = World(meeting_point=f"127.0.0.1:{free_port()}")
    with process_group(world, timeout_s=60):
        yield world
