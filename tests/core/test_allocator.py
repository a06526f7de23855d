"""Freed memory goes back to the system."""

import ctypes
import sys
from pathlib import Path

import pytest

from jaxlora.core.allocator import give_back


def resident() -> int:
    """Bytes."""
    (line,) = (
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")
    )
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_was_freed_is_given_back():
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    if not hasattr(libc, "malloc_trim"):
        pytest.skip("not glibc")
    # Smaller than what is mapped by itself, and kept apart: what is freed between others stays with the library.
    blocks = [libc.malloc(size) for _ in range(5000) for size in (20_000, 100)]
    for block in blocks[::2]:
        ctypes.memset(block, 1, 20_000)
    for block in blocks[::2]:
        libc.free(block)
    held = resident()
    give_back()
    assert resident() < held - 50_000_000
    for block in blocks[1::2]:
        libc.free(block)
