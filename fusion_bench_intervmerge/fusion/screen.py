"""What a user of the command sees: our words first, and of an error its one line.

Hydra prints the message of its compact exceptions alone, and the full trace with
``HYDRA_FULL_ERROR=1``. So within a Hydra run our errors become compact ones here, at the calls
that FusionBench makes. FusionBench logs every exception with its trace as well: that goes to its
log file and stays off the screen, as what else it logs and prints while we run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import ParamSpec, TypeVar

from fusion_bench import BaseAlgorithm
from fusion_bench.constants import RuntimeConstants
from fusion_bench.utils import set_print_function_call, set_print_function_call_permeanent
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException

from ..config import ArtifactError, ConfigError
from ..distillation.loop import DistillationError

P = ParamSpec("P")
T = TypeVar("T")
E = TypeVar("E", bound=BaseException)

_inside: ContextVar[bool] = ContextVar("inside", default=False)


class ShownConfigError(ConfigError, CompactHydraException):
    """A ``ConfigError`` that Hydra prints as one line."""


class ShownArtifactError(ArtifactError, CompactHydraException):
    """An ``ArtifactError`` that Hydra prints as one line."""


class ShownDistillationError(DistillationError, CompactHydraException):
    """A ``DistillationError`` that Hydra prints as one line."""


def one_line(call: Callable[P, T]) -> Callable[P, T]:
    """Makes our errors end a Hydra run with one line; outside of one they are what they are.

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
            typed = error.under("method" if isinstance(args[0], BaseAlgorithm) else "")
            raise _off_screen(ShownConfigError(*typed.args)) from error
        except ArtifactError as error:
            raise _off_screen(ShownArtifactError(*error.args)) from error
        except DistillationError as error:
            raise _off_screen(ShownDistillationError(*error.args)) from error
        except KeyboardInterrupt as stop:
            told = str(stop) or "stopped; the same command starts again"
            raise _off_screen(SystemExit(told)) from stop
        finally:
            _inside.reset(token)

    return wrapped


class HostFilter(logging.Filter):
    """Lets FusionBench's warnings through, and everything that others say."""

    def filter(self, record: logging.LogRecord) -> bool:
        host = record.name.partition(".")[0] == "fusion_bench"
        return record.levelno >= logging.WARNING or not host


@contextmanager
def host_in_the_log() -> Iterator[None]:
    """In a Hydra run, keeps FusionBench's logs and boxes off the screen; the file has the logs.

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
        if RuntimeConstants.print_function_call is False:  # type: ignore[comparison-overlap]
            set_print_function_call_permeanent(False)


def _screens() -> list[logging.Handler]:
    """The log handlers that write no file."""
    handlers = logging.getLogger().handlers
    return [handler for handler in handlers if not isinstance(handler, logging.FileHandler)]


def _off_screen(error: E) -> E:
    """Keep FusionBench's record of an error off the screen."""

    def wanted(record: logging.LogRecord) -> bool:
        return not record.exc_info or record.exc_info[1] is not error

    for screen in _screens():
        screen.addFilter(wanted)
    return error
