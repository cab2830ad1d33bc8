import math
import re
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ssd_torchrec.distributed.process import (
    World,
    agree_finite,
    all_or_none,
    from_all_ranks,
    launched,
    process_group,
    ranks_where,
)
from ssd_torchrec.errors import CheckpointError, ConfigError, DataError, DivergedError, LostRankError
from tests.distributed.world import free_port, spawn

SECOND_OF_TWO = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def test_a_process_that_torchrun_did_not_start_is_alone():
    assert launched({}, "cpu") == World()


def test_torchrun_tells_the_place():
    world = launched(SECOND_OF_TWO, "cpu")
    assert (world.rank, world.size, world.local_rank, world.local_size) == (1, 2, 1, 2)
    assert world.meeting_point == "127.0.0.1:29500"


def test_half_a_launch_is_refused():
    environment = {name: value for name, value in SECOND_OF_TWO.items() if name != "LOCAL_RANK"}
    with pytest.raises(ConfigError, match="LOCAL_RANK not; start with torchrun"):
        launched(environment, "cpu")


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="got 2 processes and 1 GPUs"):
        launched(SECOND_OF_TWO, "cuda")


def test_without_torchrun_there_is_no_group(alone):
    with process_group(alone):
        assert not dist.is_initialized()


def test_the_group_ends_with_the_block(group_of_one):
    assert dist.get_world_size() == 1
    assert from_all_ranks("word") == ["word"]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_one_process_refuses_a_loss_that_is_not_finite(loss):
    agree_finite(torch.tensor(1.0))
    with pytest.raises(DivergedError, match="not on rank 0"):
        agree_finite(torch.tensor(loss))


def test_alone_an_error_is_wrapped_once():
    failure = pytest.raises(CheckpointError, match="saving failed on rank 0: OSError: disk full")
    with failure, all_or_none("saving", CheckpointError):
        raise OSError("disk full")


def agreements(world: World) -> dict[str, Any]:
    return {
        "ranks": ranks_where(world.rank == 1),
        "words": from_all_ranks(f"from {world.rank}"),
        "finite": raised(lambda: agree_finite(torch.tensor(1.0))),
        "second is nan": raised(lambda: agree_finite(torch.tensor(math.nan if world.rank else 1.0))),
        "second fails": raised(lambda: fail_on_second(world, OSError("disk full"))),
        "second refuses": raised(lambda: fail_on_second(world, CheckpointError("cut short"))),
    }


def fail_on_second(world: World, error: Exception) -> None:
    with all_or_none("saving", CheckpointError):
        if world.rank == 1:
            raise error


def raised(action: Any) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.fixture(scope="module")
def by_rank() -> list[dict[str, Any]]:
    return spawn(agreements, 2)


def test_all_ranks_know_which_ranks_say_yes(by_rank):
    assert [r["ranks"] for r in by_rank] == [[1], [1]]
    assert [r["words"] for r in by_rank] == [["from 0", "from 1"]] * 2


def test_one_ranks_nan_stops_all_ranks(by_rank):
    assert [r["finite"] for r in by_rank] == ["nothing", "nothing"]
    for result in by_rank:
        assert result["second is nan"].startswith(
            "DivergedError: the loss must be finite on every rank, it is not on rank 1"
        )


def test_one_ranks_failure_is_raised_on_all_ranks(by_rank):
    for result in by_rank:
        assert result["second fails"] == "CheckpointError: saving failed on rank 1: OSError: disk full"
    assert [r["second refuses"] for r in by_rank] == [
        "CheckpointError: saving failed on rank 1: cut short",
        "CheckpointError: cut short",
    ]


def refuses(world: World) -> None:
    raise DataError(f"not on rank {world.rank}")


def test_the_spawned_world_reports_a_childs_error():
    with pytest.raises(AssertionError, match="DataError: not on rank 0"):
        spawn(refuses, 1)


def waits_for_a_silent_rank(world: World, port: int) -> str:
    """Rank 1 neither joins the collective nor answers; what the others are told of it."""
    dist.destroy_process_group()  # of the spawned world, whose ranks wait longer
    try:
        with process_group(replace(world, meeting_point=f"127.0.0.1:{port}"), timeout_s=3, answer_s=3):
            if world.rank == 1:
                time.sleep(10)
            else:
                dist.all_reduce(torch.ones(1))
    except LostRankError as error:
        return str(error)
    finally:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # for the spawned world to end
    return "nothing"


@pytest.mark.slow
def test_a_rank_that_hangs_is_named():
    told, of_the_silent, _ = spawn(waits_for_a_silent_rank, 3, free_port())
    assert of_the_silent == "nothing"
    assert told.startswith("every rank must answer within 3 s")
    assert re.search(r"\b[Rr]anks? 1\b", told)
