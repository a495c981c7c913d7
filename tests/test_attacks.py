"""Files and settings that were tampered with: each is refused in one line, or never looked at.

Hub answers are in test_hub.py and test_missing.py, checkpoints in test_openclip_pools.py, killed
trainings in test_states.py.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import random
import time
from typing import Any

import lightning as L
import pytest
import torch
from conftest import hf_tower, openclip_tower
from fusion_bench.utils import instantiate
from fusion_bench.utils.hydra_utils import initialize_hydra_config
from torch import Tensor

from fusion_bench_intervmerge.config import ArtifactError, ConfigError
from fusion_bench_intervmerge.model import artifact
from fusion_bench_intervmerge.model.model import InterventionModel

TASKS = ["mnist", "svhn", "stanford-cars"]
SITES = {
    "attention": {"function": "loreft", "rank": 2},
    "mlp": {"tokens": "patch", "part": {"size": 8, "shift": True}},
    "output": {"function": "surgery", "rank": 3},
}


def small_model(seed: int = 0, openclip: bool = False) -> InterventionModel:
    tower = (openclip_tower if openclip else hf_tower)(seed, 0.1 * seed)
    torch.manual_seed(seed)
    model = InterventionModel(tower, TASKS, SITES, seed)
    with torch.no_grad():
        for parameter in model.edits.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    model.metadata = {"images": "none", "coefficients": {"coefficients": torch.rand(3)}}
    return model


@torch.no_grad()
def features(model: InterventionModel) -> Tensor:
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(7))
    return torch.cat([model.encode(images, task) for task in (None, *TASKS)])


def put(*path: Any):
    """A change of the entry at a path of keys to the value that comes last."""
    *keys, last, value = path

    def change(config: dict[str, Any]) -> None:
        for key in keys:
            config = config[key]
        config[last] = value

    return change


# --- saved models


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folders = {}
    for family in ("huggingface", "openclip"):
        folders[family] = tmp_path_factory.mktemp(family) / "m"
        small_model(openclip=family == "openclip").save_pretrained(folders[family])
    return folders


def refused(folder) -> None:
    with pytest.raises(ArtifactError) as error:
        InterventionModel.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_no_flipped_bit_is_loaded(saved):
    """In every file but the card, wherever it is."""
    folder, draw = saved["huggingface"], random.Random(0)
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != "README.md")
    for file in files * 2:
        content = file.read_bytes()
        flipped = bytearray(content)
        position = draw.randrange(8 * len(content))
        flipped[position // 8] ^= 1 << position % 8
        try:
            file.write_bytes(flipped)
            refused(folder)
        finally:
            file.write_bytes(content)
    InterventionModel.from_pretrained(folder)


ATTENTION, VISION = ("interventions", "attention"), ("tower", "vision_config")
MALFORMED = {
    "huggingface": [
        *(put("format", value) for value in (0, "2", None, {})),
        *(put("tower", value) for value in (None, [], {"family": "siglip"})),
        *(put("tasks", value) for value in (None, "mnist", [1, 2, 3], ["../../x"], ["unknown"])),
        *(put("interventions", value) for value in (None, "attention", {"head": {}})),
        *(put(*ATTENTION, "rank", value) for value in (0, 10**9, "2", 2.5, None)),
        *(put(*ATTENTION, "function", value) for value in ("reft", None, ["noreft"])),
        *(put(*ATTENTION, key, [99]) for key in ("blocks", "tokens", "activation", "init")),
        *(put("interventions", "mlp", "part", v) for v in ("half", {"size": 10**9}, {"sise": 3})),
        *(put("seed", value) for value in ("0", 1.5, float("nan"))),
        *(put("files", value) for value in (None, {}, {"../../../etc/passwd": "0" * 64})),
        *(put(*VISION, "hidden_size", value) for value in (0, -32, 48, 10**30, "32")),
        *(put(*VISION, "num_hidden_layers", value) for value in (0, 2, 10**9, True)),
        *(put(*VISION, key, 10**9) for key in ("image_size", "intermediate_size")),
        *(put(*VISION, "layer_norm_eps", value) for value in (-1, float("inf"))),
        put("tower", "projection_dim", 17),
        put("unknown", 1),
        lambda config: config.pop("files"),
    ],
    "openclip": [
        *(put("tower", "width", value) for value in (0, 48, 10**9, "32")),
        *(put("tower", "mlp_ratio", value) for value in (0, 1e9, float("nan"))),
        *(put("tower", "mean", value) for value in (None, [0.5], [0.5, 0.5, "0.5"])),
        *(put("tower", key, 3) for key in ("depth", "heads", "quick_gelu")),
    ],
}
RAW = [b"", b"{", b"null", b"\xff\xfe", b"[" * 100_000, b'{"format": 2, "digest": 5}']


@pytest.mark.parametrize("family", MALFORMED)
def test_a_malformed_config_is_refused_in_one_line(family, saved, tmp_path):
    """Though its digest fits."""
    path = saved[family] / "config.json"
    whole = path.read_bytes()
    config = json.loads(whole)
    del config["digest"]
    try:
        for change in MALFORMED[family]:
            changed = copy.deepcopy(config)
            change(changed)
            changed["digest"] = artifact._digest_of_config(changed)
            path.write_text(json.dumps(changed))
            refused(saved[family])
        for content in RAW:
            path.write_bytes(content)
            refused(saved[family])
    finally:
        path.write_bytes(whole)


def test_a_saver_that_is_killed_leaves_a_whole_model(tmp_path):
    folder, draw = tmp_path / "m", random.Random(0)
    models = {seed: small_model(seed) for seed in (1, 2)}
    expected = {seed: features(model) for seed, model in models.items()}
    models[1].save_pretrained(folder)

    def save_on(seed: int) -> None:
        while True:
            models[seed].save_pretrained(folder)

    for seed in (1, 2) * 4:
        saver = multiprocessing.get_context("fork").Process(target=save_on, args=(seed,))
        saver.start()
        time.sleep(draw.uniform(0.03, 0.3))
        saver.kill()
        saver.join()
        loaded = InterventionModel.from_pretrained(folder)
        assert torch.equal(features(loaded), expected[loaded.seed])


# --- settings, as the command line gives them


@pytest.mark.parametrize(
    "override",
    [
        "method.interventions.attention.rank=true",
        "method.interventions.attention.rank=1.5",
        "++method.interventions.attention.part={size: 8, shfit: true}",
        "++method.interventions.attention.blocks=[0.5]",
        "++method.interventions.atention={}",
        "method.data.fraction=nan",
        "method.data.images=0",
        "method.data.batch_size='5'",
        "++method.coefficients={granularity: layers}",
        "method.optimizer.lr=-inf",
        "++method.optimizer._target_=os.getcwd",
        "method.budget=6192",
        "method.steps=1e30",
        "method.seed=null",
        "method.resume=atuo",
        "++method.setps=1",
        "modelpool.seed=-1",
        "modelpool.tasks=[digit]",
        "modelpool.folder=5",
    ],
)
def test_what_a_setting_cannot_be_is_one_line_with_its_key(override):
    key = override.lstrip("+").partition("=")[0]
    with pytest.raises(ConfigError) as error:
        given = ["method=intervmerge", "modelpool=clip-vit-tiny_TA8", "method.resume=never"]
        where = pytest.importorskip("fusion_bench_config").__path__[0]
        config = initialize_hydra_config("fabric_model_fusion", [*given, override], where)
        pool, method = instantiate(config.modelpool), instantiate(config.method)
        method._fabric_instance = L.Fabric(accelerator="cpu", devices=1)
        method.run(pool)
    assert "\n" not in str(error.value)
    assert (
        str(error.value)
        .removeprefix("method.")
        .startswith(key.removeprefix("method.").rpartition(".")[0] or key.removeprefix("method."))
    )
