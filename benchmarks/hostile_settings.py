"""Settings that cannot be meant, through the door that the command opens: ``python
benchmarks/hostile_settings.py``.

Every key of every method and of the embedded pool gets values of other types, numbers out of range,
names that nearly are keys and names that are none. Each case is composed by Hydra, instantiated as
FusionBench does, and run on a pool of tiny random encoders up to the training, where a setting that
got so far counts as accepted. Ten of them then go through the real command.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

BAD = {
    "text": "abc",
    "empty": "''",
    "null": "null",
    "true": "true",
    "nan": "nan",
    "inf": "inf",
    "-inf": "-inf",
    "negative": "-1",
    "huge": "1e30",
    "huge whole": str(10**30),
    "text of a number": "'5'",
    "text of a truth": "'false'",
    "list": "[abc]",
    "empty list": "[]",
    "mapping": "{abc: 1}",
    "empty mapping": "{}",
}
WHOLE = {"fraction": "1.5", "share": "0.5"}
PATHS = {"text", "text of a number", "text of a truth"}
NULL = {"null"}
MAPPINGS = {"null", "empty mapping"}
ANALYSES = {"null", "empty list"}

# Key -> (what of BAD can be meant, more that cannot). Hydra merges a mapping into the one that is
# there, so that an empty one changes nothing.
EDIT: dict[str, tuple[set[str], dict[str, str]]] = {
    "function": (set(), {"near": "noref"}),
    "rank": (set(), WHOLE | {"zero": "0", "wide": "33"}),
    "blocks": (
        set(),
        {"none": "every_0", "near": "al", "far": "[3]", "twice": "[1,1]", "share": "[0.5]"}
        | {"truth": "[true]", "many": "first_4", "nested": "[[0]]"},
    ),
    "tokens": (
        set(),
        {"near": "cls", "far": "[17]", "twice": "[1,1]", "share": "[0.5]", "below": "[-1]"}
        | {"truth": "[true]", "nested": "[[0]]"},
    ),
    "part": (
        NULL,
        {"far": "[16,64]", "nothing": "[8,8]", "back": "[8,4]", "three": "[1,2,3]", "one": "[4]"}
        | {"overlap": "[[0,8],[4,12]]", "shares": "[0.0,0.5]", "truths": "[false,true]"}
        | {"no size": "{start: 0}", "near": "{size: 8, shfit: true}"}
        | {f"size {k}": f"{{size: {v}}}" for k, v in BAD.items()}
        | {"size zero": "{size: 0}", "size none": "{size: 0.0}", "size wide": "{size: 33}"}
        | {f"start {k}": f"{{size: 8, start: {v}}}" for k, v in BAD.items()}
        | {"start end": "{size: 8, start: 1.0}", "start far": "{size: 8, start: 32}"}
        | {f"shift {k}": f"{{size: 8, shift: {v}}}" for k, v in BAD.items() if k != "true"}
        | {"shift maybe": "{size: 8, shift: maybe}", "shift 1": "{size: 8, shift: 1}"},
    ),
    "share_tokens": ({"true"}, {"one": "1"}),
    "activation": (NULL, {"near": "reluu"}),
    "init": (set(), {"near": "referense"}),
}
DATA: dict[str, tuple[set[str], dict[str, str]]] = {
    "split": (set(), {"near": "tset"}),
    "fraction": (set(), {"zero": "0", "more": "1.01"}),
    "images": (NULL, WHOLE | {"zero": "0"}),
    "batch_size": (set(), WHOLE | {"zero": "0"}),
    "num_workers": (set(), WHOLE),
    "cache_gb": (set(), {}),
}
COEFFICIENTS: dict[str, tuple[set[str], dict[str, str]]] = {
    "granularity": (set(), {"near": "layers"}),
    "init": (set(), {"more": "1.5", "nested": "[[0.1,nan]]", "uneven": "[[1],2]"}),
    "train": ({"true"}, {"one": "1"}),
    "task_vectors": (set(), {"near": "tie"}),
    "keep": (set(), {"zero": "0", "more": "1.5"}),
    "dtype": (set(), {"near": "float16"}),
}
METHOD: dict[str, tuple[set[str], dict[str, str]]] = {
    "interventions": ({"empty mapping"}, {"near": "{atention: {}}", "none": "{attention: null}"}),
    "base": ({"mapping", "empty mapping"}, {}),  # a base's own keys are FusionBench's
    "budget": (NULL, WHOLE | {"zero": "0", "trained": "6192", "near": "rank_0"}),
    "coefficients": (MAPPINGS, {}),
    "loss": (set(), {"near": "block"}),
    "data": ({"empty mapping"}, {}),
    "steps": (set(), WHOLE | {"long": "1e12"}),
    "optimizer": ({"empty mapping"}, {}),
    "optimizer._target_": (set(), {"near": "torch.optim.Adan", "other": "os.getcwd"}),
    "optimizer.lr": (set(), {"zero": "0"}),
    "optimizer.betas": (set(), {"one": "[0.9]", "over": "[0.9,1.5]"}),
    "optimizer.fused": ({"true", "null"}, {"one": "1"}),
    "seed": (set(), WHOLE),
    "save_to": (NULL | PATHS, {"near": "'{log_dri}/x'", "brace": "'{'", "blank": "' '"}),
    "resume": (set(), {"near": "atuo"}),
    "save_every": (set(), WHOLE | {"zero": "0"}),
    "compile": ({"true"}, {"one": "1"}),
    "extend": (NULL, {}),
}
COMPARISON: dict[str, tuple[set[str], dict[str, str]]] = {
    "bases": ({"empty mapping"}, {}),
    "methods": ({"empty mapping"}, {}),
    "coefficients": (MAPPINGS, {"near": "{task_arithmetics: {}}"}),
    "seeds": (set(), {"twice": "[0,0]", "share": "[0.5]", "truth": "[true]", "below": "[-1]"}),
    "steps": (NULL, WHOLE),
    "data": (MAPPINGS, {"near": "{spilt: test}", "bad": "{batch_size: true}"}),
    "references": ({"true"}, {"one": "1"}),
    "analyses": (ANALYSES, {"near": "[bais]"}),
    "analysis_images": (set(), WHOLE | {"zero": "0"}),
    "methods.surgery_r16": ({"empty mapping"}, {}),
    "methods.surgery_r16.steps": (set(), WHOLE),
    "methods.surgery_r16.interventions.output.rank": (set(), {"wide": "17"}),
    "methods.surgery_r16.data.fraction": (set(), {}),
}
LOAD: dict[str, tuple[set[str], dict[str, str]]] = {
    "path": (set(), {}),
    "drop": ({"empty list"}, {"near": "[ant]"}),
    "fold": ({"true"}, {"one": "1"}),
}
ANALYSE: dict[str, tuple[set[str], dict[str, str]]] = {
    "path": (set(), {}),
    "analyses": (set(), {"near": "[bais]"}),
    "images": (set(), WHOLE | {"zero": "0"}),
    "split": (set(), {"near": "tset"}),
}
POOL: dict[str, tuple[set[str], dict[str, str]]] = {
    "seed": (set(), WHOLE),
    "tasks": (ANALYSES, {"near": "[digit]"}),
}


def cases() -> list[list[str]]:
    """Each case's overrides, the bad one last."""
    train = ["method=intervmerge"]
    some = [*train, "++method.coefficients={granularity: task}"]
    edit = "method.interventions.attention"
    found = [
        *_values(train, edit, EDIT),
        *_values(train, "method.data", DATA),
        *_values(some, "method.coefficients", COEFFICIENTS),
        *_values(train, "method", METHOD),
        *_values(["method=intervmerge/compare"], "method", COMPARISON),
        *_values(["method=intervmerge/load", "method.path=SAVED"], "method", LOAD),
        *_values(["method=intervmerge/analyse", "method.path=SAVED"], "method", ANALYSE),
        *_values([*train, "modelpool=clip-vit-tiny_TA8"], "modelpool", POOL),
        *([*train, f"++{edit}={BAD[name]}"] for name in BAD if name != "empty mapping"),
        *([*train, f"~method.{key}"] for key in ("interventions",)),
        *([*train, f"+method.{key}=4"] for key in ("rank", "lr", "batch_size", "attention")),
        *([*train, f"+method.interventions.{key}={{}}"] for key in ("head", "attn", "Attention")),
    ]
    # the image features have neither blocks nor tokens
    for key, values in (("blocks", ("[0]", "last_1")), ("tokens", ("all", "patch", "[0]"))):
        found += [["method=surgery", f"+method.interventions.output.{key}={v}"] for v in values]
    found += [["method=surgery", "+method.interventions.output.share_tokens=false"]]
    # functions that do not take it
    found += [
        [*train, f"{edit}.function={function}", f"{edit}.{key}={value}"]
        for function, key, value in (
            ("consreft", "activation", "relu"),
            ("surgery", "activation", "relu"),
            ("lobireft", "activation", "gelu"),
            ("surgery", "rank", "33"),
        )
    ]
    return found


