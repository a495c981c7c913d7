"""What comes from a file is checked strictly: types, ranges, no unknown keys."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import ConfigError

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
