"""Writes the tables of docs/settings.md from the code: ``python docs/settings.py``.

A key's default is the shipped config's, its meaning the docstring's of what reads it, or the
comment beside it in the config. tests/test_docs.py fails while a table is not what this writes.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from hydra.utils import get_class
from pydantic_core import PydanticUndefined

from fusion_bench_intervmerge.config import Settings
from fusion_bench_intervmerge.fusion.union import StreamSettings
from fusion_bench_intervmerge.interventions.config import InterventionConfig
from fusion_bench_intervmerge.interventions.functions import FUNCTIONS, build_function
from fusion_bench_intervmerge.merging import CoefficientSettings
from fusion_bench_intervmerge.model.router import RouterSettings

DOCS = Path(__file__).parent
CONFIG = DOCS.parent / "config"
PACKAGE = "fusion_bench_intervmerge."
MAIN = "intervmerge"


def render(page: str) -> str:
    """The page with every ``<!-- begin: NAME -->`` block filled in anew."""
    blocks = {
        "edits": edits,
        "functions": functions,
        "method": method,
        "coefficients": coefficients,
        "router": router,
        "stream": stream,
        "others": others,
        "presets": presets,
    }

    def fill(found: re.Match) -> str:
        return f"{found[1]}\n\n{blocks[found[2]]()}\n\n{found[3]}"

    pattern = r"(<!-- begin: (\w+) -->).*?(<!-- end -->)"
    return re.sub(pattern, fill, page, flags=re.DOTALL)


# -- the tables ------------------------------------------------------------------------------------


def edits() -> str:
    return keys(fields(InterventionConfig))


def functions() -> str:
    """The forms, and how many numbers one edit is, counted at ViT-B/32's width."""
    rows = []
    for name in sorted(FUNCTIONS, key=lambda n: (n != "noreft", n == "constant", n)):
        formula = re.split(": | with |, ", first_line(FUNCTIONS[name]))[0]
        counts, folds = [], set()
        for rank in (1, 4):
            function = build_function(name, 768, rank)
            counts += [size(function), size(function.folded())]
            folds.add(function.folded().name)
        (folded,) = folds
        rows.append(
            [code(name), formula.removesuffix("."), *(f"{counts[i]:,}" for i in (0, 2)),
             "—" if folded == name else f"{code(folded)}: {counts[1]:,}; {counts[3]:,}"]
        )  # fmt: skip
    head = ["function", "formula", "numbers at r = 1", "r = 4", "folds to"]
    return table(head, rows, right=(2, 3))


def method() -> str:
    file = CONFIG / "method" / f"{MAIN}.yaml"
    cls = get_class(target(file))
    return keys(documented(file, cls, leave=("interventions", "coefficients")))


def coefficients() -> str:
    return keys(fields(CoefficientSettings))


def router() -> str:
    return keys(fields(RouterSettings))


def stream() -> str:
    return keys(fields(StreamSettings))


def others() -> str:
    """The other algorithms: those that a shipped config of its own names."""
    parts, there = [], {}
    for name, file in method_files():
        cls = target(file)
        if cls is None or name == MAIN or cls in {target(f) for n, f in method_files() if n < name}:
            continue
        found = get_class(cls)
        parts.append(f"### `method={name}`\n\n{ticks(first_line(found))}")
        base = next((base for base in found.__mro__ if base in there), None)
        if base is not None:  # what it adds
            parts[-1] += f". The settings of `method={there[base]}`, and:"
        parts.append(keys(documented(file, found, base.Settings.model_fields if base else ())))
        there[found] = name
    return "\n\n".join(parts)


def presets() -> str:
    rows = []
    for name, file in method_files():
        first = re.split(r"(?<=\.)\s", comment_above(file))[0]  # the file has the rest
        rows.append([code(f"method={name}"), ticks(first), setting_list(file)])
    return table(["preset", "what it is", "what it sets"], rows)


# -- reading configs -------------------------------------------------------------------------------


def method_files() -> list[tuple[str, Path]]:
    """Name on the command line -> file, those of the main method first."""
    root = CONFIG / "method"
    found = [(str(f.relative_to(root).with_suffix("")), f) for f in root.rglob("*.yaml")]
    return sorted(found, key=lambda pair: (pair[0].partition("/")[0] != MAIN, pair[0]))


def load(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text())


def target(file: Path) -> str | None:
    """The class that a config names itself, where it is ours."""
    found = load(file).get("_target_", "")
    return found if found.startswith(PACKAGE) else None


