"""Settings, checked strictly, and the errors of bad input: what is wrong and what is allowed.

Python, Hydra and saved files come through the same base class, ``Settings``: a value is refused
with the same line wherever it was written. pydantic does the checking.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from typing_extensions import Self

# FusionBench's config groups
GROUPS = ("method", "modelpool", "taskpool", "fabric")
# Hydra's and FusionBench's own keys, which any config may carry
HOST_KEYS = ("_recursive_", "_usage_", "_version_")

Json = dict[str, Any]  # values that JSON has, by key


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
        allowed = f"; allowed: {self.allowed}" if self.allowed else ""
        return f"{self.where}: {self.problem}{allowed}"

    def under(self, key: str) -> ConfigError:
        """The same error of a setting that is nested in ``key``.

        A key of another config group, such as ``modelpool.models``, stays as it is.
        """
        if self.where.partition(".")[0] in GROUPS:
            return self
        where = ".".join(part for part in (key, self.where) if part)
        return ConfigError(where, self.problem, self.allowed)


class ArtifactError(ValueError):
    """A folder that is not an artifact, or one whose files do not belong together."""


@contextmanager
def named(key: str) -> Iterator[None]:
    """Errors inside are of settings that are nested in ``key`` (see ``ConfigError.under``)."""
    try:
        yield
    except ConfigError as error:
        raise error.under(key) from None


def unknown_key(key: object, known: Iterable[str], noun: str = "setting") -> ConfigError:
    """The error of a key that is not among the known ones, perhaps a misspelt one."""
    known = list(known)
    near = difflib.get_close_matches(str(key).lower(), known, n=1)
    meant = f", did you mean {near[0]}?" if near else ""
    return ConfigError(str(key), f"no such {noun}{meant}", ", ".join(known))


class Settings(BaseModel):
    """A group of values: no unknown key, no value of another type, no number that is not finite.

    Nothing is converted: "1" is not a number, and 1 is not true. A field's description says what is
    allowed, in errors.

    Raises:
        ConfigError: the first value that does not fit.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    def __init__(self, /, **values: object):
        values = plain(values)
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise self._first(error, values) from None

    @classmethod
    def read(cls, value: object, where: str = "") -> Self:
        """Read settings from a mapping; an object of this class is returned as it is.

        Args:
            value: key -> value.
            where: the mapping's own key, for errors.

        Raises:
            ConfigError: it is not a mapping, or a value in it does not fit.
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            keys = ", ".join(cls.model_fields)
            raise ConfigError(where, shown(value), f"a mapping with keys of {keys}")
        with named(where):
            return cls(**{str(key): entry for key, entry in value.items()})

    def to_dict(self) -> Json:
        """The settings as plain JSON values."""
        return self.model_dump()

    @classmethod
    def _first(cls, error: ValidationError, values: Json) -> ConfigError:
        """The first error in our words; of an unknown key before others, which may follow from it.

        Nested settings raised a ConfigError of their own, whose key goes on from here.
        """
        errors = error.errors(include_url=False)
        first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
        keys, context = [str(part) for part in first["loc"]], first.get("ctx", {})
        if isinstance(inner := context.get("error"), ConfigError):
            return inner.under(".".join(keys))
        if first["type"] == "extra_forbidden":
            return unknown_key(keys[0], cls.model_fields)
        allowed = cls.model_fields[keys[0]].description
        if first["type"] == "missing":
            return ConfigError(keys[0], "is missing", allowed)
        if allowed:  # it describes the field as a whole
            return ConfigError(keys[0], shown(values[keys[0]]), allowed)
        if choices := context.get("expected"):
            allowed = choices.replace("'", "").replace(" or ", ", ")
        elif first["type"] == "model_type":
            allowed = "a mapping"
        else:
            allowed = first["msg"].removeprefix("Input should be ")
        return ConfigError(".".join(keys), shown(first["input"]), allowed)


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


def whole(low: int, high: int | None = None, before: str = "") -> object:
    """A whole number from ``low``; ``high`` stops what cannot be meant."""
    span = f"{low} or more" if high is None else f"{low} to {high}"
    return Field(ge=low, le=high, description=f"{before}a whole number, {span}")


Folder = Annotated[
    str,
    BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value),
    Field(pattern=r"^[^\x00]*[^\s\x00][^\x00]*$", description="the path of a folder"),
]
Seed = Annotated[int, whole(0, 2**63 - 1)]
Flag = Annotated[bool, Field(description="true, false")]
Fraction = Annotated[float, Field(gt=0, le=1, description="a fraction in (0, 1]")]
# Of encoders in files: memory is taken by these numbers.
Size = Annotated[int, Field(ge=1, le=2**16)]
Count = Annotated[int, Field(ge=1, le=1000)]

_RESERVED = {"auto", "average", "model_info"}  # of encode, and of FusionBench's report
_TASK_NAME = re.compile(r"[^\W_](?:[\w -]{0,62}[\w-])?")


def check_task_name(name: object, others: Iterable[str] = (), where: str = "tasks") -> None:
    """Check that a task may have a name, which is also that of a file and of a torch module.

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
