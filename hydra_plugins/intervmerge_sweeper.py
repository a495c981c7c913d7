"""``hydra/sweeper=grid``: a grid of runs that can be stopped, continued and collected.

Hydra looks for sweepers in this package only, and imports it at every start of every Hydra
application: so nothing heavy is imported here.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import ConfigCompositionException
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

log = logging.getLogger(__name__)

REPORT, CONFIG, INDEX = "program_report.json", "config.yaml", "study.json"


class Job(NamedTuple):  # Hydra imports plugins in a way that a dataclass does not survive
    """One run of the grid: axis -> the label of its value, and the overrides that make it."""

    labels: dict[str, str]
    overrides: list[str]

    @property
    def folder(self) -> str:
        """Its folder within the sweep's, named after the values that vary."""
        parts = [f"{axis.split('.')[-1]}={label}" for axis, label in self.labels.items()]
        name = ",".join(re.sub(r"[^\w.+=-]+", "_", part) for part in parts) or "run"
        if len(name) > 120:
            name = name[:100] + "-" + hashlib.sha256(name.encode()).hexdigest()[:12]
        return name


class GridSweeper(Sweeper):
    """Runs the product of some axes, each job in a folder named after what varies.

    A job whose folder holds the report of the very same configuration is not run again, so the
    command that started a grid also continues it, with any launcher. Choices on the command line
    (``method.seed=0,1``) are axes too. Which folder holds which job is written to ``study.json``.

    Args:
        axes: name -> label -> overrides, a string or a list of them; or name -> a choice in
            Hydra's syntax. A choice on the command line replaces the axis that varies the same key.
        also: label -> overrides of single jobs beside the product, of methods of their own:
            ``method.KEY=VALUE`` and ``method@KEY=VALUE`` on the command line do not apply to them.
        study: title and figure of a collected grid (``fusion_bench_intervmerge.report.study``);
            null collects nothing.
    """

    def __init__(
        self,
        axes: Mapping[str, Any] | None = None,
        also: Mapping[str, Any] | None = None,
        study: Mapping[str, Any] | None = None,
    ):
        self.axes, self.also, self.study = _plain(axes), _plain(also), _plain(study)

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )
        self._parser = OverridesParser.create(config_loader=hydra_context.config_loader)

    def sweep(self, arguments: list[str]) -> Any:
        """Run what is not finished; one list of Hydra's job returns."""
        assert self.config is not None and self.launcher is not None
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        jobs = self.jobs(arguments)
        index = {"study": self.study, "jobs": [{"folder": j.folder, **j._asdict()} for j in jobs]}
        from fusion_bench_intervmerge.files import write_json

        write_json(folder / INDEX, index)
        waiting = [overrides for job in jobs if (overrides := self._unfinished(job, folder))]
        log.info("%d of %d runs are finished in %s", len(jobs) - len(waiting), len(jobs), folder)
        results = self.launcher.launch(waiting, initial_job_idx=0) if waiting else []
        if self.study and any((folder / job.folder / REPORT).is_file() for job in jobs):
            from fusion_bench_intervmerge.report import write_study

            write_study(folder)
        for result in results:
            _ = result.return_value  # raises what the job raised
        return [results]

    def jobs(self, arguments: Sequence[str]) -> list[Job]:
        """Every run of the grid, finished or not.

        Raises:
            ConfigCompositionException: a key on the command line that an axis sets together with
                others.
        """
        axes: dict[str, dict[str, list[str]]] = {}
        for name, choice in self.axes.items():
            if isinstance(choice, Mapping):
                axes[name] = {str(label): _listed(overrides) for label, overrides in choice.items()}
            else:
                ((key, values, _),) = self._parse([choice])
                axes[name] = {value: [f"{key}={value}"] for value in values}
        fixed = []
        for key, values, sweeps in self._parse(arguments):
            varying = self._axis_of(key, axes)
            if sweeps or varying:
                axes[varying or key] = {value: [f"{key}={value}"] for value in values}
            else:
                fixed.append(f"{key}={values[0]}")
        # These run other methods, which settings of the grid's method do not fit.
        apart = [o for o in fixed if not o.startswith(("method.", "method@"))]
        jobs = [Job({"also": name}, [*apart, *_listed(o)]) for name, o in self.also.items()]
        for choices in itertools.product(*(values.items() for values in axes.values())):
            labels = dict(zip(axes, (label for label, _ in choices), strict=True))
            jobs.append(Job(labels, [*fixed, *(o for _, overrides in choices for o in overrides)]))
        return jobs

    def _parse(self, overrides: Sequence[str]) -> Iterator[tuple[str, list[str], bool]]:
        """Each override's key, its values, and whether they are a choice in Hydra's syntax."""
        for override in self._parser.parse_overrides(list(overrides)):
            sweeps = override.is_sweep_override()
            values = override.sweep_string_iterator() if sweeps else []
            values = list(values) or [override.get_value_element_as_str()]
            yield override.get_key_element(), values, sweeps

    def _axis_of(self, key: str, axes: Mapping[str, Mapping[str, Sequence[str]]]) -> str | None:
        """The axis that varies this key and nothing else."""
        for name, values in axes.items():
            keys = {o.partition("=")[0].lstrip("+~") for group in values.values() for o in group}
            if key.lstrip("+~") in keys:
                if len(keys) == 1:
                    return name
                raise ConfigCompositionException(  # Hydra shows it without a traceback
                    f"{key}: varies together with other keys in this grid's axis {name!r}; "
                    f"allowed: hydra.sweeper.axes.{name} in its place"
                )
        return None

    def _unfinished(self, job: Job, folder: Path) -> list[str] | None:
        """The overrides to launch a job with; None if its report is there."""
        assert self.hydra_context is not None and self.config is not None
        overrides = [
            *job.overrides,
            f"hydra.sweep.subdir='{job.folder}'",
            "path.log_dir='${hydra:runtime.output_dir}'",
        ]
        config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            del config["hydra"]
        run = folder / job.folder
        try:
            json.loads((run / REPORT).read_text(encoding="utf-8"))
            if (run / CONFIG).read_text(encoding="utf-8") == OmegaConf.to_yaml(config):
                return None
        except (OSError, ValueError):
            pass
        # Of another configuration, or torn: nobody must take it for this job's.
        (run / REPORT).unlink(missing_ok=True)
        return overrides


def _plain(value: Any) -> dict[str, Any]:
    plain: Any = OmegaConf.to_container(OmegaConf.create(value or {}))
    return plain


def _listed(overrides: Any) -> list[str]:
    return [overrides] if isinstance(overrides, str) else list(overrides or [])
