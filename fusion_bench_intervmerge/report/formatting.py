"""How names and numbers are written for people; files for machines keep the names as they are."""

from __future__ import annotations

import re
from math import isnan, nan

NONE = "—"
# written in a configuration as here, but in lower case and with underscores
_NAMES = """
    AdaMerging, AdaMerging + Surgery, All tokens, Calibrated, Calibration, Closed form, Concrete,
    DARE, DARE Ties, DOGE TA, DOP, EMR-Merging, Experts, FeatCal, Fisher Merging, IntervMerge,
    Iso-C, Iso-CTS, layer-wise AdaMerging, MagMax, Model Stock, OPCM, Pretrained, PWE-MoE, RegMean,
    Singular Value Calibration, SMILE, sparse WEMoE, Surgery, TALL-masks, Task Arithmetic,
    task-wise AdaMerging, Ties-Merging, TSV-M, WEMoE, Weight Averaging, WUDI
"""
_KNOWN = {re.sub(r"\W+", "_", name).lower(): name for name in re.split(r",\s+", _NAMES.strip())} | {
    "ada_svd": "AdaSVD",
    "fisher": "Fisher Merging",
    "intervmerge_calibrated": "Calibrated",
    "intervmerge_closed_form": "Closed form",
    "rankone_moe": "Rank-one MoE",
    "regmean_plusplus": "RegMean++",
    "simple_average": "Weight Averaging",
    "surgery_v2": "SurgeryV2",
    "svc": "Singular Value Calibration",
}
# the longest first: a name may begin another
_NAME = re.compile("|".join(sorted(_KNOWN, key=len, reverse=True)))


def readable(name: str) -> str:
    """A run's name as a person would write it: ``task_arithmetic`` is ``Task Arithmetic``."""
    return re.sub(r"[_/\s]+", " ", _NAME.sub(lambda known: _KNOWN[known[0]], name)).strip()


def method(name: str, rank: int | None = None, budget: int | None = None) -> str:
    """The same of a method: ``intervmerge_r4`` of rank 4 is ``IntervMerge r=4``.

    A budget is written as a number: ``closed_form_rank_4`` with 24,768 is ``Closed form 24.8k``.
    """
    if rank is not None:
        name = re.sub(rf"_r{rank}(?=_|$)", f" r={rank}", name)
    if budget is not None:
        name = re.sub(rf"_(b{budget}|rank_\d+)(?=_|$)", f" {count(budget)}", name)
    return readable(name)


def family(name: str) -> str:
    """A method without its size: ``surgery`` of ``surgery_r16``, ``Surgery`` of ``Surgery r=4``."""
    return re.sub(r"[_ ,]+(r=?|b|rank_)?\d+(?=@|$)", "", name)


def count(number: float) -> str:
    """Three figures of a number of parameters: 24,768 is ``24.8k``."""
    power = next((p for p in range(3) if number < 999.5 * 1000**p), 3)
    return f"{number / 1000**power:.3g}{('', 'k', 'M', 'G')[power]}"


def percent(share: float, std: float = nan) -> str:
    """A share in percent without the sign, ``72.3`` or, of several, ``72.3 ± 0.4``."""
    return f"{100 * share:.1f}" + ("" if isnan(std) else f" ± {100 * std:.1f}")


def duration(seconds: float) -> str:
    """Seconds, with a decimal if they are few."""
    return f"{seconds:.1f}" if seconds < 10 else f"{seconds:,.0f}"
