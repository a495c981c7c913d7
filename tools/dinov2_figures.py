"""Draw ``docs/figures/dinov2_*.png`` from ``docs/data/dinov2.csv``, and print means and deviations.

python tools/dinov2_figures.py docs/data/dinov2.csv docs/figures
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from fusion_bench_intervmerge.report.style import (
    DASHES,
    GREY,
    INK,
    Palette,
    blank,
    dots,
    finish,
    name_axes,
    percent_axis,
    size_axis,
    style,
    to_png,
)

LABELS = {
    "calibration": "calibration",
    "featcal": "FeatCal",
    "surgery": "Surgery r=16",
    "intervmerge_r1": "IntervMerge r=1",
    "intervmerge_r4": "IntervMerge r=4",
    "closed_form_r1": "closed form, rank 1's budget",
    "closed_form_r4": "closed form, rank 4's budget",
    "calibrated_r1": "calibration and edits, rank 1's",
    "calibrated_r4": "calibration and edits, rank 4's",
}
FREE = 2  # the first of them have no extra parameter
PALETTE = Palette((name, label, at // FREE) for at, (name, label) in enumerate(LABELS.items()))
BY_IMAGES = ("calibration", "featcal", "surgery", "intervmerge_r4", "closed_form_r4")
COUNT = 128  # images per task of the figures that show one


def summary(results: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over seeds, of each setting."""
    setting = ["merge", "method", "images", "steps", "batch", "precision"]
    averages = results.groupby(setting, dropna=False, sort=False)
    found = averages.agg(
        average=("average", "mean"),
        deviation=("average", "std"),
        seeds=("average", "size"),
        numbers=("parameters", "first"),
        seconds=("seconds", "mean"),
    )
    return found.reset_index()


def by_images(repairs: pd.DataFrame, merge: float, experts: float) -> Figure:
    """Accuracy against unlabelled images per task, held-out."""
    figure, (panel,) = blank()
    for name, look in ((n, PALETTE[n]) for n in BY_IMAGES):
        own = repairs[repairs.method.eq(name) & repairs.images.gt(0)].sort_values("images")
        if len(own) > 1:
            panel.errorbar(own.images, own.average, own.deviation, color=look.colour, lw=1.1)
            panel.plot(own.images, own.average, **look.point)
    shown = [line.get_color() for line in panel.lines]
    panel.set_xscale("log")
    panel.set_xticks(
        (ticks := sorted(repairs.images[repairs.images > 0].unique())), map(int, ticks)
    )
    panel.minorticks_off()
    panel.axhline(merge, color=GREY, ls=DASHES, lw=1.1)
    panel.axhline(experts, color=INK, lw=1.1)
    percent_axis(panel.yaxis)
    name_axes(figure, "unlabelled images per task", "accuracy")
    return finish(
        figure, [look.handle() for n in BY_IMAGES if (look := PALETTE[n]).colour in shown]
    )


def by_numbers(repairs: pd.DataFrame, experts: float) -> Figure:
    """Accuracy against extra parameters over all tasks, from COUNT images per task."""
    figure, (panel,) = blank()
    own = repairs[repairs.images.eq(COUNT) & ~repairs.method.str.contains("late|refined|router")]
    families = {
        "closed_form_r1": ["closed_form"],
        "calibrated_r1": ["calibration", "calibrated"],
        "intervmerge_r1": ["intervmerge"],
        "surgery": ["surgery"],
        "featcal": ["featcal"],
    }
    names = {"closed_form_r1": "closed form", "calibrated_r1": "calibration and edits"}
    names |= {"intervmerge_r1": "IntervMerge", "surgery": "Surgery, SurgeryV2 r=16"}
    handles = []
    for name, starts in families.items():
        look = PALETTE[name]
        line = own[own.method.map(lambda m, s=starts: any(map(m.startswith, s)))]
        line = line.sort_values("numbers")
        if line.empty:
            continue
        at = line.numbers
        panel.errorbar(at, line.average, line.deviation, color=look.colour, lw=1.1)
        panel.plot(at, line.average, **look.point)
        handles.append(look.handle(names.get(name, "")))
    size_axis(panel, own.numbers)
    panel.axhline(experts, color=INK, lw=1.1)
    percent_axis(panel.yaxis)
    name_axes(figure, "extra parameters over all tasks", "accuracy")
    return finish(figure, handles)


def by_task(results: pd.DataFrame, tasks: list[str]) -> Figure:
    """Every task's accuracy, merged, repaired from COUNT images, and the expert's."""
    means = results.groupby("method")[[*tasks, "average"]].mean()
    own = results[results["merge"].eq("task_arithmetic")]
    merged = own[own.method.eq("merge")]
    repaired = own[own.images.eq(COUNT)].groupby("method")[[*tasks, "average"]].mean()
    names = ("surgery", "intervmerge_r4", "closed_form_r4", "calibration", "calibrated_r4")
    columns = {
        "merged": merged.iloc[0][[*tasks, "average"]],
        **{name: repaired.loc[name] for name in names if name in repaired.index},
        "expert": means.loc["experts"],
    }
    values = pd.DataFrame(columns).astype(float)
    return dots(PALETTE, {"accuracy": values}, percent=("accuracy",))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    results = pd.read_csv(options.results)
    found = summary(results)
    print(found.round(2).to_string())
    tasks = list(results.columns[results.columns.get_loc("seconds") + 1 : -1])
    precise = results[results.precision.eq("bf16")]
    found = found[found.precision.eq("bf16")]
    repairs = found[found["merge"].eq("task_arithmetic") & found.method.ne("merge")]
    merge = found[found.method.eq("merge") & found["merge"].eq("task_arithmetic")].average.item()
    experts = found[found.method.eq("experts")].average.item()
    with style():
        drawn = {"numbers": by_numbers(repairs, experts), "by_task": by_task(precise, tasks)}
        if repairs.images.nunique() > 1:
            drawn["images"] = by_images(repairs, merge, experts)
    for name, figure in drawn.items():
        (options.folder / f"dinov2_{name}.png").write_bytes(to_png(figure))


if __name__ == "__main__":
    main()
