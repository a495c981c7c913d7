"""Encoders and heads of the task-vectors paper: safetensors, state dicts, and whole modules.

The paper's checkpoints are whole modules, saved under open_clip 2.0.2 and classes of the paper's
own code. They are read by ``torch.load(weights_only=True)`` with stand-ins under the old names, so
that nothing of the file runs: an object is nothing but its attributes, and a file that asks for
another class is refused. Only the tensors are taken.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from math import isqrt
from pathlib import Path
from typing import Any

import open_clip
import torch
from fusion_bench.models.open_clip import ClassificationHead
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ...config import ConfigError, Json
from ...encoders import as_tower
from ...encoders.openclip import MEAN, STD, OpenCLIPTower
from ...files import atomic_file

NO_DOWNLOAD = "modelpool=openclip-vit-mini_TA8, which needs no download"
# OpenAI's vision transformers, which the paper fine-tuned, all have heads of this width.
HEAD_WIDTH = 64
# OpenAI trained with QuickGELU; OpenCLIP's configs say so only under names of their own.
_OPENAI: Json = {"family": "openclip", "quick_gelu": True, "mean": list(MEAN), "std": list(STD)}

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


class ImageEncoder(nn.Module):
    """An OpenCLIP vision transformer under the names of the task-vectors paper's ``ImageEncoder``.

    Every tensor is called ``model.visual.*``. The paper's encoders also carry leftovers of the text
    tower, which no image passes through and no fine-tuning changed. They are left out: methods
    that count parameters (the trimming of Ties) or list them (AdaMerging's coefficients) then count
    and list the vision tower alone.

    Attributes:
        train_preprocess, val_preprocess: PIL image -> (3, image_size, image_size).
    """

    def __init__(self, tower: OpenCLIPTower):
        super().__init__()
        self.model: Any = nn.Module()
        self.model.visual = tower.visual
        self.train_preprocess = tower.train_preprocess
        self.val_preprocess = tower.val_preprocess

    def forward(self, images: Tensor) -> Tensor:
        """Images (batch, 3, image_size, image_size) -> image features (batch, projection_dim)."""
        features: Tensor = self.model.visual(images)
        return features


def load_encoder(
    path: str | Path, model_name: str | None = None, *, where: str = "path"
) -> ImageEncoder:
    """Read an encoder.

    Args:
        path: a ``.safetensors`` file, or a state dict or module by ``torch.save``. The tensors are
            called ``model.visual.*`` (or ``visual.*``); others are left out.
        model_name: its architecture, in OpenCLIP's words. Files by ``save_encoder`` hold theirs;
            others are taken for one of OpenAI's vision transformers.
        where: the config key that named the file.

    Raises:
        ConfigError: the file is missing, asks for a class that does not belong in a checkpoint,
            or does not hold such an encoder.
    """
    tensors, about = _read(Path(path), where)
    spec = None if model_name is None else named_spec(model_name, where)
    weights = {
        "visual." + name.removeprefix("model.").removeprefix("visual."): tensor
        for name, tensor in tensors.items()
        if name.startswith(("model.visual.", "visual."))
    }
    try:
        spec = spec or (json.loads(about["spec"]) if "spec" in about else fitting_spec(weights))
        with torch.device("meta"):  # no time, and no random numbers, for weights to be replaced
            tower = OpenCLIPTower.from_spec(spec)
        shapes, given = (
            {name: tensor.shape for name, tensor in tensors.items()}
            for tensors in (tower.weights(), weights)
        )
        if shapes == given:  # if not, loading says what does not fit
            tower.to_empty(device="cpu")
        tower.load_weights(weights)
    except (LookupError, ValueError, ArithmeticError, TypeError, RuntimeError, AssertionError) as e:
        wanted = model_name or "vision transformer"
        why = f"lacks {e}" if isinstance(e, KeyError) else str(e).partition("\n")[0]
        raise ConfigError(where, f"{path} does not hold a {wanted} ({why})", NO_DOWNLOAD) from None
    return ImageEncoder(tower)


def load_head(path: str | Path, *, where: str = "path") -> ClassificationHead:
    """Read a classification head; arguments and errors as in ``load_encoder``.

    The tensors are ``weight`` (classes, projection_dim) and perhaps ``bias``. Features are
    normalised before it, as everywhere in the paper, unless the file says otherwise.
    """
    tensors, about = _read(Path(path), where)
    weight, bias = tensors.get("weight"), tensors.get("bias")
    fits = weight is not None and weight.dim() == 2 and weight.is_floating_point()
    if weight is None or not fits or (bias is not None and bias.shape != weight.shape[:1]):
        raise ConfigError(where, f"{path} does not hold a classification head", NO_DOWNLOAD)
    host: Any = ClassificationHead  # whose annotations want a bias
    head: ClassificationHead = host(about.get("normalize", "").lower() != "false", weight, bias)
    return head


def save_encoder(encoder: nn.Module, path: str | Path) -> None:
    """Write an encoder's vision tower to a safetensors file that ``load_encoder`` reads.

    Args:
        encoder: anything that ``as_tower`` takes for an OpenCLIP tower.
        path: gets the suffix ``.safetensors`` if it has another.
    """
    tower = as_tower(encoder)
    tensors = {f"model.{n}": t.detach().cpu().contiguous() for n, t in tower.weights().items()}
    path = Path(path)
    if path.suffix != ".safetensors":
        path = path.with_name(path.name + ".safetensors")
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, {"format": "pt", "spec": json.dumps(tower.spec())})


def named_spec(model_name: str, where: str) -> Json:
    """``OpenCLIPTower.from_spec``'s sizes of one of OpenCLIP's plain vision transformers.

    Raises:
        ConfigError: OpenCLIP knows no such architecture, or it is not a plain transformer.
    """
    config = open_clip.get_model_config(model_name) or {}
    vision = config.get("vision_cfg", {})
    plain = {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"}
    if not plain.issuperset(vision) or not isinstance(vision.get("layers"), int):
        names = "ViT-B-32, ViT-B-16, ViT-L-14, or OpenCLIP's name of another plain ViT"
        raise ConfigError(where, f"no vision transformer is called {model_name!r}", names)
    sizes = {"head_width": HEAD_WIDTH, "mlp_ratio": 4.0, "output_dim": config["embed_dim"]}
    sizes |= vision
    heads = sizes["width"] // sizes.pop("head_width")
    return _OPENAI | sizes | {"heads": heads}


def fitting_spec(weights: Mapping[str, Tensor]) -> Json:
    """The sizes of an OpenAI vision transformer with these tensors, called ``visual.*``.

    Raises:
        LookupError, ValueError, ArithmeticError: these are not a vision transformer's tensors.
    """
    width, _, _, patch_size = weights["visual.conv1.weight"].shape
    tokens = weights["visual.positional_embedding"].shape[0]
    hidden = weights["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
    return _OPENAI | {
        "image_size": patch_size * isqrt(tokens - 1),
        "patch_size": patch_size,
        "width": width,
        "layers": len({n.split(".")[3] for n in weights if ".transformer.resblocks." in n}),
        "heads": max(1, width // HEAD_WIDTH),
        "mlp_ratio": hidden / width,
        "output_dim": weights["visual.proj"].shape[1],
    }


class _StandIn:
    """An object of a listed class: its attributes, and nothing else."""

    def __init__(self, *arguments: object):
        pass

    def __new__(cls, *arguments: object) -> Any:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            vars(self).update(state)


def _read(path: Path, where: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A checkpoint's tensors by name, and what else is known of it."""
    if not path.is_file():
        allowed = f"a checkpoint that is there, or {NO_DOWNLOAD}"
        raise ConfigError(where, f"no file {path}", allowed)
    allowed = f"a CLIP checkpoint, or {NO_DOWNLOAD}"
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {n: file.get_tensor(n) for n in file.keys()}, file.metadata() or {}  # noqa: SIM118
        classes = [f"{module}.{n}" for module, ns in _OLD_CLASSES.items() for n in ns.split()]
        stand_ins: list[Any] = [(_StandIn, name) for name in classes]
        with torch.serialization.safe_globals(stand_ins):
            content = torch.load(path, "cpu", weights_only=True)
        about = {"normalize": str(getattr(content, "normalize", True))}
        return dict(_named_tensors(content)), about
    # There are many ways to be broken, each with an exception of its own.
    except Exception as error:
        reason, asked = str(error).partition("\n")[0], re.search(r"GLOBAL (\S+)", str(error))
        if asked is not None and asked[1] == "torch.storage._load_from_bytes":
            reason = "was written by pickle.dump"
            allowed = "torch.save(pickle.load(open(path, 'rb')), path), if you trust the file"
        elif asked is not None:
            reason = f"asks for {asked[1]}, which does not belong in a checkpoint"
        raise ConfigError(where, f"{path} cannot be read ({reason})", allowed) from None


def _named_tensors(content: object, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a state dict, or of a module that came as a stand-in."""
    if isinstance(content, Mapping):
        yield from ((n, t) for n, t in content.items() if isinstance(t, Tensor))
    elif isinstance(content, _StandIn):
        state = {key: value or {} for key, value in vars(content).items()}
        own = {**state.get("_parameters", {}), **state.get("_buffers", {})}
        yield from ((f"{prefix}{n}", t.detach()) for n, t in own.items() if isinstance(t, Tensor))
        for name, child in state.get("_modules", {}).items():
            if isinstance(child, _StandIn):
                yield from _named_tensors(child, f"{prefix}{name}.")
