"""OpenCLIP's model pool and task pools for the task-vectors paper's checkpoints."""

import typing
from unittest.mock import patch

import typing_extensions

# fusion-bench 0.2.33 takes ``override`` from ``typing``, which has it from Python 3.12 on
with patch.object(typing, "override", typing_extensions.override, create=True):
    from .checkpoints import ImageEncoder
    from .pools import OpenCLIPVisionModelPool, OpenCLIPVisionModelTaskPool
    from .union import UnionOpenCLIPVisionModelTaskPool

__all__ = [
    "ImageEncoder",
    "OpenCLIPVisionModelPool",
    "OpenCLIPVisionModelTaskPool",
    "UnionOpenCLIPVisionModelTaskPool",
]
