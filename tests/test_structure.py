"""The house's own rules: who may import whom, and what a wheel must hold."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "fusion_bench_intervmerge"

# From the ground up; a module imports its own floor and those below. What stands in no room is
# where its name is.
FLOORS = [
    [
        "cache",
        "errors",
        "files",
        "pickles",
        "precision",
        "progress",
        "registry",
        "schema",
        "settings",
    ],
    ["task_names", "storage", "results", "memory", "images", "checkpoint"],
    ["interventions"],
    ["encoders", "expert_cache", "routes", "hub.names", "hub.card"],
    ["merging", "protocols", "prefix", "routing"],
    ["artifact", "model", "clip"],
    ["solving", "distillation"],
    ["analysis", "export", "hub", "report", "tinyclip"],
    ["fusion", "cli"],
]


def floor(module: str) -> int:
    names = [(n, name) for n, names in enumerate(FLOORS) for name in names]
    fits = [(len(name), n) for n, name in names if f"{module}.".startswith(f"{name}.")]
    assert fits, f"{module} stands on no floor; add it to FLOORS"
    return max(fits)[1]


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        yield ".".join(parts), ast.parse(path.read_text(encoding="utf-8"))


def imported(module: str, tree: ast.Module) -> Iterator[str]:
    """Modules of the package that are imported when this one is, by their names in it."""
    package = module.split(".")[:-1]
    for node in tree.body:  # what a function or TYPE_CHECKING imports comes later, or never
        if isinstance(node, ast.ImportFrom) and node.level:
            home = package[: len(package) - node.level + 1]
            path = [*home, *(node.module or "").split(".")] if node.module else home
            for name in node.names if not node.module else [None]:
                yield ".".join([*path, name.name] if name else path)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PACKAGE}."):
            yield str(node.module).removeprefix(f"{PACKAGE}.")


MODULES = dict(modules())


@pytest.mark.parametrize("module", [m for m in MODULES if m not in ("__init__", "_version")])
def test_imports_go_down_only(module):
    for other in imported(module, MODULES[module]):
        if other not in ("", "__init__", "__version__"):
            assert floor(other) <= floor(module), f"{module} imports {other}, which stands above"


def test_nothing_below_fusion_imports_fusionbench():
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            host = [name for name in names if name.split(".")[0] == "fusion_bench"]
            assert not host or module.startswith("fusion."), f"{module} imports {host}"


def test_every_folder_with_code_is_in_the_wheel():
    listed = set(re.findall(r'^  "([\w.]+)",$', (ROOT / "pyproject.toml").read_text(), re.M))
    for path in (ROOT / PACKAGE).rglob("*.py"):
        assert ".".join(path.parent.relative_to(ROOT).parts) in listed, path
