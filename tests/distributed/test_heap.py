import subprocess
import sys

import pytest

from ssd_torchrec.distributed import heap

FAULTS = """
import resource, sys, torch
from ssd_torchrec.distributed import heap
listens = heap.keep_freed_memory() if sys.argv[1] == "keep" else False
def step():
    tensors = [torch.zeros(size) for size in (2**24, 2**21, 2**20)]  # the first is beyond what glibc ever keeps unasked
for _ in range(5): step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5): step()
print(listens, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> tuple[bool, int]:
    run = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
    listens, count = run.stdout.split()
    return listens == "True", int(count)


def test_freed_tensors_are_found_again_without_page_faults():
    listens, kept = faults("keep")
    if not listens:
        pytest.skip("this machine's allocator is not glibc's")
    assert kept < 1000 < faults("leave")[1]


def test_another_allocator_is_left_alone(monkeypatch):
    monkeypatch.setattr(heap.platform, "libc_ver", lambda: ("", ""))
    assert not heap.keep_freed_memory()
