"""What is asked of the C library's allocator, and of Python's collector."""

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def give_back() -> None:
    """Hands memory that was freed back to the system, where the C library would keep it (glibc does).

    For after what took much for a while: compiling leaves a quarter of a gigabyte or so that nothing may need again.
    """
    if not sys.platform.startswith("linux"):
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def rare_collections() -> Iterator[None]:
    """While open, Python looks for cycles of garbage a hundred times more rarely.

    It looks whenever so many objects were made, at ever more of all there are. For what makes thousands of objects a
    second, none of them in cycles: encoding conversations, of which it took an eighth.
    """
    before = gc.get_threshold()
    gc.set_threshold(100_000, 50, 50)
    try:
        yield
    finally:
        gc.set_threshold(*before)
