"""How names and numbers are written for people; files for machines keep the names as they are."""

from __future__ import annotations

import re
from math import isnan, nan

_KNOWN = {
    "intervmerge_closed_form": "Closed form",
    "closed_form": "Closed form",
    "layer_wise_adamerging": "layer-wise AdaMerging",
    "task_wise_adamerging": "task-wise AdaMerging",
    "svc": "Singular Value Calibration",
    "singular_value_calibration": "Singular Value Calibration",
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
    "regmean_plusplus": "RegMean++",
    "adamerging_surgery": "AdaMerging + Surgery",
    "sparse_wemoe": "sparse WEMoE",
    "emr_merging": "EMR-Merging",
    "rankone_moe": "Rank-one MoE",
    "model_stock": "Model Stock",
    "tall_masks": "TALL-masks",
    "dare_ties": "DARE Ties",
    "iso_cts": "Iso-CTS",
    "pwe_moe": "PWE-MoE",
    "magmax": "MagMax",
    "doge_ta": "DOGE TA",
    "concrete": "Concrete",
    "ada_svd": "AdaSVD",
    "regmean": "RegMean",
    "fisher": "Fisher Merging",
    "iso_c": "Iso-C",
    "tsv_m": "TSV-M",
    "wemoe": "WEMoE",
    "smile": "SMILE",
    "opcm": "OPCM",
    "dare": "DARE",
    "dop": "DOP",
    "wudi": "WUDI",
}
NONE = "—"
# the longest first: a name may begin another
_NAME = re.compile("|".join(sorted(_KNOWN, key=len, reverse=True)))


def readable(name: str) -> str:
    """A run's name as a person would write it: ``task_arithmetic`` is ``Task Arithmetic``."""
    shown = _NAME.sub(lambda found: _KNOWN[found[0]], name)
    return re.sub(r"[_/\s]+", " ", shown).strip()


def method(name: str, rank: int | None = None, budget: int | None = None) -> str:
    """The same of a method: ``intervmerge_r4`` of rank 4 is ``IntervMerge r=4``.

    A budget stands in numbers: ``closed_form_rank_4`` with 24,768 is ``Closed form 24.8k``.
    """
    if rank is not None:
        name = re.sub(rf"_r{rank}(?=_|$)", f" r={rank}", name)
    if budget is not None:
        name = re.sub(rf"_(b{budget}|rank_\d+)(?=_|$)", f" {count(budget)}", name)
    return readable(name)


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


def percent(share: float, std: float = nan) -> str:
    """A share in percent without the sign, ``72.3`` or, of several, ``72.3 ± 0.4``."""
    return f"{100 * share:.1f}" + ("" if isnan(std) else f" ± {100 * std:.1f}")


def duration(seconds: float) -> str:
    """Seconds, with a decimal where they are few."""
    return f"{seconds:.1f}" if seconds < 10 else f"{seconds:,.0f}"


def listed(words: list[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else "".join(words)
