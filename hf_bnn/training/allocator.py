"""The C allocator's settings, which decide what training on a CPU costs."""

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # malloc.h


def keep_freed_memory() -> bool:
    """Make glibc keep large freed blocks for the next allocation, for the whole process. False where it is not glibc.

    By default every activation of more than some hundred kilobytes is mapped, zeroed page by page and unmapped again;
    a training step on a CPU then spends a fifth of its time in the kernel. The price: memory, once used, is not given
    back before the process ends.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_MMAP_THRESHOLD, 1 << 30), (_TRIM_THRESHOLD, (1 << 31) - 1), (_TOP_PAD, 1 << 28))
    return all(mallopt(which, value) == 1 for which, value in settings)
