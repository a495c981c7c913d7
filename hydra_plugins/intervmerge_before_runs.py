"""What would end a run before a method of ours is asked, said in one line.

Hydra imports this module at every start of every Hydra application, so it imports nothing heavy.
"""

from __future__ import annotations

import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

PACKAGE = "fusion_bench_intervmerge."
# FusionBench's model pools of encoders that have a tower; its others hold language models, ...
POOLS = ("CLIPVisionModelPool", "OpenCLIPVisionModelPool", "Dinov2ForImageClassificationPool")


class BeforeRuns(Callback):
    """Ends a run of this package's methods that has no place to write, or a pool of no use.

    By ``SystemExit``: what else a callback raises is a warning to Hydra.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        if _ours(config):
            check_folder(_value(config, "hydra.run.dir"), "path.log_dir")

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if _ours(config):
            check_folder(_value(config, "hydra.sweep.dir"), "hydra.sweep.dir")

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        from torch import get_num_threads  # as FusionBench's command has done

        self.threads = get_num_threads()
        if not _ours(config):
            return
        if sys.flags.optimize > 1:
            raise SystemExit("PYTHONOPTIMIZE: 2, and transformers needs docstrings; allowed: 0, 1")
        target = OmegaConf.select(config, "modelpool._target_")
        if isinstance(target, str):
            check_pool(target)
        check_fabric(config.get("fabric"))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """An embedded pool's one thread is not for the next job in this process."""
        from torch import set_num_threads

        set_num_threads(self.threads)


def _ours(config: DictConfig) -> bool:
    return str(OmegaConf.select(config, "method._target_")).startswith(PACKAGE)


def _value(config: DictConfig, key: str) -> Path:
    """A path among Hydra's settings, which refer to each other through ``HydraConfig``."""
    hydra = HydraConfig.instance()
    before = hydra.cfg
    try:
        hydra.set_config(config)
        return Path(OmegaConf.select(config, key))
    finally:
        hydra.cfg = before


def check_folder(folder: Path, key: str) -> None:
    """Make a run's folder, and end the process unless a file can be written there.

    Args:
        folder: where the run's files go.
        key: what to set for another folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0" * 4096)
    except OSError as error:
        problem = f"{folder} cannot be written ({error.strerror or error})"
        raise SystemExit(f"{key}: {problem}; allowed: {key}=FOLDER, a writable one") from None


def check_pool(target: str) -> None:
    """End the process unless a model pool's class can be imported and holds encoders.

    Args:
        target: the class's full name.
    """
    module, _, name = target.rpartition(".")
    if module.partition(".")[0] != "fusion_bench":
        return  # a pool of one's own: its models are looked at when they are loaded
    if name not in POOLS:
        allowed = f"pools of CLIP or DINOv2 encoders: {', '.join(POOLS)}"
        raise SystemExit(f"modelpool: {name} holds models of another kind; allowed: {allowed}")
    try:
        getattr(import_module(module), name)
    except ImportError as error:
        allowed = "Python 3.12, where FusionBench's own module can be imported"
        if name == "OpenCLIPVisionModelPool":
            allowed = f"modelpool=openclip-vit-b32_TA8, or another of this package's; {allowed}"
        raise SystemExit(f"modelpool: {name}: {error}; allowed: {allowed}") from None


def check_fabric(config: DictConfig | None) -> None:
    """End the process if there is no such device, precision or strategy.

    Args:
        config: of ``lightning.Fabric``.
    """
    if config is None:
        return
    try:
        instantiate(config, loggers=None)
    except Exception as error:  # Lightning's reasons have no class in common
        raise SystemExit(f"fabric: {' '.join(str(error.__cause__ or error).split())}") from None
