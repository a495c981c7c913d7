"""Helpers for running inside FusionBench: its configs, its task pools, and what the screen shows.

Hydra prints the message of its compact exceptions alone, and the full trace with
``HYDRA_FULL_ERROR=1``. So within a Hydra run our errors become compact ones, at the calls that
FusionBench makes. FusionBench also logs every exception with its trace: that goes to its log file
and stays off the screen, as does everything else that it logs and prints while we run.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from functools import wraps
from io import StringIO
from typing import Any, ClassVar, ParamSpec, TypeVar

import transformers
from fusion_bench import BaseAlgorithm
from fusion_bench.constants import RuntimeConstants
from fusion_bench.mixins import LightningFabricMixin
from fusion_bench.taskpool import CLIPVisionModelTaskPool, DummyTaskPool
from fusion_bench.tasks.clip_classification import CLIPTemplateFactory
from fusion_bench.utils import set_print_function_call, set_print_function_call_permeanent
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from omegaconf import OmegaConf

from ..config import HOST_KEYS, ArtifactError, ConfigError, Settings
from ..distillation.loop import DistillationError
from ..results import Result, Results

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
E = TypeVar("E", bound=BaseException)

_inside: ContextVar[bool] = ContextVar("inside", default=False)


# -- configs and task pools ------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Hydra's containers as plain ones, interpolations resolved; any other value as it is."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def split_settings(given: Mapping[str, object]) -> tuple[dict[str, object], dict[str, Any]]:
    """The settings among a method's arguments, as plain containers, and Hydra's own keys."""
    settings = {key: plain(value) for key, value in given.items()}
    return settings, {key: settings.pop(key) for key in HOST_KEYS if key in settings}


def attach(method: T, program: object, fabric: object) -> T:
    """Give a nested method the running program and its fabric, if it takes them."""
    for name, value in (("_program", program), ("_fabric_instance", fabric), ("_fabric", fabric)):
        if hasattr(method, name):
            setattr(method, name, value)
    return method


def has_task_pool(program: object) -> bool:
    """Whether the program will evaluate what its method returns."""
    pool = getattr(program, "taskpool", None)
    return pool is not None and not isinstance(pool, DummyTaskPool)


def check_task_pool(program: object, family: str, tasks: Iterable[str]) -> None:
    """Check, before the training, that the program's task pool can evaluate the models.

    A warning names its tasks that the models do not know.

    Raises:
        ConfigError: the pool evaluates encoders of the other family, or never names a task.
    """
    pool = getattr(program, "taskpool", None)
    # FusionBench's OpenCLIP task pool cannot be imported before Python 3.12, so no isinstance
    theirs = "openclip" if hasattr(pool, "_classifier_heads") else "huggingface"
    if (theirs == "openclip" or isinstance(pool, CLIPVisionModelTaskPool)) and theirs != family:
        names = {"openclip": "OpenCLIP", "huggingface": "Hugging Face"}
        raise ConfigError(
            "taskpool",
            f"it evaluates {names[theirs]} encoders, and the models are {names[family]}'s",
            "the task pool of the same name as the model pool",
        )
    if theirs == "openclip" and type(pool).__module__.startswith("fusion_bench."):
        raise ConfigError(
            "taskpool",
            "it never names the task to a model, so its report would show the merged encoder",
            "taskpool=openclip-vit-b32_TA8, or another of this package's",
        )
    known = set(tasks)
    unseen = [task for task in getattr(pool, "_test_datasets", None) or () if task not in known]
    if unseen:
        log.warning(
            "no expert knows %s: evaluated with the merged encoder, and marked as unseen",
            ", ".join(unseen),
        )


def register_classes(
    task: str, names: Sequence[str], templates: Sequence[Callable[[str], str]]
) -> None:
    """Tell FusionBench the names of a task's classes, and what makes captions of them."""
    info: Any = {"classnames": list(names), "templates": list(templates)}
    # ``dataset_info`` as well: without it FusionBench stores them under a wrong key
    CLIPTemplateFactory.register_dataset(task, dataset_info=info, **info)


def name_models(
    program: object, models: Mapping[str, object], merges: Collection[str] = ()
) -> None:
    """Tell a task pool of this package which models it will evaluate, and which are merges."""
    pool: Any = getattr(program, "taskpool", None)
    if hasattr(pool, "names"):
        pool.names = {id(model): name for name, model in models.items()}
        pool.merges = merges


def after_evaluation(
    program: object, clear: Callable[[], None], references: Mapping[str, object]
) -> None:
    """Let a task pool of this package evaluate the merge too, given by its name, then clear.

    Merges that the method's base has given come before it, unless there are none now. If the task
    pool is another's, clear now.
    """
    pool: Any = getattr(program, "taskpool", None)
    if hasattr(pool, "after_evaluation"):
        pool.references = {**pool.references, **references} if references else {}
        pool.after_evaluation = clear
    else:
        clear()


