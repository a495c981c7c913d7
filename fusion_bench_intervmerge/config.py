"""The errors of bad input: what is wrong, where, and what is allowed, in one line."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails
from typing_extensions import Self

# == errors
# The errors of bad input: what is wrong, where, and what is allowed, in one line.
GROUPS = ("method", "modelpool", "taskpool", "fabric")


class ConfigError(ValueError):
    """Bad input, said in one line.

    Args:
        where: the config key (or argument) at fault, e.g. ``interventions.attention.rank``.
        problem: what is wrong with it.
        allowed: what it may be instead.
    """

    def __init__(self, where: str, problem: str, allowed: str | None = None):
        super().__init__(where, problem, allowed)  # all of them, so that it can be pickled
        self.where, self.problem, self.allowed = where, problem, allowed

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}" + (
            f"; allowed: {self.allowed}" if self.allowed else ""
        )

    def under(self, key: str) -> ConfigError:
        """The same error of a setting that is nested in ``key``.

        A key of another config group, such as ``modelpool.models``, stays as it is.
        """
        if self.where.partition(".")[0] in GROUPS:
            return self
        where = ".".join(part for part in (key, self.where) if part)
        return ConfigError(where, self.problem, self.allowed)


def unknown_key(key: object, known: Iterable[str], noun: str = "setting") -> ConfigError:
    """A key that is none of those known, perhaps a misspelt one."""
    known = list(known)
    near = difflib.get_close_matches(str(key).lower(), known, n=1)
    meant = f", did you mean {near[0]}?" if near else ""
    return ConfigError(str(key), f"no such {noun}{meant}", ", ".join(known))


@contextmanager
def named(key: str) -> Iterator[None]:
    """Errors inside are of settings that are nested in ``key`` (see ``ConfigError.under``)."""
    try:
        yield
    except ConfigError as error:
        raise error.under(key) from None


class ArtifactError(ValueError):
    """A folder that is no artifact, or one whose files do not belong together."""


# == settings
# What a user may write, and nothing else: settings checked strictly, refused in one line.
#
# pydantic does the checking. Python and Hydra come through the same classes: a setting is refused
# with the same line wherever it was written.
#
# Hydra's and FusionBench's own, which any config may carry.
HOST_KEYS = ("_recursive_", "_usage_", "_version_")


class Settings(BaseModel):
    """A group of settings: no unknown key, no value of another type, no number that is not finite.

    A field's description says what is allowed, in errors.

    Raises:
        ConfigError: the first setting that does not fit.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    def __init__(self, **given: object):
        given = {key: plain(value) for key, value in given.items()}
        try:
            super().__init__(**given)
        except ValidationError as error:
            raise self._first(error, given) from None

    @classmethod
    def read(cls, given: object, where: str = "") -> Self:
        """The settings that a mapping writes.

        Args:
            given: key -> value.
            where: the mapping's own key, for errors.

        Raises:
            ConfigError: no mapping, or a setting in it that does not fit.
        """
        if not isinstance(given, Mapping):
            known = ", ".join(cls.model_fields)
            raise ConfigError(where, shown(given), f"a mapping with keys of {known}")
        with named(where):
            for key in given:
                if key not in cls.model_fields:
                    raise unknown_key(key, cls.model_fields)
            return cls(**given)

    def to_dict(self) -> Json:
        """The settings as plain JSON values."""
        return plain(self.model_dump())

    @classmethod
    def _first(cls, error: ValidationError, given: Mapping[str, object]) -> ConfigError:
        found = error.errors(include_url=False)
        first = next((e for e in found if e["type"] == "extra_forbidden"), found[0])
        key = str(first["loc"][0]) if first["loc"] else ""
        inner = first.get("ctx", {}).get("error")
        if isinstance(inner, ConfigError):
            return inner.under(key)
        if first["type"] == "extra_forbidden":
            return unknown_key(key, cls.model_fields)
        allowed = cls.model_fields[key].description or _plain_words(first)
        if first["type"] == "missing":
            return ConfigError(key, "is missing", allowed)
        return ConfigError(key, shown(given[key]), allowed)


def nested(cls: type[Settings]) -> BeforeValidator:
    """Lets a field of settings be written as a mapping."""
    return BeforeValidator(lambda value: value if isinstance(value, cls) else cls.read(value))


