"""What is asked of the C library's allocator."""

import ctypes
import sys


def give_back() -> None:
    """Hands memory that was freed back to the system, where the C library would keep it (glibc does).

    For after what took much for a while: compiling leaves a quarter of a gigabyte or so that nothing may need again.
    """
    if not sys.platform.startswith("linux"):
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
