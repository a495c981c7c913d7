"""A model pool whose loads fail in one line: the config key, what was looked for, and a way out."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeVar

from fusion_bench import BaseModelPool

from ..config import ConfigError

log = logging.getLogger(__name__)

T = TypeVar("T")

OFFLINE_POOL = "modelpool=clip-vit-mini_TA8 taskpool=clip-vit-mini_TA8 need no download"
PROBE_SECONDS = 5

# What of a pool reads files or a hub -> the config group that says where these are.
LOADS = {
    "load_model": "models",
    "load_clip_model": "models",
    "load_classification_head": "classification_heads",
    "load_train_dataset": "train_datasets",
    "load_val_dataset": "val_datasets",
    "load_test_dataset": "test_datasets",
    "load_processor": "processor",
}


def watched(pool: BaseModelPool) -> BaseModelPool:
    """A copy of a model pool whose loads raise a ``ConfigError`` where they fail.

    It is handed to nested methods as well, which load what they merge themselves. The pool itself
    stays as it is.
    """
    pool = copy.copy(pool)
    for name, group in LOADS.items():
        vars(pool).pop(name, None)  # a watched pool's, which loads from that one
        if hasattr(pool, name):
            setattr(pool, name, partial(_load, getattr(pool, name), f"modelpool.{group}"))
    return pool


def fetch(load: Callable[[], T], where: str) -> T:
    """Load something that may be far away.

    Raises:
        ConfigError: it failed, for any reason: those of a hub, of readers of files and of users'
            own configs have no class in common.
    """
    try:
        return load()
    except ConfigError:
        raise
    except Exception as error:
        told = " ".join(str(error).split()) or type(error).__name__
        reason = told if len(told) <= 200 else f"{told[:197]}..."
        allowed = f"a reachable id or a local folder; {OFFLINE_POOL}"
        raise ConfigError(where, f"could not be loaded ({reason})", allowed) from error


def warn_if_unreachable(names: Iterable[object]) -> None:
    """Say at once that the hub does not answer: its client tries each file again for minutes."""
    import huggingface_hub
    from huggingface_hub import constants

    far = [n for n in names if isinstance(n, str) and not os.path.exists(n)]
    if not far or constants.HF_HUB_OFFLINE:
        return
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
    except Exception as error:
        log.warning(
            "%s does not answer (%s); HF_HUB_OFFLINE=1 takes what is cached without waiting",
            constants.ENDPOINT,
            type(error).__name__,
        )


def _load(load: Callable[..., T], where: str, *args: object, **kwargs: object) -> T:
    name = f".{args[0]}" if args and isinstance(args[0], str) else ""
    return fetch(lambda: load(*args, **kwargs), where + name)
