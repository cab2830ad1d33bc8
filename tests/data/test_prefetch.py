import threading
import time

import pytest

from ssd_torchrec.data.prefetch import prefetched


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_values_come_in_order_and_end(count):
    assert list(prefetched(iter(range(count)))) == list(range(count))
    assert not prefetch_threads()


def test_nothing_is_drawn_before_the_first_value_is_asked_for():
    drawn = []
    values = prefetched(iter(lambda: drawn.append(1), 5))
    time.sleep(0.05)
    assert not drawn
    values.close()


def test_no_more_is_drawn_than_was_said():
    drawn = []

    def values():
        for i in range(100):
            drawn.append(i)
            yield i

    ahead = prefetched(values(), ahead=3)
    next(ahead)
    time.sleep(0.2)
    assert len(drawn) <= 1 + 3 + 1
    ahead.close()
    assert not prefetch_threads()


def test_an_error_comes_where_its_value_would_have_come():
    def values():
        yield 1
        yield 2
        raise ValueError("row group 3 is broken")

    ahead = prefetched(values())
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(ValueError, match="row group 3 is broken"):
        next(ahead)
    assert not prefetch_threads()


def test_dropping_the_iterator_ends_the_thread():
    ahead = prefetched(iter(range(10**9)))
    next(ahead)
    assert prefetch_threads()
    del ahead
    assert not prefetch_threads()
