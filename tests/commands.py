"""FusionBench's command for the tests: in this process, if a fresh one would prove no more."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

from fusion_bench.constants import RuntimeConstants
from fusion_bench.scripts import cli
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict

ROOT = Path(__file__).parents[1]
COMMAND = str(Path(sys.executable).with_name("fusion_bench"))
TINY = ["modelpool=clip-vit-tiny_TA8", "taskpool=clip-vit-tiny_TA8"]
QUIET = ["print_config=false", "print_function_call=false"]
TINY_TASKS = "digits letters shapes counting positions colours gratings textures".split()  # noqa: SIM905


def evaluating(*tasks: str) -> list[str]:
    """Overrides that leave these tasks in the tiny pool's task pool."""
    return [f"~taskpool.test_datasets.{task}" for task in TINY_TASKS if task not in tasks]


def only(*tasks: str) -> list[str]:
    """The tiny pool with these tasks alone."""
    return [*TINY, f"modelpool.tasks=[{','.join(tasks)}]", *evaluating(*tasks)]


def compose(*overrides: str, config="fabric_model_fusion", **options):
    """A config as the command composes it."""
    (folder,) = find_spec("fusion_bench_config").submodule_search_locations
    with initialize_config_dir(folder, version_base=None):
        return hydra_compose(config, overrides=list(overrides), **options)


def in_process(*overrides: str, folder: Path):
    """Run what the command runs after composing; its logs go to ``folder / "log"``.

    Returns:
        FusionBench's ``merged_model`` and ``report``.
    """
    config = compose(
        *overrides,
        *QUIET,
        f"path.log_dir={folder / 'log'}",
        f"hydra.runtime.output_dir={folder}",
        return_hydra_config=True,
    )
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config["hydra"]
    try:
        return cli.main(config)
    finally:
        HydraConfig.instance().cfg = None
        RuntimeConstants.debug = False  # what fast_dev_run=true leaves behind in the process


def run_command(*overrides: str, folder: Path) -> None:
    """The whole command, Hydra's part included, in ``folder``.

    Raises:
        SystemExit: it ended with an error, which Hydra has printed.
    """
    handlers, home = logging.root.handlers[:], Path.cwd()
    os.chdir(folder)
    try:
        with patch.object(sys, "argv", ["fusion_bench", *overrides]):
            cli._hydra_main()
    finally:
        os.chdir(home)
        logging.root.handlers[:] = handlers  # Hydra's write to a screen that is pytest's
        RuntimeConstants.debug = False


def command(*overrides: str, cwd: Path, check=True, **environment: str):
    """The installed command, in a process of its own."""
    done = subprocess.run(
        [COMMAND, *overrides],
        cwd=cwd,
        # the same bits need the same number of threads, and the tests run on one
        env=os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=400,
    )
    if check:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def read_json(path: Path):
    return json.loads(path.read_text())
