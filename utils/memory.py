"""How a process uses its memory: without holes while weights are loaded and folded, steadily while batches go through.

On the CPU torch takes its memory from the C library. Only glibc can be told; with another one nothing happens here.
"""

import ctypes
import gc
from contextlib import contextmanager, suppress

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's names for mallopt
LARGE = 2**22  # bytes


def own_pages():
    """From now on an array of 4 MB or more has pages of its own, which go back when it is freed: folding the weights would leave
    holes between the arrays that stay, a twentieth of a gigabyte in ViT-B-32."""
    _glibc("mallopt", MMAP_THRESHOLD, LARGE)


@contextmanager
def steady():
    """For a loop over batches: what one batch frees is kept for the next, and worker processes that start inside share the pages
    of all that is there. To get memory anew, page by page, takes a twentieth of a batch's time."""
    _glibc("malloc_trim", 0)
    _glibc("mallopt", TRIM_THRESHOLD, 2**31 - 1)
    _glibc("mallopt", MMAP_THRESHOLD, 2**25)  # its largest value
    gc.collect()
    gc.freeze()  # else the search for garbage writes to every object, and each process gets pages of its own for all of them
    try:
        yield
    finally:
        gc.unfreeze()
        own_pages()


def _glibc(function, *arguments):
    with suppress(OSError, AttributeError, TypeError):  # other C libraries
        getattr(ctypes.CDLL(None), function)(*arguments)
