"""Reads encoders and heads: safetensors, state dicts, and the task-vectors paper's pickles.

The paper's checkpoints are whole modules, pickled under open_clip 2.0.2 and classes of the paper's
own code. Unpickling runs whatever a file asks for, so they are read by
:mod:`fusion_bench_intervmerge.pickles`, which runs nothing: a file may name the classes listed
here, and an object of one is nothing but its attributes. The tensors are taken out of these,
converted to safetensors once, and read from there the next time.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from fusion_bench.models.open_clip import ClassificationHead
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ...config import ConfigError
from ...encoders import as_tower
from ...encoders.openclip import OpenCLIPTower
from ...files import cache_root, whole_file
from ...pickles import ForbiddenName, StandIn, View, copy_out, read
from .encoder import ImageEncoder, fitting_spec, named_spec, told_spec

NO_DOWNLOAD = "modelpool=openclip-vit-mini_TA8, which needs no download"


def load_encoder(
    path: str | Path, model_name: str | None = None, *, where: str = "path"
) -> ImageEncoder:
    """Read an encoder.

    Args:
        path: a ``.safetensors`` file, a state dict, or a pickled module. The tensors are called
            ``model.visual.*`` (or ``visual.*``); others are left out.
        model_name: its architecture, in OpenCLIP's words. Files written by ``save_encoder`` know
            theirs; others without a name are taken for one of OpenAI's vision transformers.
        where: the config key that named the file.

    Raises:
        ConfigError: the file is missing, asks for a class that does not belong in a checkpoint,
            or holds no such encoder.
    """
    file = _read(Path(path), where)
    spec = None if model_name is None else named_spec(model_name, where)
    weights = {
        name.removeprefix("model."): tensor
        for name, tensor in file.tensors.items()
        if name.startswith("model.visual.")
    }
    try:
        if spec is None:
            spec = fitting_spec(weights)
            if "spec" in file.metadata:
                spec = told_spec(file.metadata["spec"], spec)
        with torch.device("meta"):  # no time, and no random numbers, for weights to be replaced
            tower = OpenCLIPTower.from_spec(spec)
        if _shapes(tower.weights()) == _shapes(weights):  # else loading says what does not fit
            tower.to_empty(device="cpu")
        tower.load_weights(weights)
    except (LookupError, ValueError, ArithmeticError, TypeError, RuntimeError) as error:
        wanted = model_name or "vision transformer"
        why = f"lacks {error}" if isinstance(error, KeyError) else str(error).partition("\n")[0]
        raise ConfigError(where, f"{path} holds no {wanted} ({why})", NO_DOWNLOAD) from None
    return ImageEncoder(tower)


def load_head(path: str | Path, *, where: str = "path") -> ClassificationHead:
    """Read a classification head.

    Args:
        path: as for ``load_encoder``; the tensors are ``weight`` (classes, projection_dim) and, if
            there is one, ``bias``. Features are normalised before it, as everywhere in the paper,
            unless the file says otherwise.
        where: the config key that named the file.

    Raises:
        ConfigError: as for ``load_encoder``.
    """
    file = _read(Path(path), where)
    weight, bias = file.tensors.get("weight"), file.tensors.get("bias")
    if (
        weight is None
        or weight.dim() != 2
        or weight.numel() == 0
        or not weight.is_floating_point()
        or (bias is not None and bias.shape != weight.shape[:1])
        or (bias is not None and not bias.is_floating_point())
    ):
        raise ConfigError(where, f"{path} holds no classification head", NO_DOWNLOAD)
    normalize = file.metadata.get("normalize", "true")
    if normalize not in ("true", "false"):
        raise ConfigError(where, f"{path} says normalize: {normalize[:40]!r}", "true, false")
    return ClassificationHead(normalize == "true", weight, bias)  # type: ignore[arg-type]


def save_encoder(encoder: nn.Module, path: str | Path) -> None:
    """Write an OpenCLIP encoder's vision tower to a safetensors file that ``load_encoder`` reads.

    Args:
        encoder: anything ``as_tower`` takes for an OpenCLIP tower.
        path: gets the suffix ``.safetensors`` where it has another.
    """
    tower = as_tower(encoder)
    tensors = {f"model.{name}": tensor for name, tensor in tower.weights().items()}
    path = Path(path)
    if path.suffix != ".safetensors":
        path = path.with_name(path.name + ".safetensors")
    _write(path, _File(tensors, {"spec": json.dumps(tower.spec())}))


# -- files -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    """What is kept of a checkpoint: tensors by name, and strings by name."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _read(path: Path, where: str) -> _File:
    if not path.is_file():
        allowed = f"a checkpoint that is there, or {NO_DOWNLOAD}"
        raise ConfigError(where, f"no file {path}", allowed)
    if path.suffix != ".safetensors":
        converted = cache_root() / "openclip" / f"{_sha256(path)}.safetensors"
        try:
            return _read_safetensors(converted)
        except (SafetensorError, OSError):  # not there yet, or torn
            _write(converted, _convert(path, where))
        path = converted
    try:
        return _read_safetensors(path)
    # There are many ways to be broken, each with an exception of its own.
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(where, f"{path} cannot be read ({reason})", NO_DOWNLOAD) from None


