"""The embedded pools as FusionBench sees them: small real CLIPs and experts, no downloads."""

from .pool import (
    EmbeddedCLIPVisionModelPool,
    load_clip,
    load_dataset,
    load_processor,
    register_tasks,
)

__all__ = ["EmbeddedCLIPVisionModelPool", "load_clip", "load_dataset", "load_processor"]

register_tasks()
