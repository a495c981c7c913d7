"""What a user may write, and nothing else: settings checked strictly, refused in one line.

pydantic does the checking. Python and Hydra come through the same classes: a setting is refused
with the same line wherever it was written.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails
from typing_extensions import Self

from .errors import ConfigError, named, unknown_key
from .schema import Json

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
