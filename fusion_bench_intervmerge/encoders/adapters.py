"""PEFT's adapters, merged into the weights beside which they were trained."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


def merge_adapters(model: nn.Module) -> nn.Module:
    """A model without adapters: itself, or if it has any a copy with these merged.

    Adapters are found where PEFT puts them: around the model, around a part of it, or injected into
    its layers, as transformers does.

    Raises:
        TypeError: adapters that are no change of the weights: prompts, linearised ones.
    """
    if not _has_adapters(model):
        return model
    merged = _merged(copy.deepcopy(model)).requires_grad_(True)
    if _has_adapters(merged):
        raise TypeError("its PEFT adapter cannot be merged into the weights")
    for module in merged.modules():  # or transformers would save adapters alone
        vars(module).pop("_hf_peft_config_loaded", None)
    return merged


def _has_adapters(model: nn.Module) -> bool:
    ours = ("peft.", "fusion_bench.models.linearized.")  # the latter is a tangent, not weights
    return any(type(module).__module__.startswith(ours) for module in model.modules())


def _merged(module: Any) -> nn.Module:
    if hasattr(module, "merge_and_unload"):
        return module.merge_and_unload()
    if hasattr(module, "unload_and_optionally_merge_module"):  # trained whole beside the adapter
        return module.unload_and_optionally_merge_module(
            merge=True, safe_merge=False, adapter_names=None
        )
    for name, child in module.named_children():
        merged = _merged(child)
        if merged is not child:
            setattr(module, name, merged)
    if hasattr(module, "get_base_layer") and hasattr(module, "merge"):
        if not getattr(module, "disable_adapters", False):
            module.merge()
        return module.get_base_layer()
    return module
