"""The settings of edits, as the config file writes them: what, where and how large."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator
from typing_extensions import Self

from ..config import ConfigError, Flag, Settings, named, shown, unknown_key, whole
from .functions import ACTIVATIONS, function_class
from .sites import SITES

Span = Annotated[list[int], Field(min_length=2, max_length=2)]


class PartSettings(Settings):
    """Entries of a site's width, by their number; see ``InterventionConfig.part``."""

    size: Annotated[int | float | str, Field(description="a number of entries, a share, or even")]
    start: Annotated[int | float, Field(description="the first entry, or a share")] = 0
    shift: Flag = False


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
            entries from ``start``, moved on by ``size`` per block if ``shift`` is true, wrapping
            at the end of the width. Both may be shares of the width (0.25), and ``size: even``
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
        str | Annotated[list[int], Field(min_length=1)],
        Field(description="all, every_n, first_n, middle_n, last_n or a list of indices"),
    ] = "all"
    tokens: Annotated[
        str | Annotated[list[int], Field(min_length=1)],
        Field(description="class, first, middle, last, patch, all or a list of positions"),
    ] = "class"
    part: Annotated[
        Span | Annotated[list[Span], Field(min_length=1)] | PartSettings | None,
        BeforeValidator(lambda part: PartSettings.read(part) if isinstance(part, dict) else part),
        Field(description="null, [j, p], a list of those, or {size, start, shift}"),
    ] = None
    share_tokens: Flag = True
    activation: Annotated[str | None, Field(description=f"null, {', '.join(ACTIVATIONS)}")] = None
    init: Literal["reference", "identity", "regression"] = "reference"

    @model_validator(mode="after")
    def _check_function(self) -> Self:
        function_class(self.function).check(self.activation, self.init)
        return self


def read_interventions(
    value: object, where: str = "interventions"
) -> dict[str, InterventionConfig]:
    """Site -> settings, as ``method.interventions`` writes them. A site set to null is left out.

    Raises:
        ConfigError: an unknown site or setting, or no site at all.
    """
    if not isinstance(value, Mapping):
        raise ConfigError(where, shown(value), f"a mapping with keys of {', '.join(SITES)}")
    configs = {}
    with named(where):
        for name, settings in value.items():
            if name not in SITES:
                raise unknown_key(name, SITES, "site")
            if settings is not None:
                configs[name] = InterventionConfig.read(settings, name)
                with named(name):
                    _check_site(configs[name], name)
    if not configs:
        raise ConfigError(where, "no site is edited", f"one or more of {', '.join(SITES)}")
    return configs


Interventions = Annotated[
    dict[str, InterventionConfig], BeforeValidator(lambda value: read_interventions(value, ""))
]


def _check_site(config: InterventionConfig, name: str) -> None:
    """Refuse a choice of blocks or tokens at a site that has none."""
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
            raise ConfigError(key, problem, f"{shown(default)}, the default")
