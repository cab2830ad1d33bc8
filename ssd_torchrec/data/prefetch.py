"""Work ahead in a thread: the same values in the same order, a few of them early."""

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")
_END = object()
_PATIENCE_S = 0.1  # between looks at whether anyone still wants more


def prefetched(values: Iterator[T], ahead: int = 2) -> Iterator[T]:
    """Draw from `values` in a thread, at most `ahead` + 1 values before they are asked for.

    The thread begins with the first value asked for. An exception of `values` is raised where its value would have
    come. Closing or dropping the iterator ends the thread.
    """
    drawn: queue.Queue = queue.Queue(maxsize=ahead)
    unwanted = threading.Event()

    def put(kind: object, value: object) -> None:
        while not unwanted.is_set():
            try:
                return drawn.put((kind, value), timeout=_PATIENCE_S)
            except queue.Full:
                continue

    def draw() -> None:
        try:
            for value in values:
                put(None, value)
                if unwanted.is_set():
                    return
            put(_END, None)
        except BaseException as error:  # whatever it is, it belongs to the consumer
            put(_END, error)

    thread = threading.Thread(target=draw, name="prefetch", daemon=True)
    thread.start()
    try:
        while (item := drawn.get())[0] is not _END:
            yield item[1]
        if item[1] is not None:
            raise item[1]
    finally:
        unwanted.set()
        thread.join()
