"""Where merging coefficients come from, and what a method config says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from safetensors.torch import load_file
from torch import Tensor

from ..errors import ConfigError
from ..pickles import read_tensor
from ..settings import Flag, Settings, shown


def initial_coefficients(
    init: float | str | Path | list[Any] | Tensor, tasks: int, tensors: int, granularity: str
) -> Tensor:
    """Coefficients from a number, a tensor, or a file that FusionBench's AdaMerging saved.

    Args:
        init: a number for all, ``mean`` (one over the number of tasks: Weight Averaging), a tensor
            or nested list, or a path: ``.pt`` (shape (tasks,) or (tasks, tensors)) or
            ``.safetensors`` (an artifact's).
        tasks, tensors: the expected sizes.
        granularity: ``task`` or ``layer``.

    Raises:
        ConfigError: the file is missing or of another kind, or the shape does not fit.
    """
    where = "coefficients.init"
    shape = (tasks,) if granularity == "task" else (tasks, tensors)
    if isinstance(init, str) and init == "mean":
        init = 1 / tasks
    if isinstance(init, (int, float)):
        return torch.full(shape, float(init))
    if isinstance(init, list):
        init = torch.tensor(init)
    if not isinstance(init, Tensor):
        init = _read_coefficients(Path(init), where)
    if not init.isfinite().all():
        raise ConfigError(where, "some coefficients are not finite", "numbers")
    if init.shape == (tasks, 1):
        init = init[:, 0]
    if init.shape == (tasks,) and granularity == "layer":
        init = init[:, None].expand(shape)
    if init.shape != shape:
        raise ConfigError(
            where,
            f"coefficients of shape {tuple(init.shape)} do not fit granularity {granularity!r}",
            f"shape {shape}: tasks{', parameter tensors' if granularity == 'layer' else ''}",
        )
    return init.float().clone()


def _read_init(value: object) -> object:
    value = str(value) if isinstance(value, Path) else value
    if isinstance(value, str) and value.strip() and "\0" not in value:
        return value
    if _is_numeric(value):
        values = torch.tensor(value).flatten()
        if values.isfinite().all() and (len(values) > 1 or 0 <= values[0] <= 1):
            return value
    raise ConfigError("", shown(value), "a number in [0, 1], mean, base, or a file")


def _is_numeric(value: object) -> bool:
    """A number, or lists of numbers of one length."""
    if isinstance(value, list):
        lengths = {len(entry) if isinstance(entry, list) else None for entry in value}
        return len(lengths) == 1 and all(map(_is_numeric, value))
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class CoefficientSettings(Settings):
    """``coefficients`` of a method config.

    Args:
        granularity: ``task``, one coefficient a task, or ``layer``, one a task and parameter
            tensor.
        init: where the coefficients start: a number in [0, 1]; ``mean``, one over the number of
            tasks; a file that AdaMerging saved, or a saved model's ``coefficients.safetensors``;
            ``base``, which runs ``base``, then an AdaMerging method, first.
        train: train them along with the edits, clamped to [0, 1] where they act.
        task_vectors: ``plain``, or ``ties``: trimmed, and of the elected sign (Ties-Merging).
        keep: with ``ties``, the share of a task vector's entries that trimming keeps.
        dtype: ``float32``, or ``bfloat16``, which halves the memory of the task vectors.
    """

    granularity: Literal["task", "layer"] = "task"
    init: Annotated[Any, BeforeValidator(_read_init)] = 0.3
    train: Flag = True
    task_vectors: Literal["plain", "ties"] = "plain"
    keep: Annotated[float, Field(gt=0, le=1, description="a fraction in (0, 1]")] = 0.2
    dtype: Literal["float32", "bfloat16"] = "float32"


def _read_coefficients(path: Path, where: str) -> Tensor:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)["coefficients"]
        return read_tensor(path)
    except FileNotFoundError:
        problem, allowed = f"there is no file {path}", "a number or an existing file"
    except Exception as error:
        problem, allowed = f"{path} holds no coefficients ({error})", ".pt or .safetensors"
    raise ConfigError(where, problem, allowed)
