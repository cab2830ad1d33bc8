"""Run a function in several processes that form a gloo group, as torchrun would start them."""

import multiprocessing
import os
import pickle
import socket
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

PRELOADED = ["tests.distributed.example", "ssd_torchrec.distributed.checkpoint"]  # with them, torch and torchrec
TIMEOUT_S = 200.0  # of a whole spawn: importing torchrec alone takes seconds on a busy machine


def spawn(
    function: Callable[..., Any], size: int, *args: Any, anew: bool = False, timeout_s: float = TIMEOUT_S
) -> list[Any]:
    """Call `function(world, *args)` in `size` processes; returns what each rank returned, in order of rank.

    Args:
        anew: an interpreter for each rank, as torchrun starts them, whose sets of words have an order of their own;
            else ranks are forked from a process that has imported torchrec and done nothing more: seconds less each.

    Raises:
        AssertionError: a rank raised (with its traceback), died, or took longer than `timeout_s`; the others are ended.
    """
    context = multiprocessing.get_context("spawn" if anew else "forkserver")
    context.set_forkserver_preload(PRELOADED)
    port = free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(size)]
    processes = [
        context.Process(target=_child, args=(pipes[rank][1], function, rank, size, port, args), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for _, sender in pipes:
        sender.close()
    try:
        return _collect([receiver for receiver, _ in pipes], timeout_s)
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


def _collect(receivers: list[Connection], timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    ends = time.monotonic() + timeout_s
    while len(results) < len(receivers):
        waiting = [r for rank, r in enumerate(receivers) if rank not in results]
        ready = wait(waiting, timeout=max(ends - time.monotonic(), 0))
        assert ready, f"no word from {len(waiting)} of {len(receivers)} ranks within {timeout_s} s"
        for receiver in ready:
            rank = receivers.index(receiver)  # type: ignore[arg-type]
            try:
                results[rank], error = pickle.loads(receiver.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                error = "died without a word"
            assert error is None, f"rank {rank}: {error}"
    return [results[rank] for rank in range(len(receivers))]


def _child(sender: Connection, function: Callable[..., Any], rank: int, size: int, port: int, args: tuple) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch

    warnings.filterwarnings("error", module="ssd_torchrec")  # as pytest is told to in pyproject.toml
    from ssd_torchrec.distributed.process import launched, process_group

    torch.set_num_threads(1)
    world = launched(os.environ, "cpu")
    try:
        with process_group(world, timeout_s=60):
            result = function(world, *args)
        sender.send_bytes(pickle.dumps((result, None)))  # plain pickle: tensors as bytes, no shared memory
    except BaseException:
        sender.send_bytes(pickle.dumps((None, traceback.format_exc())))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
