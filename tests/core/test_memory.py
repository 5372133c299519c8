"""The peak that is measured is the one since the last reset."""

import subprocess
import sys

import psutil
import pytest

from flanmoe.core.memory import peak_memory_bytes

needs_linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux can reset its peak"
)

# A process of its own: what other tests hold and free would blur the numbers.
_PROGRAM = """
import mmap
from flanmoe.core.memory import peak_memory_bytes, reset_peak_memory

def hold(num_bytes):
    # An anonymous map goes back to the system when it is closed, which the heap need not do.
    with mmap.mmap(-1, num_bytes) as block:
        for start in range(0, num_bytes, 4096):
            block[start] = 1

assert reset_peak_memory()
base = peak_memory_bytes()
hold(200_000_000)
first = peak_memory_bytes() - base
assert reset_peak_memory()
after_reset = peak_memory_bytes() - base
hold(50_000_000)
print(first, after_reset, peak_memory_bytes() - base)
"""


@needs_linux
def test_reset_and_peak_around_200_megabytes() -> None:
    output = subprocess.run(
        [sys.executable, "-c", _PROGRAM], check=True, capture_output=True, text=True
    )
    first, after_reset, second = map(int, output.stdout.split())
    slack = 10_000_000
    assert 200_000_000 - slack < first < 200_000_000 + slack
    assert after_reset < slack
    assert 50_000_000 - slack < second < 50_000_000 + slack


def test_a_process_has_used_what_it_uses() -> None:
    assert peak_memory_bytes() >= psutil.Process().memory_info().rss * 0.99 > 10_000_000


def test_the_peak_of_children_holds_that_of_one_that_ended() -> None:
    program = (
        "import subprocess, sys\n"
        "from flanmoe.core.memory import peak_memory_of_children_bytes\n"
        "before = peak_memory_of_children_bytes()\n"
        "subprocess.run([sys.executable, '-c', 'len(bytearray(200_000_000))'], check=True)\n"
        "print(before, peak_memory_of_children_bytes())\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    before, after = map(int, output.stdout.split())
    assert before == 0
    assert 200_000_000 < after < 260_000_000
