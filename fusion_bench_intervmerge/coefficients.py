"""Task vectors and their mixture: theta0 + sum over tasks of lambda * tau.

tau_t = theta_t - theta0 is task t's vector (Task Arithmetic), lambda one coefficient a task, or one
a task and parameter tensor (AdaMerging, arXiv 2310.02575; section 3.1 of the IntervMerge paper).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from .encoders import VisionTower
from .errors import ConfigError
from .pickles import read_tensor
from .settings import Flag, Settings, shown


class Mixture(nn.Module):
    """Merged weights as a function of coefficients that can be trained.

    The weights are mixed once a step, in place, on whatever device they live on. The coefficients'
    gradient is the inner product of a weight's gradient with each task vector, so that no copy of
    the weights needs a gradient of its own.

    Args:
        pretrained: theta0, one tensor a parameter, in ``named_parameters()`` order.
        task_vectors: tau_t, tensors in the same order, one sequence a task.
        coefficients: (tasks) or (tasks, tensors).
        dtype: in which the task vectors are kept; bfloat16 halves their memory. They are mixed in
            fp32 at least.

    Raises:
        ConfigError: coefficients of a shape that does not fit.
    """

    def __init__(
        self,
        pretrained: Sequence[Tensor],
        task_vectors: Iterable[Sequence[Tensor]],
        coefficients: Tensor,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        tasks = coefficients.shape[0]
        self.theta0 = [tensor.detach().clone() for tensor in pretrained]
        self.tau = [torch.empty(tasks, t.numel(), dtype=dtype) for t in pretrained]
        for task, vector in enumerate(task_vectors):
            for rows, tensor in zip(self.tau, vector, strict=True):
                rows[task] = tensor.flatten()
        if coefficients.shape not in ((tasks,), (tasks, len(self.tau))):
            raise ConfigError(
                "coefficients.init",
                f"coefficients of shape {tuple(coefficients.shape)} do not fit",
                f"({tasks},) or ({tasks}, {len(self.tau)}): tasks, parameter tensors",
            )
        self.coefficients = nn.Parameter(coefficients.detach().clone().float())

    @torch.no_grad()
    def elect_signs(self) -> None:
        """Drop entries whose sign is not that of the sum over tasks (Ties-Merging, section 4).

        With trimmed vectors and one common coefficient the mixture then is Ties-Merging with the
        disjoint sum, as the IntervMerge paper uses it. In place: there is no room for a second
        set of task vectors.
        """
        signs = [tau.sum(dim=0).sign().to(torch.int8) for tau in self.tau]
        majority = sum(int(sign.sum(dtype=torch.int64)) for sign in signs)
        for tau, sign in zip(self.tau, signs, strict=True):
            sign[sign == 0] = (majority > 0) - (majority < 0)
            for row in tau:
                row[row.sign() != sign] = 0

    def release(self) -> None:
        """Forget the weights once they are mixed; the coefficients stay for the record."""
        self.theta0, self.tau = [], []

    def to_device(self, device: torch.device) -> Mixture:
        """Move everything; the mixing then happens there."""
        self.theta0 = [t.to(device) for t in self.theta0]
        self.tau = [t.to(device) for t in self.tau]
        self.coefficients.data = self.coefficients.data.to(device)
        return self

    def _wide(self, index: int) -> Tensor:
        """A tensor's task vectors in the coefficients' type, whatever they are kept in.

        In bfloat16 a coefficient would be rounded to two digits before it acts, so that its small
        steps would be lost. One tensor at a time: the memory of the task vectors does not double.
        """
        tau = self.tau[index]
        return tau.to(torch.promote_types(tau.dtype, self.coefficients.dtype))

    def used(self) -> Tensor:
        """The coefficients as they act: clamped to [0, 1], shape (tasks, tensors)."""
        clamped = self.coefficients.detach().clamp(0, 1)
        return clamped if clamped.dim() == 2 else clamped[:, None].expand(-1, len(self.tau))

    @torch.no_grad()
    def write(self, tower: VisionTower) -> None:
        """Mix into the tower's parameters, in their type."""
        used = self.used()
        for index, parameter in enumerate(tower.mergeable().values()):
            tau = self._wide(index)
            change = (used[:, index].to(tau.dtype) @ tau).view(parameter.shape)
            parameter.data.copy_(self.theta0[index] + change)

    @torch.no_grad()
    def collect_gradient(self, tower: VisionTower) -> None:
        """Turn the gradients of the tower's parameters into the coefficients', and free them.

        d loss / d lambda_tl = <d loss / d theta_l, tau_tl>, zero outside [0, 1] where the clamp
        holds lambda.
        """
        columns = []
        for index, parameter in enumerate(tower.mergeable().values()):
            if parameter.grad is None:
                columns.append(self.coefficients.new_zeros(len(self.coefficients)))
            else:
                tau = self._wide(index)
                columns.append((tau @ parameter.grad.flatten().to(tau.dtype)).to(self.coefficients))
                parameter.grad = None
        gradient = torch.stack(columns, dim=1)
        if self.coefficients.dim() == 1:
            gradient = gradient.sum(dim=1)
        inside = (self.coefficients >= 0) & (self.coefficients <= 1)
        self.coefficients.grad = gradient * inside


