"""One stream of all tasks' images, classified among all tasks' classes; OpenCLIP."""

from __future__ import annotations

from typing import Any

from ...config import Json
from ..host import one_line
from ..union import Union
from .pools import OpenCLIPVisionModelTaskPool


class UnionOpenCLIPVisionModelTaskPool(Union, OpenCLIPVisionModelTaskPool):
    """One stream of all tasks' images, classified among all tasks' classes; OpenCLIP."""

    @one_line
    def evaluate(self, model: Any, **kwargs: object) -> Json:
        """As ``union.measure``, with ``model_info``."""
        self.processor = model.val_preprocess
        if not self._is_setup:
            self.setup()
        return self.finish(self.report(model, self.classifier_heads), model)
