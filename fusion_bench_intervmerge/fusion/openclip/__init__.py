"""OpenCLIP's model pool and task pool for the task-vectors paper's checkpoints."""

import typing
from collections.abc import Iterator
from contextlib import contextmanager

import typing_extensions


@contextmanager
def _override_in_typing() -> Iterator[None]:
    """fusion-bench 0.2.33 takes ``override`` from ``typing``, which has it from Python 3.12 on."""
    if hasattr(typing, "override"):
        yield
        return
    typing.override = typing_extensions.override  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del typing.override  # type: ignore[attr-defined]


with _override_in_typing():
    from .checkpoints import ImageEncoder
    from .pool import OpenCLIPVisionModelPool
    from .taskpool import OpenCLIPVisionModelTaskPool

__all__ = [
    "ImageEncoder",
    "OpenCLIPVisionModelPool",
    "OpenCLIPVisionModelTaskPool",
]