def _read_safetensors(path: Path) -> _File:
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        return _File({name: file.get_tensor(name) for name in names}, file.metadata() or {})


def _write(path: Path, file: _File) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in file.tensors.items()}
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", **file.metadata})
        temporary.chmod(0o644)


def _sha256(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            sha.update(chunk)
    return sha.hexdigest()


def _convert(path: Path, where: str) -> _File:
    allowed = f"a CLIP checkpoint, or {NO_DOWNLOAD}"
    try:
        return _kept(read(path, _NAMES), path.stat().st_size)
    except ForbiddenName as error:
        reason = f"{error}, which does not belong in a checkpoint, and was not unpickled"
    # There are many ways to be broken, each with an exception of its own.
    except Exception as error:
        said = f": {error}" if isinstance(error, pickle.UnpicklingError) else ""
        reason = f"cannot be read ({type(error).__name__}{said.splitlines()[0] if said else ''})"
    raise ConfigError(where, f"{path} {reason}", allowed)


def _kept(unpickled: object, limit: int) -> _File:
    """The vision tower of an encoder under the paper's names, or all of a head."""
    views = dict(_named_views(unpickled))
    vision = {
        f"model.{name.removeprefix('model.')}": view
        for name, view in views.items()
        if name.startswith(("model.visual.", "visual."))
    }
    if vision:
        return _File(copy_out(vision, limit))
    attributes = unpickled.state if isinstance(unpickled, StandIn) else {}
    normalize = attributes.get("normalize", True) is not False
    return _File(copy_out(views, limit), {"normalize": json.dumps(normalize)})


def _named_views(unpickled: object) -> Iterator[tuple[str, View]]:
    """The tensors of a state dict, or of a module that came as a stand-in, each module once."""
    seen: set[int] = set()
    modules: list[tuple[str, object]] = [("", unpickled)]
    while modules:
        prefix, module = modules.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, StandIn):
            own, buffers, inside = (
                module.state.get(key) or {} for key in ("_parameters", "_buffers", "_modules")
            )
            state: Mapping[str, object] = {**own, **buffers}
            modules.extend((f"{prefix}{name}.", child) for name, child in inside.items())
        else:
            state = module if isinstance(module, Mapping) and not prefix else {}
        for name, value in state.items():
            if isinstance(value, View):
                yield f"{prefix}{name}", value


# -- pickles ---------------------------------------------------------------------------------------

_OLD_CLASSES = {
    "src.modeling": "ImageEncoder ClassificationHead",
    "open_clip.model": "CLIP LayerNorm QuickGELU ResidualAttentionBlock Transformer "
    "VisualTransformer",
    "open_clip.transform": "_convert_to_rgb MaybeConvertMode MaybeToTensor",
    # FusionBench's copy of the paper's classes, and what later releases of open_clip renamed
    "fusion_bench.models.open_clip.modeling": "ImageEncoder ClassificationHead",
    "open_clip.transformer": "LayerNorm QuickGELU ResidualAttentionBlock Transformer "
    "VisionTransformer",
    "torch.nn.modules.activation": "GELU MultiheadAttention",
    "torch.nn.modules.container": "ModuleList Sequential",
    "torch.nn.modules.conv": "Conv2d",
    "torch.nn.modules.linear": "Identity Linear NonDynamicallyQuantizableLinear _LinearWithBias",
    "torch.nn.modules.sparse": "Embedding",
    "torchvision.transforms.functional": "InterpolationMode",
    "torchvision.transforms.transforms": "CenterCrop Compose Normalize RandomResizedCrop Resize "
    "ToTensor",
}
_NAMES = frozenset(
    f"{module}.{name}" for module, names in _OLD_CLASSES.items() for name in names.split()
)
