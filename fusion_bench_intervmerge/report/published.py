"""Published numbers (``published.yaml``), and a run's own beside them.

A run of ``+experiment=published`` leaves one file, ``published.json``, a ``Found``: whoever has it
needs nothing else of the run.
"""
# ruff: noqa: RUF012 - pydantic copies defaults that are mutable

from __future__ import annotations

import json
import re
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
import yaml
from pydantic import Field, model_validator
from rich.console import Console
from typing_extensions import Self

from ..config import ConfigError, Json, Settings
from .formatting import NONE, percent
from .tables import rich

FILE = "published.json"
EXPECTED = f"the {FILE} of a run of `fusion_bench +experiment=published`"


class Choice(Settings):
    """Which published table.

    Args:
        size: of the encoder: ViT-B/32, B/16 or L/14.
        tasks: how many.
        checkpoints: whose: FusionBench's, or with ``openclip`` the task-vectors paper's.
    """

    size: Literal["b32", "b16", "l14"] = "b32"
    tasks: Annotated[Literal[8, 14, 20], Field(description="8, 14, 20")] = 8
    checkpoints: Literal["fusion_bench", "openclip"] = "fusion_bench"

    @model_validator(mode="after")
    def _exists(self) -> Self:
        if self.checkpoints == "openclip" and self.tasks != 8:
            raise ConfigError("tasks", f"{self.tasks}, but openclip has checkpoints of 8", "8")
        return self

    @property
    def pool(self) -> str:
        """The name of its model pool and of its task pool."""
        family = "openclip" if self.checkpoints == "openclip" else "clip"
        return f"{family}-vit-{self.size}_{'TA8' if self.tasks == 8 else f'TALL{self.tasks}'}"


class Published(Choice):
    """A table of ``published.yaml``.

    Attributes:
        source, protocol: where it stands, and how its numbers came about.
        rows: name of a model -> the tasks' accuracies and their average in percent, or this alone.
    """

    source: str
    protocol: str
    rows: dict[str, list[float] | float]

    def average(self, name: str) -> float:
        """In percent."""
        row = self.rows[name]
        return row[-1] if isinstance(row, list) else row


class FoundModel(Settings):
    """A model of a run.

    Attributes:
        accuracy: task -> share of its test images.
        images: the unlabelled images it was found on, in words; empty: none.
        transductive: whether these are the tested ones; None: it saw none.
        extra_parameters: over all tasks.
        seconds: of merging or repairing.
    """

    accuracy: dict[str, float]
    images: str = ""
    transductive: bool | None = None
    extra_parameters: int | None = None
    seconds: float | None = None


class Found(Choice):
    """What a run found.

    Attributes:
        version: of this layout.
        software: package -> version.
        device: what it ran on.
        overrides: of the command line.
        models: name -> model; of several seeds, ``.../seed0``.
        problems: what did not run -> why, in one line.
    """

    version: Literal[1] = 1
    software: dict[str, str] = {}
    device: str = ""
    overrides: list[str] = []
    models: dict[str, FoundModel]
    problems: dict[str, str] = {}


@cache
def published() -> tuple[list[Published], dict[str, int]]:
    """The published tables, and the number of test images by task."""
    content = yaml.safe_load((files(__package__) / "published.yaml").read_text("utf-8"))
    return [Published.read(table) for table in content["tables"]], content["test_images"]


def read_found(path: str | Path) -> Found:
    """Read the file of a run, or the one in a run's folder.

    Raises:
        ConfigError: no such file, or another layout.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    try:
        content: Json = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(str(path), f"cannot be read ({reason})", EXPECTED) from None
    return Found.read(content, str(path))


def compare(found: Found) -> pd.DataFrame:
    """Our averages beside the published ones, in percent.

    Returns:
        ``name``, ``ours`` and ``spread`` (over seeds; NaN of one), ``published``, ``source`` (its
        number among all tables), ``same`` (whether it is of the same checkpoints), ``images``,
        ``transductive``. A model that several published has as
        many lines; tables of other checkpoints are for models that these have not.
    """
    averages: dict[str, list[float]] = {}
    about: dict[str, FoundModel] = {}
    for name, model in found.models.items():
        name = re.sub(r"/seed\d+$", "", name)
        mean = sum(model.accuracy.values()) / len(model.accuracy)
        averages.setdefault(name, []).append(100 * mean)
        about.setdefault(name, model)
    here = (found.size, found.tasks)
    tables = [(i, t) for i, t in enumerate(published()[0]) if (t.size, t.tasks) == here]
    lines = []
    for name, values in averages.items():
        ours = pd.Series(values)
        rows = [(i, t) for i, t in tables if name in t.rows]
        own = [(i, t) for i, t in rows if t.checkpoints == found.checkpoints]
        line = {"name": name, "ours": ours.mean(), "spread": ours.std()}
        line |= {key: getattr(about[name], key) for key in ("images", "transductive")}
        for source, table in own or rows:
            value = {"published": table.average(name), "source": source, "same": bool(own)}
            lines.append(line | value)
        if not rows:
            lines.append(line | {"published": None, "source": None, "same": None})
    return pd.DataFrame(lines).astype({"published": float, "source": "Int64"})


def show(found: Found, console: Console) -> None:
    """Print ours, the published number, the difference, where that stands, and what saw what."""
    table, tables = compare(found), published()[0]
    sources = list(table["source"].dropna().unique())
    seen = {True: "tested", False: "others", None: NONE}
    lines = []
    for line in table.to_dict("records"):
        base, _, method = line["name"].partition("/")
        row = [f"+ {method}" if method else base, percent(line["ours"] / 100, line["spread"] / 100)]
        if pd.isna(line["published"]):
            row += [NONE] * 3
        else:
            mark = "" if line["same"] else "*"
            where = f"[{sources.index(line['source']) + 1}]"
            difference = line["ours"] - line["published"]
            row += [f"{line['published']:.1f}", f"{difference:+.1f}{mark}", where]
        lines.append([*row, seen[line["transductive"]]])
    columns = ["model", "ours", "published", "difference", "source", "images"]
    names = [line[0] for line in lines]
    merges = [i for i, name in enumerate(names[1:]) if name[0] != "+" and name != names[i]]
    shown = rich(pd.DataFrame(lines, columns=columns), merges)
    which = f"{found.size}, {found.tasks} tasks, checkpoints of {found.checkpoints}"
    shown.title = f"Average accuracy in percent: {which}"
    console.print(shown)
    plain = Console(file=console.file, soft_wrap=True, highlight=False, markup=False)
    for number, source in enumerate(sources, start=1):
        there = tables[int(source)]
        plain.print(f"[{number}] {there.source}: {there.protocol}")
    if any(same is False for same in table["same"]):
        plain.print("* published of other checkpoints")
    for images in filter(None, table["images"].unique()):
        parts = table["name"][table["images"] == images].str.partition("/")
        methods = dict.fromkeys(parts[2].where(parts[2] != "", parts[0]))
        plain.print(f"Ours, {images}: {', '.join(methods)}")
    for name, reason in found.problems.items():
        plain.print(f"{name} did not run: {reason}")
