"""The pages say what is true: every key is in them, they build, and they need no network."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from conftest import hf_tower, perturbed
from hydra.utils import get_class
from PIL import Image
from safetensors.torch import load_file
from test_command import in_process

from fusion_bench_intervmerge.data import DataSettings
from fusion_bench_intervmerge.interventions.config import InterventionConfig
from fusion_bench_intervmerge.interventions.functions import FUNCTION_NAMES
from fusion_bench_intervmerge.merging import CoefficientSettings
from fusion_bench_intervmerge.model.model import InterventionModel

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "settings.md").read_text()
METHODS = sorted((ROOT / "config" / "method").rglob("*.yaml"))


def test_the_tables_of_the_settings_are_what_the_code_says():
    spec = importlib.util.spec_from_file_location("settings", ROOT / "docs" / "settings.py")
    settings = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(settings)
    assert settings.render(PAGE) == PAGE, "python docs/settings.py writes them anew"


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.stem)
def test_no_page_waits_for_something(page):
    assert not re.search(r"^[A-Z]+$", page.read_text(), re.M)


@pytest.mark.parametrize("file", METHODS, ids=lambda f: f.stem)
def test_every_key_that_a_method_takes_is_on_the_page(file):
    """Read off the code by another way than the page is written."""
    name = file.relative_to(ROOT / "config" / "method").with_suffix("")
    assert f"`method={name}`" in PAGE
    target = yaml.safe_load(file.read_text()).get("_target_")
    if target is None:
        return
    for name in get_class(target).Settings.model_fields:
        assert re.search(rf"method\.{name}\b|^\| `{name}[`.]", PAGE, re.M)


@pytest.mark.parametrize(
    "key",
    [
        *InterventionConfig.model_fields,
        *CoefficientSettings.model_fields,
        *(f"data.{key}" for key in DataSettings.model_fields),
        *FUNCTION_NAMES,
    ],
)
def test_every_nested_key_is_on_the_page(key):
    assert f"\n| `{key}` | " in PAGE


class Fetched(HTMLParser):
    """What a browser fetches for a page."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag in ("script", "img", "iframe", "source"):
            self.found.append(given.get("src") or "")
        if tag == "link" and given.get("rel") != "canonical":
            self.found.append(given.get("href") or "")


def test_the_site_builds_strictly_and_fetches_nothing(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    done = subprocess.run(
        [*command, "--site-dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list(tmp_path.glob("*.html"))
    assert len(pages) > 10
    for page in pages:
        outside = [url for url in Fetched(page.read_text()).found if "//" in url]
        assert not outside, (page.name, outside)
    for sheet in tmp_path.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", sheet.read_text()), sheet.name


# -- docs/own-experts.md -----------------------------------------------------------------------


def test_a_pool_of_ones_own_needs_no_class_names(tmp_path, capfd):
    from fusion_bench_intervmerge.tinyclip.build import ensure_pool

    built = ensure_pool()
    pool = {
        "_target_": "fusion_bench.modelpool.CLIPVisionModelPool",
        "_recursive_": False,
        "processor": str(built / "pretrained"),
        "models": {
            "_pretrained_": str(built / "pretrained"),
            "birds": str(built / "experts" / "digits"),
            "signs": str(built / "experts" / "letters"),
        },
        "test_datasets": {},
    }
    for task in ("birds", "signs"):
        pool["test_datasets"][task] = {
            "_target_": "datasets.load_dataset",
            "path": "imagefolder",
            "data_dir": str(tmp_path / task),
            "split": "test",
        }
        for number in range(6):
            file = tmp_path / task / "test" / f"class{number % 2}" / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((40, 40), 30 + number).convert("RGB").save(file)
    (tmp_path / "modelpool").mkdir()
    (tmp_path / "modelpool" / "my_pool.yaml").write_text(yaml.safe_dump(pool))
    in_process(
        "method=intervmerge",
        "modelpool=my_pool",
        f"hydra.searchpath=[file://{tmp_path}]",  # what --config-dir adds
        f"method.save_to={tmp_path / 'saved'}",
        "fast_dev_run=true",
        folder=tmp_path,
    )
    shown = capfd.readouterr().out
    assert "birds" in shown and "bias, repaired" in shown and "agreement" not in shown
    assert InterventionModel.from_pretrained(tmp_path / "saved").tasks == ["birds", "signs"]


# -- docs/deployment.md ------------------------------------------------------------------------


@pytest.fixture
def model():
    return perturbed(InterventionModel(hf_tower(), ["ants", "bees"], {"attention": {"rank": 2}}))


def test_a_folded_edit_is_two_products_in_anyones_code(model, images, tmp_path):
    model.fold().save_pretrained(tmp_path / "saved")
    edits = load_file(tmp_path / "saved" / "interventions" / "ants.safetensors")
    tower = hf_tower()

    def edit(block):
        def hook(module, args, output):
            W1, W2, b = (edits[f"attention.{block}.{name}"] for name in ("W1", "W2", "b"))
            z = output[0][:, 0]
            z += (z @ W1.T + b) @ W2

        return hook

    for block in range(tower.num_blocks):
        tower.module("attention", block).register_forward_hook(edit(block))
    with torch.no_grad():
        assert torch.allclose(tower.features(images), model.encode(images, "ants"), atol=1e-6)


def test_half_precision_is_one_line(model, images):
    with torch.no_grad():
        full = model.encode(images, "ants")
        model.tower.to(torch.bfloat16)
        half = model.encode(images, ["ants"] * 6 + ["bees"] * 6)
    assert half.dtype == torch.bfloat16
    assert model.edits_of("ants")["attention"]["0"].W1.dtype == torch.float32
    assert torch.allclose(half[:6].float(), full[:6], atol=0.05 * float(full.abs().max()))
