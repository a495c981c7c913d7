"""What, where and how large: the settings of one edit, as the config file writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import ConfigError

SITES = ("attention", "mlp", "block", "output")

Span = tuple[int, int]


@dataclass(frozen=True)
class InterventionConfig:
    """The edit at one site.

    Args:
        function: the form of the edit, by its name (Table 7 of the paper).
        rank: directions it works along, 1 to the width of the part.
        blocks: ``all``, ``every_n`` (index divisible by n), ``first_n``, ``middle_n``, ``last_n``
            or a list of block indices from 0 (Table 3). The site ``output`` has no blocks.
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
    """

    function: str = "noreft"
    rank: int = 1
    blocks: str | Sequence[int] = "all"
    tokens: str | Sequence[int] = "class"
    part: Sequence[int] | Sequence[Span] | Mapping[str, Any] | None = None
    share_tokens: bool = True
    activation: str | None = None
    init: str = "reference"

    @classmethod
    def from_mapping(
        cls, mapping: Mapping[str, Any], where: str = "interventions"
    ) -> InterventionConfig:
        """Read one site's settings.

        Raises:
            ConfigError: a key that is none of the settings.
        """
        known = [field.name for field in fields(cls)]
        for key in mapping:
            if key not in known:
                raise ConfigError(f"{where}.{key}", "no such setting", ", ".join(known))
        return cls(**{key: _plain(value) for key, value in mapping.items()})

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return _plain(asdict(self))


def read_interventions(
    mapping: Mapping[str, Any], where: str = "interventions"
) -> dict[str, InterventionConfig]:
    """Site -> settings, as ``method.interventions`` writes them. A site set to null is left out.

    Raises:
        ConfigError: an unknown site or setting, or no site at all.
    """
    configs = {}
    for site, settings in mapping.items():
        if site not in SITES:
            raise ConfigError(f"{where}.{site}", "no such site", ", ".join(SITES))
        if isinstance(settings, InterventionConfig):
            configs[site] = settings
        elif settings is not None:
            configs[site] = InterventionConfig.from_mapping(settings, f"{where}.{site}")
    if not configs:
        raise ConfigError(where, "no site is edited", f"one or more of {', '.join(SITES)}")
    return configs


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(entry) for entry in value]
    return value
