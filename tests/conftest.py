"""Small real encoders, the published numbers, and a pool of experts that needs no training."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from open_clip.transformer import VisionTransformer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
)

from fusion_bench_intervmerge.encoders import as_tower
from fusion_bench_intervmerge.encoders.base import VisionTower
from fusion_bench_intervmerge.encoders.convert import to_openclip
from fusion_bench_intervmerge.files import CACHE_VARIABLE
from fusion_bench_intervmerge.interventions import functions
from fusion_bench_intervmerge.tinyclip import ensure_pool

TASKS = ["ants", "bees", "cats"]

# Small tensors, and a machine that may be busy: threads that wait for one another cost more.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden() -> dict[str, Tensor]:
    return load_file(Path(__file__).parent / "golden" / "reference.safetensors")


@pytest.fixture
def golden_tower(golden: dict[str, Tensor]) -> Callable[[str], VisionTower]:
    """The published encoders: ``merged`` or ``expert``."""

    def build(which: str) -> VisionTower:
        sizes = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 4, "heads": 4}
        visual = VisionTransformer(**sizes, mlp_ratio=4, output_dim=24).eval()
        prefix = f"encoder.{which}."
        visual.load_state_dict(
            {n.removeprefix(prefix): t for n, t in golden.items() if n.startswith(prefix)}
        )
        return as_tower(visual)

    return build


def hf_tower(seed: int = 0, noise: float = 0.0, dtype: torch.dtype = torch.float32) -> VisionTower:
    """A small Hugging Face tower; with ``noise`` a fine-tuned copy of the one with seed 0."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        projection_dim=16,
    )
    model, projection = CLIPVisionModel(config).eval(), nn.Linear(32, 16, bias=False)
    if noise:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += noise * torch.randn(parameter.shape, generator=generator)
    return as_tower(model.to(dtype), projection.to(dtype))


def openclip_tower(seed: int = 0, noise: float = 0.0) -> VisionTower:
    """The same weights as an OpenCLIP tower."""
    return to_openclip(hf_tower(seed, noise), (0.5,) * 3, (0.5,) * 3)


def dinov2_tower(seed: int = 0, noise: float = 0.0, pooling: str = "class") -> VisionTower:
    """A small DINOv2 tower with two registers and layer scale."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "mlp_ratio": 2}
    places = {"image_size": 32, "patch_size": 8, "num_register_tokens": 2}
    config = Dinov2WithRegistersConfig(**sizes, **places, layerscale_value=0.5)
    model = Dinov2WithRegistersForImageClassification(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        embeddings = model.base_model.embeddings
        for token in (embeddings.cls_token, embeddings.register_tokens):  # they start near zero
            token += 0.5 * torch.randn(token.shape, generator=generator)
        generator.manual_seed(seed)
        for parameter in model.parameters() if noise else ():
            parameter += noise * torch.randn(parameter.shape, generator=generator)
    return as_tower(model if pooling != "class" else model.base_model)


def dinov2_patches_tower(seed: int = 0, noise: float = 0.0) -> VisionTower:
    """The same, as a model for image classification is read."""
    return dinov2_tower(seed, noise, "class and patches")


@pytest.fixture(
    params=[hf_tower, openclip_tower, dinov2_tower], ids=["huggingface", "openclip", "dinov2"]
)
def make_tower(request: pytest.FixtureRequest) -> Callable[..., VisionTower]:
    return request.param


def fine_tuned(make) -> dict[str, Callable[[], VisionTower]]:
    return {t: lambda s=s: make(s, noise=0.05) for s, t in enumerate(TASKS, start=1)}


@pytest.fixture
def experts() -> dict[str, Callable[[], VisionTower]]:
    return fine_tuned(hf_tower)


@pytest.fixture
def own_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forms of edit that a test defines are forgotten after it."""
    monkeypatch.setattr(functions, "FUNCTIONS", dict(functions.FUNCTIONS))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def datasets() -> dict[str, Tensor]:
    return {
        task: torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        for seed, task in enumerate(TASKS)
    }


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder with the tiny pool in it, and nothing of earlier runs."""
    pool = ensure_pool()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / pool.name).symlink_to(pool)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def relative(value: Tensor, reference: Tensor) -> float:
    """Largest deviation, relative to the reference's largest entry."""
    return float(((value - reference).abs().max() / reference.abs().max()).detach())


def section(where: str) -> str:
    """A page of docs/, or of ``page.md#Heading`` the text below that heading."""
    page, _, heading = where.partition("#")
    text = (Path(__file__).parents[1] / "docs" / page).read_text()
    return (
        re.split(r"^## ", text.partition(f"\n## {heading}\n")[2], flags=re.M)[0]
        if heading
        else text
    )


def blocks(where: str, language: str = "") -> list[str]:
    """The code blocks of one language in a page of docs/, or in one section of it."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", section(where), re.M | re.S)
    return [block for said, block in found if said == language]


def acts(before: Tensor, after: Tensor) -> bool:
    """Whether an edit moves what it is given: where it does not, every formula would agree."""
    return float((after - before).abs().max()) > 0.1


def perturbed(model):
    """The model with edits moved away from their starting values."""
    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in moved.edits.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return moved
