"""A pool's models as they can be merged: plain vision models, whole, of finite numbers.

Every model that a run takes from a pool comes through ``load_model``, whether a FusionBench method
merges it, coefficients do, or it is what edits are found for.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from fusion_bench import BaseModelPool
from fusion_bench.modelpool import CLIPVisionModelPool
from fusion_bench.utils.modelscope import resolve_repo_path
from torch import nn
from transformers import CLIPModel, PreTrainedModel

from ..config import ConfigError
from ..encoders.adapters import merge_adapters
from ..encoders.base import check_finite
from ..encoders.dinov2 import DINOv2Tower
from ..encoders.huggingface import as_vision_model

log = logging.getLogger(__name__)

# Where FusionBench's configs of a model name a checkpoint, beside transformers' own key.
NAMES = ("pretrained_model_name_or_path", "model_name", "base_model_name", "config_path")
FILES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
WHOLE = "the id or the folder of a whole CLIP"
HALF = (torch.float16, torch.bfloat16)
FOLDER = "a folder that CLIPVisionModel.save_pretrained wrote, an adapter's folder, or a hub id"


class OwnHead(nn.Identity):
    """Stands for a task's classification head, which is not merged: it may have other classes.

    Attributes:
        head: the head, outside of the model's parameters.
    """

    def __init__(self, head: nn.Module):
        super().__init__()
        vars(self)["head"] = head


def load_model(
    pool: BaseModelPool, load: Callable[..., Any], name: Any, *args: object, **kwargs: object
) -> nn.Module:
    """A pool's model.

    PEFT's adapters are merged into a copy of what they adapt; an adapter's folder or id is one for
    the pool's ``_pretrained_``. A bare ``CLIPVisionTransformer`` is put into a ``CLIPVisionModel``,
    and an image classifier's head is replaced by an ``OwnHead``. Weights in half precision become
    float32.

    Args:
        pool: the pool.
        load: its method of this name.
        name: the model's; or a config, as ``load`` takes it.
        args, kwargs: what ``load`` takes beside it.

    Raises:
        ConfigError: a weight that is not finite, a checkpoint that lacks tensors, or an adapter
            that does not fit.
    """
    known = isinstance(name, str) and name in pool._models
    where = f"modelpool.models.{name}" if known else "modelpool.models"
    config: Any = pool._models[name] if known else name
    folder = ""
    if isinstance(pool, CLIPVisionModelPool) and isinstance(config, str):
        if Path(config).is_file() or config.endswith(FILES):
            raise ConfigError(where, f"{config} is a file", FOLDER)
        folder = resolve_repo_path(config, platform=pool._platform)
    if folder and (Path(folder) / "adapter_config.json").is_file():
        model = _adapted(pool, load, str(name), folder, where)
    elif isinstance(pool, CLIPVisionModelPool) and _takes_from_pretrained(config):
        model, info = load(name, *args, output_loading_info=True, **kwargs)
        _check_whole(config, info, where, FOLDER)
    else:
        model = load(name, *args, **kwargs)
    try:
        model = as_vision_model(merge_adapters(model))
    except TypeError as error:
        raise ConfigError(where, str(error), "LoRA, or another adapter of weights") from None
    head = getattr(model, "classifier", None)
    has_head = isinstance(head, nn.Module) and DINOv2Tower.wrap(model) is not None
    half = any(p.dtype in HALF for p in model.parameters())
    if isinstance(config, nn.Module) and (has_head or half):
        model = copy.deepcopy(model)  # a live module is the user's
    if half:  # FusionBench merges models of one type alone
        model = model.float()
    if has_head:
        model.classifier = OwnHead(cast(nn.Module, model.classifier))
    if isinstance(model, PreTrainedModel) and _is_the_hosts(config):
        kind: Any = type(model)
        info = _loading_info(kind, str(checkpoint(config)))
        missing = set(info["missing_keys"]) & model.state_dict().keys()  # not of a head
        _check_whole(config, {**info, "missing_keys": missing}, where, FOLDER)
    check_finite(model.state_dict(), where)
    return model


def load_clip(
    pool: Any, load: Callable[..., Any], name: str, *args: object, **kwargs: object
) -> CLIPModel:
    """A pool's whole CLIP; also if its config calls a function of FusionBench's own.

    Args:
        pool, args, kwargs: as in ``load_model``.
        load: the pool's method ``load_clip_model``.
        name: the model's, ``_pretrained_``.

    Raises:
        ConfigError: a checkpoint that lacks tensors.
    """
    config, where = pool._models[name], f"modelpool.models.{name}"
    if isinstance(config, Mapping) and NAMES[0] not in config:
        if checkpoint(config) is None:
            raise ConfigError(where, "names no checkpoint", WHOLE)
        load, name = CLIPModel.from_pretrained, str(checkpoint(config))
    clip, info = load(name, *args, output_loading_info=True, **kwargs)
    _check_whole(config, info, where, WHOLE)
    return clip


def checkpoint(config: object) -> str | None:
    """The id or the folder that a model's config names, if it does."""
    if isinstance(config, Mapping):
        config = next((config[key] for key in NAMES if isinstance(config.get(key), str)), None)
    return config if isinstance(config, str) else None


