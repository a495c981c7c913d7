"""One stream of all tasks' images, classified among all tasks' classes; OpenCLIP."""

from __future__ import annotations

from typing import Any

from fusion_bench.utils import count_parameters

from fusion_bench_intervmerge.schema import Json

from ..screen import one_line
from ..union import Union, measure
from .taskpool import OpenCLIPVisionModelTaskPool


class UnionOpenCLIPVisionModelTaskPool(Union, OpenCLIPVisionModelTaskPool):
    """One stream of all tasks' images, classified among all tasks' classes; OpenCLIP."""

    @one_line
    def evaluate(self, model: Any, **kwargs: object) -> Json:
        """As ``measure``, with ``model_info``."""
        self.processor = model.val_preprocess
        if not self._is_setup:
            self.setup()
        trainable, everything = count_parameters(model)
        device = self.fabric.device
        heads: Any = self.classifier_heads
        found = measure(model.to(device).eval(), heads, self.batches(), device)
        return {"model_info": {"trainable_params": trainable, "all_params": everything}, **found}