def leaves(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value, of what a reader would set; mappings without keys are leaves."""
    for key, entry in settings.items():
        if not prefix and key in ("defaults", "_target_", "_recursive_"):
            continue
        if isinstance(entry, dict) and entry and "_target_" not in entry:
            yield from leaves(entry, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", entry


def comments(file: Path) -> dict[str, str]:
    """Dotted key -> the comment beside it."""
    found, path = {}, []
    for line in file.read_text().splitlines():
        match = re.match(r"( *)(\w+):([^#]*)(?:# (.*))?$", line)
        if not match:
            continue
        path = [*path[: len(match[1]) // 2], match[2]]
        if match[4]:
            found[".".join(path)] = match[4]
    return found


def comment_above(file: Path) -> str:
    """The comment that a config starts with."""
    lines = []
    for line in file.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").strip())
    return " ".join(line for line in lines if not line.startswith("@package"))


def documented(file: Path, cls: type, leave: Iterable[str] = ()) -> Iterator[tuple[str, Any, str]]:
    """(key, default, meaning) of everything that a class takes, with its config's defaults."""
    settings, beside = load(file), comments(file)
    for name, default, meaning in fields(cls.Settings):
        if name in leave:
            continue
        default = settings.get(name, default)
        if isinstance(default, dict) and default and "_target_" not in default and any(
            key.startswith(f"{name}.") for key in beside
        ):  # fmt: skip
            for key, entry in leaves({name: default}):
                yield key, entry, beside.get(key) or meaning
        else:
            yield name, from_defaults(settings, name) or default, meaning


def fields(cls: type[Settings]) -> Iterator[tuple[str, Any, str]]:
    """(key, default, meaning) of every field; without a default it is pydantic's own mark."""
    meaning = {k: v for base in reversed(cls.__mro__) for k, v in described(base).items()}
    for name, field in cls.model_fields.items():
        yield name, field.default, meaning[name]


def from_defaults(settings: dict[str, Any], name: str) -> str | None:
    """What a config's defaults list puts under a key."""
    found = []
    for entry in settings.get("defaults", []):
        for group, choice in entry.items() if isinstance(entry, dict) else ():
            package = group.rpartition("@")[2]
            if package == name:
                return f"`{choice}`"
            if package.startswith(f"{name}."):
                found.append(f"`{package.removeprefix(name + '.')}`")
    return ", ".join(found) or None


def setting_list(file: Path) -> str:
    """What a preset changes, as one would write it on the command line."""
    settings = load(file)
    shown = []
    for entry in settings.get("defaults", []):
        for group, choice in entry.items() if isinstance(entry, dict) else ():
            if group.startswith("override "):
                shown.append(code(f"method@method.{group.rpartition('@')[2]}={choice}"))
    if target(file) is None:
        shown += [code(f"method.{key}={yaml_text(entry)}") for key, entry in leaves(settings)]
        return " ".join(shown) or "nothing: the default, by name"
    if file.stem == MAIN:
        return "the defaults above"
    return f"see `{target(file).rpartition('.')[2]}`, below"


# -- reading docstrings ----------------------------------------------------------------------------


def described(thing: Any, section: str = "Args") -> dict[str, str]:
    """Name -> meaning, from a Google-style section of a docstring."""
    doc = inspect.getdoc(thing) or ""
    match = re.search(rf"^{section}:\n((?:(?: .*)?\n?)*)", doc, flags=re.MULTILINE)
    found: dict[str, str] = {}
    names: list[str] = []
    for line in textwrap.dedent(match[1] if match else "").splitlines():
        start = re.match(r"((?:\w+)(?:, \w+)*): (.*)", line)
        if start:
            names = start[1].split(", ")
            found |= dict.fromkeys(names, start[2])
        else:
            for name in names:
                found[name] = f"{found[name]} {line.strip()}".strip()
    return found


def first_line(thing: Any) -> str:
    return (inspect.getdoc(thing) or "").splitlines()[0]


def size(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# -- markdown --------------------------------------------------------------------------------------


def keys(rows: Iterable[tuple[str, Any, str]]) -> str:
    shown = [[code(key), value(default), ticks(meaning)] for key, default, meaning in rows]
    return table(["key", "default", "meaning"], shown)


def table(head: list[str], rows: list[list[str]], right: Iterable[int] = ()) -> str:
    rule = ["---:" if column in right else "---" for column in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def code(text: str) -> str:
    return f"`{text}`"


def value(entry: Any) -> str:
    """A default as YAML writes it."""
    if entry is PydanticUndefined or entry == "???":
        return "must be given"
    if isinstance(entry, str) and entry.startswith("`"):
        return entry
    return code(yaml_text(list(entry) if isinstance(entry, tuple) else entry))


def yaml_text(entry: Any) -> str:
    text = yaml.safe_dump(entry, default_flow_style=True, width=1000, sort_keys=False)
    return text.strip().removesuffix("...").strip()


def ticks(text: str) -> str:
    """Docstrings' words as a table's cell: Markdown's backticks, YAML's null."""
    text = re.sub(r"``(.+?)``", r"`\1`", text).replace("|", "\\|").replace("`None`", "`null`")
    text = re.sub(r":(?:class|func|mod):`~?\.?([\w.]+)`", r"`\1`", text)
    return text if ". " in text or text.endswith("...") else text.removesuffix(".")


if __name__ == "__main__":
    page = DOCS / "settings.md"
    page.write_text(render(page.read_text()))
