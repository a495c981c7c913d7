"""The memory allocator while the loop runs on a CPU."""

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
    """Keep freed activations for the next step while inside, and give them back afterwards.

    By default glibc returns large blocks to the system as soon as they are free, and each step
    pays for every page again: a tenth of a step's time at ViT-B/32. Without glibc nothing happens.

    glibc does not tell the thresholds it had, so they are left at the ceilings that it reaches by
    itself in any process that has freed a tensor of 32 MiB.
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
