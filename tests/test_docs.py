"""The pages say what is true: keys, links and commands are there, code runs, the site builds."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from conftest import blocks, hf_tower, perturbed
from fusion_bench.tasks.clip_classification import (
    CLIPTemplateFactory,
    get_classnames_and_templates,
)
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_class
from PIL import Image
from safetensors.torch import load_file
from test_command import in_process

from fusion_bench_intervmerge.data import DataSettings
from fusion_bench_intervmerge.interventions.config import InterventionConfig
from fusion_bench_intervmerge.interventions.functions import FUNCTIONS
from fusion_bench_intervmerge.merging import CoefficientSettings
from fusion_bench_intervmerge.model.model import InterventionModel
from fusion_bench_intervmerge.report.answers import read_answers

ROOT = Path(__file__).parents[1]
SETTINGS = (ROOT / "docs" / "settings.md").read_text()
PACKAGE = ROOT / "fusion_bench_intervmerge"
METHODS = sorted((ROOT / "config" / "method").rglob("*.yaml"))
PAGES = [
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
    *sorted(ROOT.glob("*.md")),
]


# -- settings ----------------------------------------------------------------------------------


def test_the_tables_of_the_settings_are_what_the_code_says():
    spec = importlib.util.spec_from_file_location("settings", ROOT / "docs" / "settings.py")
    settings = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(settings)
    assert settings.render(SETTINGS) == SETTINGS, "python docs/settings.py writes them anew"


def test_every_setting_is_on_the_page():
    """Read off the code by another way than the page is written."""
    for file in METHODS:
        name = file.relative_to(ROOT / "config" / "method").with_suffix("")
        assert f"`method={name}`" in SETTINGS
        target = yaml.safe_load(file.read_text()).get("_target_")
        for key in get_class(target).Settings.model_fields if target else ():
            assert re.search(rf"method\.{key}\b|^\| `{key}[`.]", SETTINGS, re.M), (name, key)
    for key in (
        *InterventionConfig.model_fields,
        *CoefficientSettings.model_fields,
        *(f"data.{key}" for key in DataSettings.model_fields),
        *FUNCTIONS,
    ):
        assert f"\n| `{key}` | " in SETTINGS, key


# -- commands ----------------------------------------------------------------------------------


def commands(text: str) -> Iterator[list[str]]:
    """What follows ``fusion_bench`` in blocks and in lines; a line's ``method=X`` is one, too."""
    fence = re.compile(r"^```\w*\n(.*?)^```$", re.M | re.S)
    for block in fence.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("fusion_bench "):
                yield shlex.split(line, comments=True)[1:]
    for line in re.findall(r"`([^`]+)`", fence.sub("", text)):
        words = " ".join(line.split())
        if re.match(r"(fusion_bench .*)?(method=|\+experiment=)", words) and "..." not in words:
            yield shlex.split(words.removeprefix("fusion_bench "))


def single_runs(words: list[str]) -> list[str]:
    """A command with the first of every choice: composing knows no sweeps."""
    parsed = OverridesParser.create().parse_overrides(words)
    return [
        f"{one.get_key_element()}={next(iter(one.sweep_string_iterator()))}"
        if one.is_sweep_override()
        else one.input_line
        for one in parsed
    ]


def test_every_command_on_every_page_composes(tmp_path):
    (pool,) = blocks("own-experts.md", "yaml")
    (tmp_path / "modelpool").mkdir()
    (tmp_path / "modelpool" / "my_pool.yaml").write_text(pool)
    shown = {
        tuple(words)
        for page in PAGES
        for words in commands(
            re.sub(r"<!-- begin.*?<!-- end -->", "", page.read_text(), flags=re.S)
        )
        if not re.search("NAME|KEY", " ".join(words))
    }
    assert len(shown) > 40
    wrong = []
    (folder,) = importlib.util.find_spec("fusion_bench_config").submodule_search_locations
    with initialize_config_dir(folder, version_base=None):
        for words in sorted(shown):
            said = single_runs([w for w in words if "=" in w or w.startswith("~")])
            if "--config-dir" in words:
                said.append(f"hydra.searchpath=[file://{tmp_path}]")
            try:
                compose("fabric_model_fusion", said, return_hydra_config=True)
            except Exception as error:  # all of them are shown together
                wrong.append(f"fusion_bench {shlex.join(words)}: {error}")
    assert not wrong, "\n".join(wrong)


# -- pages -------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """What mkdocs makes of the headings."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), re.M
    )
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", h).strip().lower()) for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere_and_code_is_code(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if re.match(r"\w+://", path):
            continue
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    for path in re.findall(
        r"`(?:python |pytest |bash )?([a-z_]+/[a-z0-9_/.-]+\.(?:py|sh|md|yaml))\b", text
    ):
        assert any((home / path).exists() for home in (ROOT, PACKAGE)), path
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
        if language == "python":
            compile(block, str(page), "exec")
        if language == "yaml":
            assert yaml.safe_load(block)


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
    assert len(pages) >= 10
    for page in pages:
        outside = [url for url in Fetched(page.read_text()).found if "//" in url]
        assert not outside, (page.name, outside)
    for sheet in tmp_path.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", sheet.read_text()), sheet.name


# -- docs/own-experts.md -----------------------------------------------------------------------


def test_a_pool_of_ones_own_needs_no_class_names_and_is_evaluated_with_the_data_sets(
    tmp_path, capfd
):
    from fusion_bench_intervmerge.tinyclip import ensure_pool

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
    done = in_process(
        "method=intervmerge/closed_form",
        "modelpool=my_pool",
        "taskpool=own",
        "taskpool.classes={signs: {names: [one, two], templates: ['the number {}']}}",
        f"hydra.searchpath=[file://{tmp_path}]",
        folder=tmp_path / "own",
    )
    answers = read_answers(tmp_path / "own" / "log")
    assert answers.classes["birds"] == ["class0", "class1"]
    right = answers.right(next(n for n in answers.models if "/" in n), "birds")
    assert len(right) == 6 and done["report"]["birds"]["accuracy"] == pytest.approx(right.mean())
    assert answers.labels["birds"].tolist() == [0, 0, 0, 1, 1, 1]
    names, templates = get_classnames_and_templates("signs")
    assert [names, templates[0]("one")] == [["one", "two"], "the number one"]
    assert get_classnames_and_templates("birds")[0] == ["class0", "class1"]
    CLIPTemplateFactory._dataset_mapping.pop("birds")
    CLIPTemplateFactory._dataset_mapping.pop("signs")


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
    assert model.edits_of("ants")["attention 0"].W1.dtype == torch.float32
    assert torch.allclose(half[:6].float(), full[:6], atol=0.05 * float(full.abs().max()))