def shown(value: object) -> str:
    """A bad value as the user wrote it, on one line."""
    text = "null" if value is None else repr(value)
    text = " ".join((text.lower() if isinstance(value, bool) else text).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def plain(value: object) -> Any:
    """Mappings and sequences of any kind as dicts and lists, all the way down."""
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [plain(entry) for entry in value]
    return value


def _plain_words(error: ErrorDetails) -> str:
    choices = error.get("ctx", {}).get("expected", "")
    words = error["msg"].removeprefix("Input should be ")
    return choices.replace("'", "").replace(" or ", ", ") if choices else words


def whole(low: int, high: int | None = None, before: str = "") -> object:
    """A whole number from ``low``; ``high`` stops what cannot be meant."""
    span = f"{low} or more" if high is None else f"{low} to {high}"
    return Field(ge=low, le=high, description=f"{before}a whole number, {span}")


def _folder(value: object) -> object:
    text = str(value) if isinstance(value, Path) else value
    if isinstance(text, str) and (not text.strip() or "\0" in text):
        raise ConfigError("", shown(text), "the path of a folder")
    return text


Folder = Annotated[str, BeforeValidator(_folder), Field(description="the path of a folder")]
Seed = Annotated[int, whole(0, 2**63 - 1)]
Flag = Annotated[bool, Field(description="true, false")]


def check_arguments(cls: Callable[..., object], given: Mapping[str, object], where: str) -> None:
    """Check a config's arguments of a class that checks few of them itself.

    Raises:
        ConfigError: a key that the class does not take, a value of another kind than its
            default's, or a number that is not finite.
    """
    parameters = inspect.signature(cls).parameters
    known = [name for name in parameters if name != "params"]
    for key, value in given.items():
        if key not in known:
            raise unknown_key(key, known).under(where)
        default, annotation = parameters[key].default, str(parameters[key].annotation)
        fits, allowed = not _has_nan(value), "finite numbers"
        if isinstance(default, bool):
            fits, allowed = isinstance(value, bool), "true, false"
        elif default is None and "bool" in annotation:
            fits, allowed = value is None or isinstance(value, bool), "null, true, false"
        elif isinstance(default, (int, float)):
            fits, allowed = fits and _is_number(value), "a number"
        elif isinstance(default, tuple):
            fits = fits and isinstance(value, list) and len(value) == len(default)
            allowed = f"a list of {len(default)}"
        if not fits:
            raise ConfigError(f"{where}.{key}", shown(value), allowed)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _has_nan(value: object) -> bool:
    """Whether it is, or holds, a number that is not finite."""
    if isinstance(value, list):
        return any(map(_has_nan, value))
    return isinstance(value, float) and not isfinite(value)


# == schema
# What comes from a file is checked strictly: types, ranges, no unknown keys.
Size = Annotated[int, Field(ge=1, le=2**16)]  # no encoder comes near; memory is taken by it
Count = Annotated[int, Field(ge=1, le=1000)]


Json = dict[str, Any]  # values that JSON has, by key


class Strict(BaseModel):
    """A schema that converts nothing: "1" is no number, and 1 is not true."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


S = TypeVar("S", bound=BaseModel)


def checked(schema: type[S], value: object, where: str = "") -> S:
    """Read a value.

    Raises:
        ConfigError: the first thing that does not fit, in one line.
    """
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        key = ".".join(str(part) for part in (where, *first["loc"]) if part != "")
        value = first["input"]
        plain = first["type"] != "missing" and isinstance(value, str | int | float | None)
        found = f", found {value!r:.60}" if plain else ""
        raise ConfigError(key or "content", first["msg"] + found) from None


_RESERVED = {"auto", "average", "model_info"}  # of encode, and of FusionBench's report
_TASK_NAME = re.compile(r"[^\W_](?:[\w -]{0,62}[\w-])?")


def check_task_name(name: object, others: Iterable[str] = (), where: str = "tasks") -> None:
    """Raise unless a task may have that name, which is also a file's and a torch module's.

    Args:
        name: to check.
        others: names of the tasks beside it.
        where: config key to name in errors.

    Raises:
        ConfigError: what is wrong with it, in one line.
    """
    allowed = "letters, digits, '_', '-' and inner spaces, a letter or digit first, 64 at most"
    if not isinstance(name, str) or not _TASK_NAME.fullmatch(name) or name in _RESERVED:
        raise ConfigError(where, f"{name!r:.60} cannot name a task", allowed)
    if name in others:
        raise ConfigError(where, f"{name!r} is there already", "a new name")
