"""The allocator's manners while the loop runs on a CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

# <malloc.h> of glibc
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MIB = 2**20
# DEFAULT_MMAP_THRESHOLD_MAX of glibc, and the twofold that it trims at
MMAP_CEILING, TRIM_CEILING = 32 * MIB, 64 * MIB


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Freed activations stay with the process inside, for the next step's; afterwards they go back.

    By default glibc returns large blocks to the system as soon as they are free, and every step
    pays for each page anew: a tenth of a step's time at ViT-B/32. Elsewhere than on Linux with
    glibc nothing happens.

    What was before cannot be put back: glibc tells nobody its thresholds, and setting one ends
    their adjustment. Left to itself it raises them as mapped blocks are freed, never lowers them,
    and stops at two ceilings. That is where they are left, so the process goes on like any other
    that has once freed a tensor of 32 MiB.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        mallopt, malloc_trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):
        yield
        return
    # Larger blocks are mapped one by one in any case: glibc takes no higher threshold.
    mallopt(M_MMAP_THRESHOLD, MMAP_CEILING)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        mallopt(M_TRIM_THRESHOLD, TRIM_CEILING)
        malloc_trim(0)