def warn_of_twins(models: Mapping[str, object], tasks: Iterable[str]) -> None:
    """Warn if two tasks have one checkpoint, which is hardly ever meant."""
    seen: dict[object, str] = {}
    for task in tasks:
        config = models[task]
        key = id(config) if isinstance(config, nn.Module) else str(config)
        if key in seen:
            log.warning("one expert for two tasks, %s and %s: %s", seen[key], task, _shown(config))
        seen[key] = task


def _shown(config: object) -> str:
    return checkpoint(config) or type(config).__name__


def _takes_from_pretrained(config: Any) -> bool:
    if isinstance(config, Mapping):
        return str(config.get("_target_", "")).endswith(".from_pretrained")
    return isinstance(config, str)


def _is_the_hosts(config: Any) -> bool:
    """Whether FusionBench loads a model by itself, without a word of what its checkpoint lacks."""
    if not isinstance(config, Mapping) or config.get("pretrained") is False:
        return False
    return str(config.get("_target_", "fusion_bench.")).startswith("fusion_bench.")


@cache
def _loading_info(kind: Any, name: str) -> dict[str, Any]:
    return kind.from_pretrained(name, output_loading_info=True)[1]


def _check_whole(config: object, info: Mapping[str, Any], where: str, allowed: str) -> None:
    """Refuse a checkpoint whose missing tensors transformers would draw at random."""
    missing, others = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if not missing:
        return
    problem = f"{_shown(config)} lacks {missing[0]}{_more(missing)}"
    renamed = [name for name in others if name.endswith(missing[0])]
    if renamed:
        prefix = renamed[0].removesuffix(missing[0])
        raise ConfigError(
            where, f"{problem}: its names begin with {prefix}", f"the names without {prefix}"
        )
    problem += f"; it has {others[0]}{_more(others)}" if others else ""
    raise ConfigError(where, problem, allowed)


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _adapted(
    pool: BaseModelPool, load: Callable[..., Any], name: str, adapter: str, where: str
) -> nn.Module:
    """The pool's pretrained model with an adapter around it, or around its transformer."""
    try:
        peft: Any = import_module("peft")
    except ImportError:
        raise ConfigError(where, f"{adapter} is a PEFT adapter", "pip install peft") from None
    if name == "_pretrained_" or "_pretrained_" not in pool._models:
        problem = f"{adapter} is a PEFT adapter, and nothing that it could adapt"
        raise ConfigError("modelpool.models._pretrained_", problem, "the CLIP that it adapts")
    model = as_vision_model(load_model(pool, load, "_pretrained_"))
    if isinstance(pool._models["_pretrained_"], nn.Module):
        model = copy.deepcopy(model)  # a live module is the user's
    config = peft.PeftConfig.from_pretrained(adapter)
    base, pretrained = config.base_model_name_or_path, checkpoint(pool._models["_pretrained_"])
    if base and pretrained and base != pretrained:
        log.warning("%s: it was trained beside %s, and is merged into %s", where, base, pretrained)
    keys = peft.load_peft_weights(adapter, device="cpu")
    starts = {key.removeprefix("base_model.model.").partition(".")[0] for key in keys}
    # FusionBench's adapters are those of the ``CLIPVisionTransformer`` inside.
    inner = getattr(model, "vision_model", None)
    part = inner if inner is not None and starts <= dict(inner.named_children()).keys() else model
    adapted = peft.PeftModel(part, config)
    loaded = adapted.load_adapter(adapter, "default")
    unfit = [*loaded.missing_keys, *loaded.unexpected_keys]
    if unfit:
        problem = f"the adapter {adapter} does not fit _pretrained_ at {sorted(unfit)[0]}"
        raise ConfigError(where, problem, "an adapter of the CLIP's vision encoder")
    if part is model:
        return adapted
    model.vision_model = adapted
    return model
