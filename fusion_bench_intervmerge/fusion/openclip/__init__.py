"""OpenCLIP's model pool and task pool for the task-vectors paper's checkpoints."""

import typing

import typing_extensions

# fusion-bench 0.2.33 takes ``override`` from ``typing``, which has it from Python 3.12 on.
if not hasattr(typing, "override"):
    typing.override = typing_extensions.override  # type: ignore[attr-defined]

from .encoder import ImageEncoder
from .pool import OpenCLIPVisionModelPool
from .taskpool import OpenCLIPVisionModelTaskPool

__all__ = ["ImageEncoder", "OpenCLIPVisionModelPool", "OpenCLIPVisionModelTaskPool"]
