"""What, where and how large: the settings of one edit, as the config file writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from ..config import ConfigError, Flag, Settings, shown, unknown_key, whole
from .functions import ACTIVATIONS, function_class
from .sites import SITES


class PartSettings(Settings):
    """Entries of a site's width, by their number; ``InterventionConfig.part`` says how."""

    size: Annotated[int | float | str, Field(description="a number of entries, a share, or even")]
    start: Annotated[int | float, Field(description="the first entry, or a share")] = 0
    shift: Flag = False


_PART = "null, [j, p], a list of those, or {size, start, shift}"


def _read_part(value: object) -> object:
    if isinstance(value, Mapping):
        PartSettings.read(value)
    elif value is not None and not (isinstance(value, list) and value):
        raise ConfigError("", f"{shown(value)} is no part", _PART)
    return value


class InterventionConfig(Settings):
    """The edit at one site.

    Args:
        function: the form of the edit, by its name (Table 7 of the paper).
        rank: directions it works along, 1 to the width of the part.
        blocks: ``all``, ``every_n`` (index divisible by n), ``first_n``, ``middle_n``, ``last_n``
            or a list of block indices from 0 (Table 3), at a site that is in the blocks.
        tokens: ``class``, ``first``, ``middle``, ``last`` (patch positions 1, (1 + n) // 2 and n
            of n patches), ``patch``, ``all`` or a list of token positions, the class token being
            0 (Table 2). The site ``output`` has no tokens.
        part: entries of the representation that it touches (eq 3.5, Table 4): ``None`` for all,
            ``[j, p]`` for j <= i < p, a list of such spans, or ``{size, start, shift}``: ``size``
            entries from ``start``, moved on by ``size`` a block when ``shift`` is true, wrapping
            where the width ends. Both may be shares of the width (0.25), and ``size: even``
            divides the width by the number of edited blocks.
        share_tokens: one edit for all chosen tokens, or one for each (the paper's patch tokens).
        activation: ``relu``, ``gelu``, ``silu`` or ``tanh`` between down and up, for noreft,
            loreft, direft and nodireft.
        init: ``reference`` draws the published start, ``identity`` starts as the merged encoder,
            ``regression`` has no edits until ``solve`` finds them in closed form.

    Raises:
        ConfigError: a setting that no encoder could take.
    """

    function: Annotated[str, Field(description="the name of a function")] = "noreft"
    rank: Annotated[int, whole(1)] = 1
    blocks: Annotated[
        str | list[int],
        Field(description="all, every_n, first_n, middle_n, last_n or a list of indices"),
    ] = "all"
    tokens: Annotated[
        str | list[int],
        Field(description="class, first, middle, last, patch, all or a list of positions"),
    ] = "class"
    part: Annotated[
        list[int] | list[list[int]] | dict[str, object] | None,
        BeforeValidator(_read_part),
        Field(description=_PART),
    ] = None
    share_tokens: Flag = True
    activation: Annotated[str | None, Field(description=f"null, {', '.join(ACTIVATIONS)}")] = None
    init: Literal["reference", "identity", "regression"] = "reference"

    @model_validator(mode="after")
    def _the_function_takes_them(self) -> InterventionConfig:
        form = function_class(self.function)
        if self.activation is not None and self.activation not in ACTIVATIONS:
            allowed = f"null, {', '.join(ACTIVATIONS)}"
            raise ConfigError("activation", shown(self.activation), allowed)
        form.check(self.activation, self.init)
        return self


def read_interventions(
    mapping: Mapping[str, object], where: str = "interventions"
) -> dict[str, InterventionConfig]:
    """Site -> settings, as ``method.interventions`` writes them. A site set to null is left out.

    Raises:
        ConfigError: an unknown site or setting, or no site at all.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(where, shown(mapping), f"a mapping with keys of {', '.join(SITES)}")
    configs = {}
    for site, settings in mapping.items():
        if site not in SITES:
            raise unknown_key(site, SITES, "site").under(where)
        if settings is None:
            continue
        if not isinstance(settings, InterventionConfig):
            settings = InterventionConfig.read(settings, f"{where}.{site}")
        _check_choices(settings, site, f"{where}.{site}")
        configs[site] = settings
    if not configs:
        raise ConfigError(where, "no site is edited", f"one or more of {', '.join(SITES)}")
    return configs


def _check_choices(config: InterventionConfig, name: str, where: str) -> None:
    """A choice of blocks or tokens where a site has none is a mistake."""
    site = SITES[name]
    for key, noun, there_are in (
        ("blocks", "blocks", site.in_blocks),
        ("tokens", "tokens", site.has_tokens),
        ("share_tokens", "tokens", site.has_tokens),
    ):
        value, default = getattr(config, key), InterventionConfig.model_fields[key].default
        if value != default and not there_are:
            what = "the image features have" if site.at == "end" else f"the site {name} has"
            problem = f"{shown(value)}, but {what} no {noun}"
            raise ConfigError(f"{where}.{key}", problem, f"{shown(default)}, the default")
