"""How the process of a stage takes memory from the C library. Only glibc can be told; elsewhere nothing
happens here.

`manage` is called once, by `flags.run`. In a notebook or another program nothing is changed.
"""

import contextlib
import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's names for mallopt
_managed = False


def manage():
    """From now on blocks of 4 MB or more go back to the system when they are freed: weights that are loaded
    and folded would leave holes between those that stay."""
    global _managed
    _managed = True
    _glibc("mallopt", MMAP_THRESHOLD, 2**22)


@contextlib.contextmanager
def steady():
    """For a loop over batches: what one batch frees is kept for the next. To get it again, page by page,
    takes time.
    """
    if not _managed:
        yield
        return
    trim()
    _glibc("mallopt", TRIM_THRESHOLD, 2**31 - 1)
    _glibc("mallopt", MMAP_THRESHOLD, 2**25)  # its largest value
    try:
        yield
    finally:
        manage()


def trim():
    """Give back what lies free; a long loop calls it now and then, because the holes between what is kept
    grow.
    """
    if _managed:
        _glibc("malloc_trim", 0)


def _glibc(function, *arguments):
    with contextlib.suppress(OSError, AttributeError):
        getattr(ctypes.CDLL(None), function)(*arguments)
