"""Task vectors, the coefficients that weigh them, and the mixture that they give.

The merged weights are theta0 + sum over tasks of lambda * tau; lambda is one coefficient per task
(Task Arithmetic), or one per task and parameter tensor (AdaMerging, arXiv 2310.02575; section 3.1
of the IntervMerge paper).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator
from safetensors.torch import load_file
from torch import Tensor, nn

from .config import ConfigError, Flag, Fraction, Settings, shown
from .encoders.base import VisionTower, check_finite

TaskVector = Mapping[str, Tensor]  # by the parameter's name, in ``named_parameters()`` order


def task_vector(expert: TaskVector, pretrained: TaskVector) -> TaskVector:
    """tau = theta - theta0, one tensor per parameter (arXiv 2212.04089, section 2).

    Raises:
        ConfigError: the two differ in a tensor's name or shape, or a number is not finite.
    """
    shapes = {name: tensor.shape for name, tensor in pretrained.items()}
    if {name: tensor.shape for name, tensor in expert.items()} != shapes:
        raise ConfigError("modelpool", "an expert and the pretrained encoder differ in shape")
    vector = {name: expert[name].detach() - tensor for name, tensor in pretrained.items()}
    check_finite(vector, "modelpool")
    return vector


def trim(vector: TaskVector, keep: float) -> TaskVector:
    """The share ``keep`` of the entries that are largest in magnitude; the others are 0.

    The first step of Ties-Merging (arXiv 2306.01708, section 4).
    """
    flat = torch.cat([tensor.flatten() for tensor in vector.values()]).abs()
    threshold = flat.kthvalue(max(1, flat.numel() - int(keep * flat.numel()))).values
    return {name: torch.where(t.abs() >= threshold, t, 0.0) for name, t in vector.items()}


Granularity = Literal["task", "layer"]
_INIT = "a number in [0, 1], mean, base, or a file"


def _check_init(value: object) -> object:
    """A number in [0, 1], (nested) lists of numbers, or a name or path."""
    value = str(value) if isinstance(value, Path) else value
    try:
        if isinstance(value, str):
            fits = bool(value.strip()) and "\0" not in value
        elif isinstance(value, list):
            fits = bool(torch.tensor(value, dtype=torch.float64).isfinite().all())
        else:
            fits = isinstance(value, (int, float)) and value is not True and 0 <= value <= 1
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise ConfigError("", shown(value), _INIT)
    return value


class CoefficientSettings(Settings):
    """``coefficients`` of a method config.

    Args:
        granularity: ``task``, one coefficient per task, or ``layer``, one per task and parameter
            tensor.
        init: where the coefficients start: a number in [0, 1]; ``mean``, one over the number of
            tasks; a file that AdaMerging saved, or a saved model's ``coefficients.safetensors``;
            ``base``, which runs ``base``, then an AdaMerging method, first.
        train: train them along with the edits, clamped to [0, 1] where they act.
        task_vectors: ``plain``, or ``ties``: trimmed, and of the elected sign (Ties-Merging).
        keep: with ``ties``, the share of a task vector's entries that trimming keeps.
        dtype: ``float32``, or ``bfloat16``, which halves the memory of the task vectors.
    """

    granularity: Granularity = "task"
    init: Annotated[Any, BeforeValidator(_check_init)] = 0.3
    train: Flag = True
    task_vectors: Literal["plain", "ties"] = "plain"
    keep: Fraction = 0.2
    dtype: Literal["float32", "bfloat16"] = "float32"


def initial_coefficients(
    init: float | str | Path | list[Any] | Tensor,
    tasks: int,
    tensors: int,
    granularity: Granularity,
) -> Tensor:
    """Coefficients (tasks,) or, by layer, (tasks, tensors).

    Args:
        init: a number for all, ``mean`` (one over the number of tasks: Weight Averaging), a tensor
            or nested list, or a path: ``.pt`` (as AdaMerging saves them) or ``.safetensors`` (an
            artifact's).
        tasks, tensors: the expected sizes.

    Raises:
        ConfigError: the file is missing or of another kind, or the shape does not fit.
    """
    where = "coefficients.init"
    shape = (tasks,) if granularity == "task" else (tasks, tensors)
    if init == "mean":
        init = 1 / tasks
    if isinstance(init, (int, float)):
        return torch.full(shape, float(init))
    if isinstance(init, (str, Path)):
        init = _read_coefficients(Path(init), where)
    values = torch.as_tensor(init)
    if not values.isfinite().all():
        raise ConfigError(where, "some coefficients are not finite", "numbers")
    if values.shape == (tasks, 1):
        values = values[:, 0]
    if values.shape == (tasks,) and granularity == "layer":
        values = values[:, None].expand(shape)
    if values.shape != shape:
        raise ConfigError(
            where,
            f"coefficients of shape {tuple(values.shape)} do not fit granularity {granularity!r}",
            f"shape {shape}: tasks{', parameter tensors' if granularity == 'layer' else ''}",
        )
    return values.float().clone()


def _read_coefficients(path: Path, where: str) -> Tensor:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)["coefficients"]
        values = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(values, Tensor):
            raise TypeError(f"it holds a {type(values).__name__}")
        return values
    except FileNotFoundError:
        problem, allowed = f"there is no file {path}", "a number or an existing file"
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        problem, allowed = f"{path} holds no coefficients ({reason})", ".pt or .safetensors"
    raise ConfigError(where, problem, allowed)


class Mixture(nn.Module):
    """Merged weights as a function of coefficients that can be trained.

    The weights are mixed once per step, in place, on whatever device they live on. The gradient of
    the coefficients is the inner product of a weight's gradient with each task vector, so that no
    copy of the weights needs a gradient of its own.

    Args:
        pretrained: theta0, parameters by name, in ``named_parameters()`` order.
        task_vectors: tau_t, one per task.
        coefficients: (tasks) or (tasks, tensors).
        dtype: in which the task vectors are kept; bfloat16 halves their memory. They are mixed in
            fp32 at least.
    """

    def __init__(
        self,
        pretrained: Mapping[str, Tensor],
        task_vectors: Iterable[TaskVector],
        coefficients: Tensor,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        tasks = coefficients.shape[0]
        self.theta0 = {name: tensor.detach().clone() for name, tensor in pretrained.items()}
        self.tau = {n: torch.empty(tasks, t.numel(), dtype=dtype) for n, t in pretrained.items()}
        for task, vector in enumerate(task_vectors):
            for name, tensor in vector.items():
                self.tau[name][task] = tensor.flatten()
        self.coefficients = nn.Parameter(coefficients.detach().clone().float())

    @torch.no_grad()
    def elect_signs(self) -> None:
        """Drop entries whose sign is not that of the sum over tasks (Ties-Merging, section 4).

        With trimmed vectors and one common coefficient the mixture then is Ties-Merging with the
        disjoint sum, as the IntervMerge paper uses it. In place: there is no room for a second
        set of task vectors.
        """
        signs = [tau.sum(dim=0).sign().to(torch.int8) for tau in self.tau.values()]
        majority = sum(int(sign.sum(dtype=torch.int64)) for sign in signs)
        for tau, sign in zip(self.tau.values(), signs, strict=True):
            sign[sign == 0] = (majority > 0) - (majority < 0)
            for row in tau:
                row[row.sign() != sign] = 0

    def to_device(self, device: torch.device) -> Mixture:
        """Move everything; the mixing then happens there."""
        self.theta0 = {name: t.to(device) for name, t in self.theta0.items()}
        self.tau = {name: t.to(device) for name, t in self.tau.items()}
        self.coefficients.data = self.coefficients.data.to(device)
        return self

    def _wide(self, name: str) -> Tensor:
        """A tensor's task vectors in the coefficients' type, whatever they are kept in.

        In bfloat16 a coefficient would be rounded to two digits before it acts, so that its small
        steps would be lost. One tensor at a time: the memory of the task vectors does not double.
        """
        tau = self.tau[name]
        return tau.to(torch.promote_types(tau.dtype, self.coefficients.dtype))

    @torch.no_grad()
    def write(self, tower: VisionTower) -> None:
        """Mix into the tower's parameters, in their type."""
        used = self.coefficients.detach().clamp(0, 1)
        if used.dim() == 1:
            used = used[:, None].expand(-1, len(self.tau))
        for index, (name, parameter) in enumerate(tower.mergeable().items()):
            tau = self._wide(name)
            change = (used[:, index].to(tau.dtype) @ tau).view(parameter.shape)
            parameter.data.copy_(self.theta0[name] + change)

    @torch.no_grad()
    def collect_gradient(self, tower: VisionTower) -> None:
        """Turn the gradients of the tower's parameters into the coefficients', and free them.

        d loss / d lambda_tl = <d loss / d theta_l, tau_tl>, zero outside [0, 1] where the clamp
        holds lambda.
        """
        columns = []
        for name, parameter in tower.mergeable().items():
            if parameter.grad is None:
                columns.append(self.coefficients.new_zeros(len(self.coefficients)))
            else:
                tau = self._wide(name)
                columns.append((tau @ parameter.grad.flatten().to(tau.dtype)).to(self.coefficients))
                parameter.grad = None
        gradient = torch.stack(columns, dim=1)
        if self.coefficients.dim() == 1:
            gradient = gradient.sum(dim=1)
        inside = (self.coefficients >= 0) & (self.coefficients <= 1)
        self.coefficients.grad = gradient * inside


def mix(
    pretrained: VisionTower,
    experts: Iterable[VisionTower],
    coefficients: Tensor,
    settings: CoefficientSettings | None = None,
) -> Mixture:
    """Merge experts by coefficients, (tasks) or (tasks, tensors), into ``pretrained``.

    One expert at a time is in memory. The mixture holds no weights if the coefficients are not to
    be trained.

    Raises:
        ConfigError: an expert of another shape.
    """
    settings = settings or CoefficientSettings()
    theta0 = {name: p.detach().clone() for name, p in pretrained.mergeable().items()}
    vectors = (task_vector(expert.mergeable(), theta0) for expert in experts)
    if ties := settings.task_vectors == "ties":
        vectors = (trim(vector, settings.keep) for vector in vectors)
    mixture = Mixture(theta0, vectors, coefficients, getattr(torch, settings.dtype))
    if ties:
        mixture.elect_signs()
    mixture.write(pretrained)
    if not settings.train:  # the coefficients stay for the record
        mixture.theta0, mixture.tau = {}, {}
    return mixture
