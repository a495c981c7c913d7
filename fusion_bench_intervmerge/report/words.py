"""How names and numbers are written for people; files for machines keep the names as they are."""

from __future__ import annotations

import re

_KNOWN = {
    "intervmerge_closed_form": "Closed form",
    "closed_form": "Closed form",
    "layer_wise_adamerging": "layer-wise AdaMerging",
    "task_wise_adamerging": "task-wise AdaMerging",
    "weight_averaging": "Weight Averaging",
    "task_arithmetic": "Task Arithmetic",
    "simple_average": "Weight Averaging",
    "fisher_merging": "Fisher Merging",
    "ties_merging": "Ties-Merging",
    "all_tokens": "All tokens",
    "intervmerge": "IntervMerge",
    "surgery_v2": "SurgeryV2",
    "adamerging": "AdaMerging",
    "pretrained": "Pretrained",
    "surgery": "Surgery",
    "experts": "Experts",
    "regmean": "RegMean",
}
NONE = "—"
_NAME = re.compile("|".join(_KNOWN))


def readable(name: str) -> str:
    """A run's name as a person would write it.

    ``intervmerge_r4`` is ``IntervMerge r=4``, ``closed_form_b6192`` is ``Closed form 6.2k``.
    """
    name, _, folder = name.partition("@")
    name, budget = family_and_budget(name)
    name, rank = family_and_rank(name)
    shown = _NAME.sub(lambda found: _KNOWN[found[0]], name)
    shown = re.sub(r"[_/\s]+", " ", shown).strip()
    shown += "" if rank is None else f" r={rank}"
    shown += "" if budget is None else f" {count(budget)}"
    return shown + (f" ({folder})" if folder else "")


def family_and_rank(name: str) -> tuple[str, int | None]:
    """Split a method's name: (``intervmerge_mini``, 1) of ``intervmerge_mini_r1``."""
    found = re.fullmatch(r"(.+?)_r(\d+)", name)
    return (found[1], int(found[2])) if found else (name, None)


def family_and_budget(name: str) -> tuple[str, int | None]:
    """Split a method's name: (``closed_form``, 6192) of ``closed_form_b6192``."""
    found = re.fullmatch(r"(.+?)_b(\d+)", name)
    return (found[1], int(found[2])) if found else (name, None)


def count(number: float) -> str:
    """Three figures of a number of parameters: 24,768 is ``24.8k``."""
    if number < 1000:
        return f"{number:.0f}"
    for unit in ("k", "M", "G"):
        number /= 1000
        for digits, below in ((1, 99.95), (0, 999.5)):
            if number < below:
                return f"{number:.{digits}f}{unit}"
    return f"{number:.0f}G"


def percent(share: float | None, std: float | None = None, digits: int = 1) -> str:
    """A share in percent without the sign, ``72.3`` or ``72.3 ± 0.4``."""
    if share is None:
        return NONE
    return f"{100 * share:.{digits}f}" + ("" if std is None else f" ± {100 * std:.{digits}f}")


def duration(seconds: float | None) -> str:
    """Seconds, with a decimal where they are few."""
    if seconds is None:
        return NONE
    return f"{seconds:.1f}" if seconds < 10 else f"{seconds:,.0f}"


def listed(words: list[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else "".join(words)
