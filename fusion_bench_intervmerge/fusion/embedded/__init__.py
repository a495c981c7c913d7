"""The embedded pool ``clip-vit-tiny_TA8``: a small real CLIP and eight experts, no downloads."""

from .build import ensure_pool
from .pool import (
    EmbeddedCLIPVisionModelPool,
    load_clip,
    load_dataset,
    load_processor,
    register_tasks,
)

__all__ = [
    "EmbeddedCLIPVisionModelPool",
    "ensure_pool",
    "load_clip",
    "load_dataset",
    "load_processor",
]

register_tasks()