def task_vector(expert: VisionTower, pretrained: Sequence[Tensor]) -> list[Tensor]:
    """tau = theta_expert - theta0, in ``named_parameters()`` order.

    Raises:
        ConfigError: the expert's parameters have other shapes.
    """
    weights = list(expert.mergeable().values())
    if [w.shape for w in weights] != [t.shape for t in pretrained]:
        raise ConfigError("modelpool", "an expert and the pretrained encoder differ in shape")
    return [w.detach() - t for w, t in zip(weights, pretrained, strict=True)]


def trim(vector: Sequence[Tensor], keep: float) -> list[Tensor]:
    """Keep the fraction ``keep`` of a task vector's entries that are largest in magnitude.

    The first step of Ties-Merging (arXiv 2306.01708, section 4).
    """
    flat = torch.cat([tensor.flatten() for tensor in vector]).abs()
    threshold = flat.kthvalue(max(1, flat.numel() - int(keep * flat.numel()))).values
    return [torch.where(tensor.abs() >= threshold, tensor, 0.0) for tensor in vector]


def initial_coefficients(
    init: float | str | Path | list | Tensor, tasks: int, tensors: int, granularity: str
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


def _read_init(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    values = torch.tensor(value).flatten() if _is_numeric(value) else value
    if isinstance(values, Tensor) and values.numel() and values.isfinite().all():
        if values.numel() > 1 or 0 <= float(values) <= 1:
            return value
    elif isinstance(value, str) and value.strip() and "\0" not in value:
        return value
    raise ConfigError("", shown(value), "a number in [0, 1], mean, base, or a file")


def _is_numeric(value: Any) -> bool:
    """A number, or lists of numbers of one length."""
    if isinstance(value, list):
        lengths = {len(entry) if isinstance(entry, list) else None for entry in value}
        return len(lengths) == 1 and all(map(_is_numeric, value))
    return isinstance(value, (int, float, Tensor)) and not isinstance(value, bool)


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


def read_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Check ``coefficients`` of a method config and fill in what it leaves out.

    Raises:
        ConfigError: an unknown key or value.
    """
    return CoefficientSettings.read(settings, "coefficients").model_dump()


def _read_coefficients(path: Path, where: str) -> Tensor:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)["coefficients"]
        return read_tensor(path)
    except FileNotFoundError:
        raise ConfigError(
            where, f"there is no file {path}", "a number or an existing file"
        ) from None
    except Exception as error:
        raise ConfigError(
            where, f"{path} holds no coefficients ({error})", ".pt or .safetensors"
        ) from None
