"""The mixture of task vectors: theta0 + sum over tasks of lambda * tau.

lambda is one coefficient a task (Task Arithmetic), or one a task and parameter tensor (AdaMerging,
arXiv 2310.02575; section 3.1 of the IntervMerge paper).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..encoders import VisionTower
from ..errors import ConfigError
from .coefficients import CoefficientSettings
from .task_vector import TaskVector


class Mixture(nn.Module):
    """Merged weights as a function of coefficients that can be trained.

    The weights are mixed once a step, in place, on whatever device they live on. The coefficients'
    gradient is the inner product of a weight's gradient with each task vector, so that no copy of
    the weights needs a gradient of its own.

    Args:
        pretrained: theta0, a tensor a parameter by name, in ``named_parameters()`` order.
        task_vectors: tau_t, one a task.
        coefficients: (tasks) or (tasks, tensors).
        dtype: in which the task vectors are kept; bfloat16 halves their memory. They are mixed in
            fp32 at least.

    Raises:
        ConfigError: coefficients of a shape that does not fit.
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
            for name, tensor in vector.tensors.items():
                self.tau[name][task] = tensor.flatten()
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
    """Merge experts by coefficients.

    Args:
        pretrained: what the experts started from; the merged weights are written into it.
        experts: one is looked at at a time.
        coefficients: where they start, (tasks) or (tasks, tensors).
        settings: which task vectors, how they are kept, and whether the coefficients are to be
            trained; ``CoefficientSettings()`` by default.

    Returns:
        The mixture; it holds no weights where the coefficients are not to be trained.

    Raises:
        ConfigError: an expert of another shape, or coefficients that do not fit.
    """
    settings = settings or CoefficientSettings()
    theta0 = {name: p.detach().clone() for name, p in pretrained.mergeable().items()}
    vectors = (TaskVector.between(expert.mergeable(), theta0) for expert in experts)
    ties = settings.task_vectors == "ties"
    trimmed = (vector.trim(settings.keep) if ties else vector for vector in vectors)
    mixture = Mixture(theta0, trimmed, coefficients, getattr(torch, settings.dtype))
    if ties:
        mixture.elect_signs()
    mixture.write(pretrained)
    if not settings.train:  # the coefficients stay for the record
        mixture.theta0, mixture.tau = {}, {}
    return mixture
