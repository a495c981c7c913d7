"""The type to compute in, by Fabric's precision."""

from __future__ import annotations

import lightning as L
import torch

from .errors import ConfigError

DTYPES = {
    "64": torch.float64,
    "32": torch.float32,
    "bf16": torch.bfloat16,
    "16": torch.float16,
}


def computing_dtype(fabric: L.Fabric) -> torch.dtype:
    """The type to compute in, by Fabric's precision."""
    precision = str(getattr(fabric._precision, "precision", "32-true"))
    if precision.partition("-")[0] not in DTYPES:
        raise ConfigError(
            "fabric.precision", f"{precision!r}", "64-true, 32-true, bf16-true, 16-mixed"
        )
    return DTYPES[precision.partition("-")[0]]
