"""Settings of the C allocator, which affect the speed of training on a CPU."""

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # malloc.h


def keep_freed_memory() -> bool:
    """Make glibc keep large freed blocks for the next allocation, for the whole process. Returns False without glibc.

    By default every activation above a few hundred kilobytes is mapped, zeroed page by page and unmapped again. A
    training step on a CPU then spends a fifth of its time in the kernel. The price: memory that was used once is not
    returned to the system before the process ends.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_MMAP_THRESHOLD, 1 << 30), (_TRIM_THRESHOLD, (1 << 31) - 1), (_TOP_PAD, 1 << 28))
    return all(mallopt(which, value) == 1 for which, value in settings)
