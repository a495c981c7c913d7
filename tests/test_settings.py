"""Settings that cannot be meant are refused in one line, before anything runs."""

from __future__ import annotations

import pickle

import pytest
from conftest import hf_tower

from fusion_bench_intervmerge.config import ConfigError
from fusion_bench_intervmerge.distillation.settings import DistillSettings
from fusion_bench_intervmerge.fusion.algorithm import IntervMergeAlgorithm
from fusion_bench_intervmerge.fusion.comparison import ComparisonAlgorithm
from fusion_bench_intervmerge.fusion.saved import (
    AnalyseInterventionModel,
    LoadInterventionModel,
)
from fusion_bench_intervmerge.fusion.settings import MethodSettings
from fusion_bench_intervmerge.model.model import InterventionModel
from fusion_bench_intervmerge.solving.solve import SolveSettings

ADAM = {"_target_": "torch.optim.Adam"}
INF, NAN = float("inf"), float("nan")
SURGERY = {"interventions": {"output": {"function": "surgery"}}}


def refused(make, **settings):
    with pytest.raises(ConfigError) as error:
        make(**settings)
    assert "\n" not in str(error.value)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stepss": 5}, "stepss: no such setting, did you mean steps?; allowed: interventions,"),
        ({"rank": 4}, "rank: no such setting; allowed: interventions,"),
        ({"steps": 1e12}, "steps: 1000000000000.0; allowed: a whole number, 0 to"),
        ({"steps": True}, "steps: true; allowed: a whole number"),
        ({"steps": "5"}, "steps: '5'; allowed: a whole number"),
        ({"seed": NAN}, "seed: nan; allowed: a whole number"),
        ({"data": 5}, "data: 5; allowed: a mapping"),
        ({"data": {"cache_gb": NAN}}, "data.cache_gb: nan; allowed: a number"),
        ({"data": {"images": 0}}, "data.images: 0; allowed: null, or a whole number, 1 to"),
        ({"coefficients": {"init": INF}}, "coefficients.init: inf; allowed: a number in [0, 1]"),
        ({"coefficients": {"init": [0.1, NAN]}}, "coefficients.init: [0.1, nan]; allowed"),
        ({"coefficients": {"train": "no"}}, "coefficients.train: 'no'; allowed: true, false"),
        ({"compile": 1}, "compile: 1; allowed: true, false"),
        ({"save_to": ""}, "save_to: ''; allowed: null, or the path of a folder"),
        ({"save_to": True}, "save_to: true; allowed: null, or the path of a folder"),
        ({"save_to": "{run}"}, "save_to: '{run}'; allowed: a folder; {log_dir} stands"),
        ({"base": 5}, "base: names no method; allowed: method@method.base="),
        ({"optimizer": None}, "optimizer: null; allowed: a mapping"),
        ({"optimizer": ADAM | {"lr": NAN}}, "optimizer.lr: nan; allowed: finite numbers"),
        ({"optimizer": ADAM | {"betas": [0.9, NAN]}}, "optimizer.betas: [0.9, nan]; allowed"),
        ({"optimizer": ADAM | {"lr": "0.1"}}, "optimizer: "),
        ({"optimizer": ADAM | {"lr": 0}}, "optimizer.lr: 0; allowed: a number in (0, 1000]"),
        ({"optimizer": ADAM | {"l": 1}}, "optimizer: "),
        ({"optimizer": {"_target_": "os.getcwd"}}, "optimizer: "),
        ({"budget": 6192}, "budget: only edits in closed form have one; allowed: null, or a site"),
        ({"budget": 0}, "budget: 0; allowed: null, or a whole number, 1 to"),
        ({"budget": "rank_0"}, "budget: 'rank_0'; allowed: null, or a whole number, 1 to"),
        ({"interventions": None}, "interventions: null; allowed: a mapping"),
        ({"interventions": {"attention": None}}, "interventions: no site is edited; allowed: one"),
        ({"interventions": {"atention": {}}}, "interventions.atention: no such site, did you mean"),
    ],
)
def test_a_method(settings, message):
    told = refused(IntervMergeAlgorithm, **{"interventions": {"attention": {}}, **settings})
    assert told.startswith(message)


@pytest.mark.parametrize(
    ("site", "edit", "message"),
    [
        ("attention", {"rank": True}, "rank: true; allowed: a whole number"),
        ("attention", {"share_tokens": "false"}, "share_tokens: 'false'; allowed: true, false"),
        ("attention", {"part": {"size": 8, "shift": "maybe"}}, "part.shift: 'maybe'; allowed: tr"),
        ("attention", {"part": {"size": True}}, "part.size: true; allowed: a number of entries"),
        ("attention", {"part": {}}, "part.size: is missing; allowed: a number of entries"),
        ("attention", {"part": []}, "part: []; allowed: null, [j, p]"),
        ("attention", {"blocks": [True]}, "blocks: [True]; allowed: all, every_n"),
        ("attention", {"tokens": 1.5}, "tokens: 1.5; allowed: class, first"),
        ("attention", {"init": "zero"}, "init: 'zero'; allowed: reference, identity, regression"),
        ("attention", {"activation": "relux"}, "activation: 'relux'; allowed: null, relu"),
        ("attention", 5, "5; allowed: a mapping with keys of function"),
        ("output", {"blocks": [0]}, "blocks: [0], but the image features have no blocks"),
        ("output", {"tokens": "all"}, "tokens: 'all', but the image features have no tokens"),
        ("output", {"share_tokens": False}, "share_tokens: false, but the image features have"),
    ],
)
def test_an_edit(site, edit, message):
    told = refused(IntervMergeAlgorithm, interventions={site: edit})
    assert told.removeprefix(f"interventions.{site}").lstrip(".: ").startswith(message)


