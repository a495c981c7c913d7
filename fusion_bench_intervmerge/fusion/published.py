"""``fusion_bench +experiment=published``: the published table beside our own numbers.

Which pools there are depends on ``size``, ``tasks`` and ``checkpoints``, plain keys, because the
group of a config cannot be called 8. So the model pool and the task pool of that experiment are
functions that compose the pool of the right name.
"""

from __future__ import annotations

import atexit
import platform
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from fusion_bench import BaseModelPool
from fusion_bench.utils import instantiate
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict
from rich.console import Console
from torch import nn
from transformers import CLIPConfig, CLIPModel

from ..config import Json
from ..files import write_json
from ..report.published import FILE, Choice, Found, FoundModel, published, read_found, show
from .comparison import ComparisonAlgorithm, ComparisonSettings
from .host import host_in_the_log, one_line
from .records import announce

PACKAGES = ("fusion-bench-intervmerge", "fusion-bench", "torch", "transformers", "open_clip_torch")

# -- the pools -------------------------------------------------------------------------------------


@one_line
def model_pool(*, size: str, tasks: int, checkpoints: str, **settings: object) -> Any:
    """The model pool of these checkpoints; ``settings`` are its own.

    Raises:
        ConfigError: there are no such checkpoints, in one line.
    """
    which = {"size": size, "tasks": tasks, "checkpoints": checkpoints}
    return _pool("modelpool", Choice.read(which), settings)


@one_line
def task_pool(*, size: str, tasks: int, checkpoints: str, **settings: object) -> Any:
    """The task pool that evaluates them; arguments and errors as of ``model_pool``."""
    which = {"size": size, "tasks": tasks, "checkpoints": checkpoints}
    return _pool("taskpool", Choice.read(which), settings)


def _pool(group: str, choice: Choice, settings: Json) -> Any:
    # within a run of the command Hydra is there already, with its search path
    there, home = GlobalHydra.instance().is_initialized(), str(files("fusion_bench_config") / "")
    with nullcontext() if there else initialize_config_dir(home, version_base=None):
        config = compose(None, [f"+{group}={choice.pool}"])
    with open_dict(config):
        for key, value in settings.items():
            if value is not None:
                OmegaConf.update(config, f"{group}.{key}", value)
    OmegaConf.resolve(config[group])
    return instantiate(config[group], _recursive_=False)


# -- what it takes ---------------------------------------------------------------------------------

# Milliseconds of one image's pass through ViT-B/32, fp32: a third of the floor (two forward passes
# and one backward pass) of benchmarks/README.md, "Distillation".
SPEEDS = {"one NVIDIA H200": 2.45 / 3, "two cores of a 2.8 GHz Xeon": 152 / 3}
# Passes that an image costs, from the same page: each time it is trained on (122 ms), and where
# edits are solved within a budget; calibration and FeatCal are counted alike.
TRAINED, SOLVED = 2.4, 4.4


def clip(size: str) -> CLIPModel:
    """The architecture of that size, without weights."""
    vision: Json = {"b32": {}, "b16": {"patch_size": 16}}.get(size) or {}
    text, projection = {}, 512
    if size == "l14":
        vision = {"patch_size": 14, "hidden_size": 1024, "intermediate_size": 4096}
        vision |= {"num_hidden_layers": 24, "num_attention_heads": 16}
        text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
        projection = 768
    with torch.device("meta"):
        return CLIPModel(CLIPConfig(text, vision, projection_dim=projection))


def passes(settings: PublishedSettings, repairs: Sequence[Any]) -> float:
    """Passes of an image through the encoder, over all models of a run.

    Args:
        settings: the run's.
        repairs: the settings of each repair.
    """
    tested = sum(list(published()[1].values())[: settings.tasks])
    total = 2.0 * tested
    for base in settings.bases.values():
        total += tested + (base.get("max_steps") or 0) * 16 * settings.tasks * TRAINED
        for repair in repairs:
            seen = settings.tasks * repair.data.images if repair.data.images else tested
            if steps := getattr(repair, "steps", 0):
                cost = settings.tasks * steps * repair.data.batch_size * TRAINED
            else:
                cost = seen * SOLVED
            total += (tested + cost) * len(settings.seeds)
    return total


def estimate(settings: PublishedSettings, repairs: Sequence[Any]) -> list[str]:
    """What a run downloads, and how long it takes, in two lines; arguments as of ``passes``."""
    model, small = clip(settings.size), clip("b32")
    tower, total = _numbers(model.vision_model), passes(settings, repairs)
    gigabytes = 4 * (_numbers(model) + settings.tasks * tower) / 1e9
    larger = tower * _tokens(model) / (_numbers(small.vision_model) * _tokens(small))
    times = [f"{_time(total * larger * ms / 1000)} on {name}" for name, ms in SPEEDS.items()]
    download = f"{gigabytes:.1f} GB of checkpoints, and the data sets"
    if settings.checkpoints == "openclip":
        download = "the data sets; the checkpoints have to be in modelpool.model_dir"
    return [
        f"Downloads what is not there: {download}",
        f"{total / 1e6:.1f} million passes of an image: {', '.join(times)}, by the speeds of "
        "benchmarks/README.md; reading images comes on top",
    ]


def _numbers(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _tokens(model: CLIPModel) -> int:
    config = model.config.vision_config
    return (config.image_size // config.patch_size) ** 2 + 1


def _time(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.0f} days"


# -- the method ------------------------------------------------------------------------------------


class PublishedSettings(ComparisonSettings, Choice):
    """The settings of ``+experiment=published``: a comparison's, and which table it is."""


class PublishedAlgorithm(ComparisonAlgorithm):
    """A comparison that ends with the published numbers beside ours, and with one file."""

    Settings = PublishedSettings

    @host_in_the_log()
    @one_line
    def run(self, modelpool: BaseModelPool) -> dict[str, object]:
        """As a comparison; ``published.json`` is beside the report."""
        if self.fabric.is_global_zero:
            repairs: list[Any] = [self._build(method) for method in self.settings.methods]
            announce(*estimate(self.settings, [repair.settings for repair in repairs]))
        return super().run(modelpool)

    def _say_at_exit(self, tasks: Sequence[str]) -> None:
        if self.log_dir is not None and self.fabric.is_global_zero:
            file = Path(self.log_dir) / FILE
            write_json(file, self._found(tasks).to_dict())
            atexit.register(_show, file)

    def _found(self, tasks: Sequence[str]) -> Found:
        """Every model that was evaluated."""
        reports: Any = self._models
        models = {}
        for name, result in self._results.items():
            accuracy = {task: reports[name][task]["accuracy"] for task in tasks}
            images = "; ".join(images.in_words(seed=False) for images in result.images)
            about = {key: getattr(result, key) for key in ("transductive", "extra_parameters")}
            about |= {"images": images, "seconds": result.seconds}
            models[name] = FoundModel(accuracy=accuracy, **about)
        device, hydra = self.fabric.device, HydraConfig.initialized()
        cuda = device.type == "cuda"
        return Found(
            **{key: getattr(self.settings, key) for key in Choice.model_fields},
            software={name: version(name) for name in PACKAGES},
            device=torch.cuda.get_device_name(device) if cuda else platform.processor(),
            overrides=list(HydraConfig.get().overrides.task) if hydra else [],
            models=models,
            problems=self._problems,
        )


def _show(file: Path) -> None:
    show(read_found(file), Console(highlight=False))
    Console(soft_wrap=True, highlight=False).print(f"To send us: {file}")