def _values(
    first: list[str], prefix: str, keys: dict[str, tuple[set[str], dict[str, str]]]
) -> Iterator[list[str]]:
    for key, (meant, more) in keys.items():
        for name, value in (BAD | more).items():
            if name not in meant:
                yield [*first, f"++{prefix}.{key}={value}"]
        if "." not in key:
            for near in (key + key[-1], key[1] + key[0] + key[2:]):
                yield [*first, f"++{prefix}.{near}=1"]
    yield [*first, f"++{prefix}.surely_not=1"]


class Accepted(Exception):
    """A setting that came as far as the training."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--commands", type=int, default=10, help="how many by the real command")
    parser.add_argument("--every", type=int, default=1, help="take one case of so many")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    started = time.perf_counter()
    found = cases()[:: options.every]
    with tempfile.TemporaryDirectory() as folder, Door(Path(folder)) as door:
        outcomes = [door.outcome(overrides) for overrides in found]
    counts = Counter(kind for kind, _ in outcomes)
    for (kind, told), overrides in zip(outcomes, found, strict=True):
        if not kind.startswith("refused"):
            print(f"{kind}: {' '.join(overrides)}: {told}")
    print(f"{len(found)} bad settings in {time.perf_counter() - started:.0f} s")
    for kind in ("refused", "refused by Hydra", "accepted", "other exception"):
        print(f"{kind}: {counts[kind]}")
    if options.commands:
        ours = [o for o, (kind, _) in zip(found, outcomes, strict=True) if kind == "refused"]
        # the embedded encoder is larger than the one above, and no model is saved any more
        sample = [o for o in ours if "SAVED" not in str(o) and "attention." not in o[-1]]
        print(f"through the command: {_through_the_command(sample, options.commands)}")


class Door:
    """What FusionBench does with a configuration, on a pool of tiny random encoders."""

    def __init__(self, folder: Path):
        import lightning
        import torch
        from hydra import compose, initialize_config_dir
        from hydra.core.hydra_config import HydraConfig
        from transformers import CLIPConfig, CLIPModel

        from fusion_bench_intervmerge.encoders import as_tower
        from fusion_bench_intervmerge.fusion import algorithm, analyse, comparison
        from fusion_bench_intervmerge.model.model import InterventionModel
        from fusion_bench_intervmerge.tinyclip import ensure_pool

        small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
        small |= {"num_attention_heads": 4}
        torch.manual_seed(0)
        clip = CLIPModel(
            CLIPConfig(
                text_config={**small, "vocab_size": 64, "max_position_embeddings": 8},
                vision_config={**small, "image_size": 32, "patch_size": 8},
                projection_dim=16,
            )
        ).eval()
        clip.save_pretrained(folder / "clip")
        images: Any = {"_target_": "datasets.Dataset.from_dict", "mapping": {"image": [0] * 8}}
        self._pool = {
            "_target_": "fusion_bench.modelpool.CLIPVisionModelPool",
            "_recursive_": False,
            "models": {name: str(folder / "clip") for name in ("_pretrained_", "ants", "bees")},
            "test_datasets": {"ants": images, "bees": images},
            "processor": str(ensure_pool() / "pretrained"),
        }
        self._saved = folder / "saved"
        edits = {"attention": {"rank": 1}}
        InterventionModel(as_tower(clip), ["ants", "bees"], edits).save_pretrained(self._saved)
        (config_dir,) = find_spec("fusion_bench_config").submodule_search_locations  # type: ignore
        self._undo = ExitStack()
        self._undo.enter_context(initialize_config_dir(config_dir, version_base=None))
        whole = compose(
            "fabric_model_fusion",
            overrides=[f"hydra.runtime.output_dir={folder}"],
            return_hydra_config=True,
        )
        HydraConfig.instance().set_config(whole)
        self._undo.callback(setattr, HydraConfig.instance(), "cfg", None)
        self._fabric = lightning.Fabric(accelerator="cpu", devices=1)

        def stop(*args: Any, **kwargs: Any) -> None:
            raise Accepted("it would have been trained")

        for thing, name in (
            (algorithm, "distill"),
            (comparison, "ExpertPerTask"),
            (analyse.Analyser, "run"),
        ):
            self._undo.enter_context(mock.patch.object(thing, name, stop))

    def __enter__(self) -> Door:
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    def outcome(self, overrides: list[str]) -> tuple[str, str]:
        """``refused``, ``accepted`` or ``other exception``, and what was said."""
        from fusion_bench.utils import instantiate
        from hydra import compose
        from hydra.errors import ConfigCompositionException
        from omegaconf import OmegaConf

        from fusion_bench_intervmerge.config import ArtifactError, ConfigError

        given = [o.replace("SAVED", str(self._saved)) for o in overrides]
        logging.disable(logging.ERROR)
        try:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                config = compose("fabric_model_fusion", overrides=given)
                OmegaConf.resolve(config)
                own = any(o.startswith("modelpool=") for o in given)
                pool = instantiate(config.modelpool if own else OmegaConf.create(self._pool))
                method = instantiate(config.method, _recursive_=False)
                method._fabric_instance = self._fabric
                method.run(pool)
        except (ConfigError, ArtifactError) as error:
            key, _, value = overrides[-1].lstrip("+~").replace("'", "").partition("=")
            told = str(error)
            # an artifact's error starts with the folder that was given
            named = told.startswith((key.rpartition(".")[0] or key, f"{value}: "))
            if "\n" in told or not named:
                return "other exception", f"not one line that names the key: {told}"
            return "refused", told
        except ConfigCompositionException as error:
            return "refused by Hydra", str(error)
        except Accepted as error:
            return "accepted", str(error)
        except Exception as error:
            return "other exception", f"{type(error).__name__}: {error}".splitlines()[0]
        finally:
            logging.disable(logging.NOTSET)
        return "accepted", "it was run"


def _through_the_command(found: list[list[str]], count: int) -> str:
    from command import fusion_bench

    good = 0
    for overrides in found[:: max(1, len(found) // count)][:count]:
        with tempfile.TemporaryDirectory() as folder:
            given = ["modelpool=clip-vit-tiny_TA8", *overrides, "fast_dev_run=true"]
            status, screen = fusion_bench(Path(folder), *given)
        told = [line for line in screen.splitlines() if "; allowed:" in line]
        good += status == 1 and len(told) == 1 and "Traceback" not in screen
        print(f"  {overrides[-1]}: {told[0] if told else screen[-300:]}")
    return f"{good} of {count} ended with status 1, one line and no traceback"


if __name__ == "__main__":
    main()
