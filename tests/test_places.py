"""Where a command runs and what it is given: one line each, before anything is lost."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from commands import compose
from hydra.core.utils import JobReturn
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf
from safetensors import SafetensorError

from fusion_bench_intervmerge.config import ConfigError
from fusion_bench_intervmerge.files import CACHE_VARIABLE
from fusion_bench_intervmerge.fusion import records
from fusion_bench_intervmerge.tinyclip import pools
from hydra_plugins import intervmerge_before_runs
from hydra_plugins.intervmerge_before_runs import BeforeRuns, check_folder, check_pool

# -- settings need no plus, and a mistyped one reaches the method --------------------------------


@pytest.mark.parametrize(
    "words",
    [
        "method=intervmerge method.interventions.mlp.rank=2 method.router.images=5",
        "method=intervmerge method.coefficients.train=false method.stepss=3",
        "method=intervmerge/closed_form method.interventions.block.part.size=8",
        "method=intervmerge/closed_form method.interventions.output.rank=2",
        "method=intervmerge/adamerging method.coefficients.dtype=bfloat16",
        "method=surgery_v2 method.interventions.attention.rank=1",
        "method=intervmerge/load method.path=a method.fol=true",
    ],
)
def test_a_setting_needs_no_plus(words):
    *_, last = words.split()
    key, _, value = last.partition("=")
    assert str(OmegaConf.select(compose(*words.split()), key)).lower() == value


@pytest.mark.parametrize("preset", ["", "/adamerging", "/closed_form"])
def test_a_base_methods_settings_are_hydras_to_check(preset):
    with pytest.raises(ConfigCompositionException, match="scaling_factr"):
        compose(f"method=intervmerge{preset}", "method.base.scaling_factr=1")


# -- before a run --------------------------------------------------------------------------------


def line(call, *args):
    with pytest.raises(SystemExit) as stopped:
        call(*args)
    assert "\n" not in str(stopped.value)
    return str(stopped.value)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    told = line(check_folder, tmp_path / "file" / "run", "path.log_dir")
    assert told.startswith(f"path.log_dir: {tmp_path}/file/run cannot be written (Not a directory)")


def test_a_full_disk(tmp_path, monkeypatch):
    def full(**kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    assert "cannot be written (No space left on device)" in line(check_folder, tmp_path, "a")


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        ("HuggingFaceGPT2ClassificationPool", "holds models of another kind; allowed: pools of"),
        ("Seq2SeqLMPool", "holds models of another kind"),
        ("ResNetForImageClassificationPool", "holds models of another kind"),
        ("ConvNextForImageClassificationPool", "holds models of another kind"),
    ],
)
def test_a_pool_of_no_use(pool, message):
    told = line(check_pool, f"fusion_bench.modelpool.{pool}")
    assert told.startswith(f"modelpool: {pool}") and message in told


def test_a_pool_that_this_python_cannot_import(monkeypatch):
    def fail(module):
        raise ImportError("cannot import name 'override' from 'typing'")

    monkeypatch.setattr(intervmerge_before_runs, "import_module", fail)
    told = line(check_pool, "fusion_bench.modelpool.OpenCLIPVisionModelPool")
    assert told.startswith("modelpool: OpenCLIPVisionModelPool: cannot import name 'override'")
    assert "modelpool=openclip-vit-b32_TA8" in told


@pytest.mark.parametrize(
    "words", ["accelerator=cuda", "precision=half", "strategy=nonsense", "devices=0"]
)
def test_a_device_that_is_not_there(words, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = compose("method=intervmerge", f"fabric.{words}", return_hydra_config=True)
    with pytest.raises(SystemExit, match=r"\Afabric: [^\n]+\Z"):
        BeforeRuns().on_job_start(config=config)


def test_a_jobs_threads_are_not_the_next_ones():
    before, callback = torch.get_num_threads(), BeforeRuns()
    callback.on_job_start(config=OmegaConf.create())
    torch.set_num_threads(before + 1)
    callback.on_job_end(OmegaConf.create(), JobReturn())
    assert torch.get_num_threads() == before


def test_pools_of_use_and_other_methods_pass(tmp_path):
    check_pool("fusion_bench.modelpool.CLIPVisionModelPool")
    check_pool("mine.Pool")
    config = OmegaConf.create(
        {"method": {"_target_": "fusion_bench.A"}, "modelpool": {"_target_": "fusion_bench.B"}}
    )
    BeforeRuns().on_job_start(config=config)


def test_hydra_calls_it():
    callbacks = compose("method=intervmerge", return_hydra_config=True).hydra.callbacks
    assert callbacks.intervmerge._target_.endswith("BeforeRuns")


@pytest.mark.parametrize(
    ("pool", "tasks", "pretrained", "named"),
    [
        ("clip-vit-tiny_TA8", 2, {}, "clip-vit-tiny_TA8"),
        ("CLIPVisionModelPool/a", 2, "openai/clip-vit-base-patch32", "clip-vit-b32_TA8"),
        ("CLIPVisionModelPool/a", 10, "openai/clip-vit-base-patch16", "clip-vit-b16_TALL14"),
        ("CLIPVisionModelPool/a", 18, "openai/clip-vit-large-patch14", "clip-vit-l14_TALL20"),
        ("OpenCLIPVisionModelPool/ViT-B-32_TA8", 8, {}, "openclip-vit-b32_TA8"),
        ("mine/pool", 8, "mine", "..."),
    ],
)
def test_a_hint_names_a_task_pool_that_fits(pool, tasks, pretrained, named, monkeypatch):
    monkeypatch.setattr(records, "hydra_choices", lambda: {"modelpool": pool})
    assert records.fitting_task_pool(["a"] * tasks, pretrained) == named
    if named != "...":
        compose(f"taskpool={named}")


@pytest.mark.parametrize("error", [OSError(28, "No space left"), SafetensorError("No space left")])
def test_a_full_disk_below_the_cache(error, tmp_path, monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(pools, "unpack", fail)
    with pytest.raises(ConfigError, match=rf"^{CACHE_VARIABLE}: .*\(No space left\); allowed: any"):
        pools.ensure_pool()


NO_EXPERTS = re.compile("individual$|mtl$")
NO_IMAGES = re.compile("lora|model_only|control_task|single_|svhn_and_mnist|individual|mtl")


def test_the_table_of_fusionbenchs_clip_pools():
    """docs/own-experts.md says which have experts and test images."""
    (folder,) = find_spec("fusion_bench_config").submodule_search_locations
    for file in sorted(Path(folder, "modelpool").glob("*CLIPVisionModelPool/[!_]*.yaml")):
        pool = compose(f"modelpool={file.parent.name}/{file.stem}").modelpool
        experts = [name for name in pool.models if not name.startswith("_")]
        assert bool(experts) is not bool(NO_EXPERTS.search(file.stem)), file.stem
        assert bool(pool.get("test_datasets")) is not bool(NO_IMAGES.search(file.stem)), file.stem