def test_an_edit_without_that_start():
    edit = {"function": "loreft", "activation": "relu", "init": "identity"}
    told = refused(InterventionModel, tower=hf_tower(), tasks=["a"], interventions={"mlp": edit})
    assert told.startswith("interventions.mlp.init: loreft with an activation has no identity")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bases": {}}, "bases: {}; allowed: a FusionBench method or more"),
        ({"bases": {"a": {}}}, "bases.a: names no method"),
        ({"methods": None}, "methods: null; allowed: settings"),
        ({"methods": {"m": {"steps": 5}}}, "methods.m.interventions: null; allowed: a mapping"),
        ({"methods": {"m": SURGERY | {"stepss": 5}}}, "methods.m.stepss: no such setting, did you"),
        ({"methods": {"m": SURGERY | {"data": 5}}}, "methods.m.data: 5; allowed: a mapping"),
        (
            {"methods": {"m": {"interventions": {"output": {"rank": 0}}}}},
            "methods.m.interventions.output.rank: 0; allowed",
        ),
        (
            {"methods": {"m": SURGERY | {"optimizer": ADAM | {"lr": -1}}}},
            "methods.m.optimizer: Invalid learning rate: -1",
        ),
        ({"coefficients": {"b": {}}}, "coefficients.b: no such base; allowed: a"),
        ({"coefficients": {"a": {"init": INF}}}, "coefficients.a.init: inf; allowed"),
        ({"seeds": []}, "seeds: []; allowed: a list of whole numbers"),
        ({"seeds": [1, 1]}, "seeds: [1, 1] names a seed twice"),
        ({"seeds": ["a"]}, "seeds: ['a']; allowed: a list of whole numbers"),
        ({"steps": True}, "steps: true; allowed: null, or a whole number"),
        ({"data": {"spli": "test"}}, "data.spli: no such setting, did you mean split?"),
        ({"references": "no"}, "references: 'no'; allowed: true, false"),
        ({"analyses": 5}, "analyses: 5; allowed: null, all, or a list of agreement"),
        ({"analysis_images": 0}, "analysis_images: 0; allowed: a whole number, 1 to"),
    ],
)
def test_a_comparison(settings, message):
    given = {"bases": {"a": {"_target_": "b"}}, "methods": {"m": SURGERY}, **settings}
    assert refused(ComparisonAlgorithm, **given).startswith(message)


def test_a_saved_models_methods():
    assert "path: is missing; allowed: the path" in refused(LoadInterventionModel)
    assert "drop: 'a'; allowed: a list" in refused(LoadInterventionModel, path="a", drop="a")
    assert "fold: 'no'; allowed" in refused(LoadInterventionModel, path="a", fold="no")
    assert "path: ''; allowed" in refused(AnalyseInterventionModel, path="")
    assert "images: 0; allowed" in refused(AnalyseInterventionModel, path="a", images=0)
    assert "split: 'all'; allowed" in refused(AnalyseInterventionModel, path="a", split="all")
    told = refused(AnalyseInterventionModel, path="a", analyses=[])
    assert "analyses: there is none; allowed: all, or some of agreement" in told


def test_what_can_be_meant_is_taken():
    closed = {"block": {"init": "regression", "tokens": "all"}, "attention": None}
    settings = MethodSettings(
        interventions=closed, budget=6192, steps=0, data={"images": 128}, coefficients={"init": 1}
    )
    assert (settings.budget, settings.steps, settings.data.images) == (6192, 0, 128)
    assert settings.coefficients is not None and settings.coefficients.granularity == "task"
    # what FusionBench's own configs may carry
    IntervMergeAlgorithm({"attention": {}}, _recursive_=False, _usage_="to try", _version_="0.2.33")


def test_distill_and_solve_take_an_object_or_keywords():
    by_keyword = DistillSettings.of(None, {"steps": 5, "batch_size": 4, "data": {"images": 9}})
    assert by_keyword == DistillSettings(steps=5, data={"batch_size": 4, "images": 9})
    whole = MethodSettings(interventions={"block": {"init": "regression"}}, budget=9, steps=5)
    assert DistillSettings.of(whole, {}) is whole and SolveSettings.of(whole, {}).budget == 9
    with pytest.raises(TypeError, match="as an object, and also by keyword: steps"):
        DistillSettings.of(whole, {"steps": 5})
    with pytest.raises(ConfigError, match=r"stepss: no such setting, did you mean steps\?"):
        DistillSettings.of(None, {"stepss": 5})