# -- the screen ------------------------------------------------------------------------------------


# What is left of a ConfigError in a process that reads images: torch sends its trace.
_FROM_A_WORKER = re.compile(r"in DataLoader worker .*\.ConfigError: (.*?)\s*\Z", re.DOTALL)


class OneLineError(CompactHydraException):
    """An error of ours that Hydra prints as one line."""


def one_line(call: Callable[P, T]) -> Callable[P, T]:
    """Let our errors end a Hydra run with one line; outside of one they stay as they are.

    Settings of a method are named as the command line writes them, ``method.KEY``. Ctrl-C ends the
    run, and a sweep that it belongs to, in the same way.
    """

    @wraps(call)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        if _inside.get() or not HydraConfig.initialized():
            return call(*args, **kwargs)
        token = _inside.set(True)
        try:
            return call(*args, **kwargs)
        except ConfigError as error:
            typed = error.under("method") if isinstance(args[0], BaseAlgorithm) else error
            raise _off_screen(OneLineError(str(typed))) from error
        except (ArtifactError, DistillationError) as error:
            raise _off_screen(OneLineError(str(error))) from error
        except RuntimeError as error:
            if (sent := _FROM_A_WORKER.search(str(error))) is None:
                raise
            raise _off_screen(OneLineError(sent[1])) from error
        except KeyboardInterrupt as stop:
            message = str(stop) or "stopped; the same command starts again"
            raise _off_screen(SystemExit(message)) from stop
        finally:
            _inside.reset(token)

    return wrapped


class HostFilter(logging.Filter):
    """Lets FusionBench's warnings pass, and every record of other packages.

    ``hydra/job_logging=intervmerge`` makes one before FusionBench instantiates anything, and so
    the boxes that it would print for that go too: it reads ``print_function_call`` but prints them
    all the same. transformers' remarks on weights that a vision tower does not need go as well.
    """

    def __init__(self, name: str = ""):
        super().__init__(name)
        set_print_function_call_permeanent(False)
        transformers.logging.set_verbosity_error()

    def filter(self, record: logging.LogRecord) -> bool:
        host = record.name.partition(".")[0] == "fusion_bench"
        return record.levelno >= logging.WARNING or not host


@contextmanager
def host_in_the_log() -> Iterator[None]:
    """In a Hydra run, keep FusionBench's logs and boxes off the screen; its file has the logs.

    With ``print_function_call=false`` there are no boxes afterwards either: FusionBench reads that
    setting but does not follow it.
    """
    if not HydraConfig.initialized():
        yield
        return
    screens, quiet = _screens(), HostFilter()
    for screen in screens:
        screen.addFilter(quiet)
    try:
        with set_print_function_call(False):
            yield
    finally:
        for screen in screens:
            screen.removeFilter(quiet)
        boxes: object = RuntimeConstants.print_function_call
        if boxes is False:
            set_print_function_call_permeanent(False)


@contextmanager
def prints_in_the_log() -> Iterator[None]:
    """In a Hydra run, what another's method prints (tables of its profiler) goes to the log."""
    if not HydraConfig.initialized():
        yield
        return
    with redirect_stdout(StringIO()) as printed:
        try:
            yield
        finally:
            logging.getLogger("fusion_bench.stdout").info(printed.getvalue())


def _screens() -> list[logging.Handler]:
    """The log handlers that write to no file."""
    handlers = logging.getLogger().handlers
    return [handler for handler in handlers if not isinstance(handler, logging.FileHandler)]


def _off_screen(error: E) -> E:
    """Keep FusionBench's log record of an error off the screen."""

    def wanted(record: logging.LogRecord) -> bool:
        return not record.exc_info or record.exc_info[1] is not error

    for screen in _screens():
        screen.addFilter(wanted)
    return error


# -- methods ---------------------------------------------------------------------------------------


class Method(LightningFabricMixin, BaseAlgorithm):
    """A FusionBench method with checked settings.

    Raises:
        ConfigError: a setting that does not exist, or not with that value.
    """

    Settings: ClassVar[type[Settings]]

    @one_line
    def __init__(self, **settings: object):
        own, host = split_settings(settings)
        super().__init__(**host)
        self.settings: Any = self.Settings.read(own)

    def write(self, tasks: Sequence[str], models: dict[str, Result], **more: Any) -> None:
        """Write ``intervmerge.json`` beside the report, once over all processes."""
        if self.fabric.is_global_zero:
            Results(tasks=list(tasks), models=models, **more).write(self.log_dir)
