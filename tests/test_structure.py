"""The house's own rules: who may import whom."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "fusion_bench_intervmerge"
TREES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text("utf-8"))
    for path in (ROOT / PACKAGE).rglob("*.py")
}


def imported(module: str) -> Iterator[str]:
    """Every module that a module names in an import: in functions and for types alone as well."""
    package = module.split(".")[:-1]
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            home = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*home, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in TREES or f"{inner}.__init__" in TREES else base


def own(name: str) -> str | None:
    """The module of the package that an import names, if any; a package is its ``__init__``."""
    return next((m for m in (name, f"{name}.__init__") if m in TREES), None)


GRAPH = {module: {m for name in imported(module) if (m := own(name))} for module in TREES}


def test_no_module_imports_itself_by_a_detour():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_nothing_below_fusion_imports_fusionbench():
    for module in TREES:
        if not module.startswith(f"{PACKAGE}.fusion"):
            host = [name for name in imported(module) if name.split(".")[0] == "fusion_bench"]
            assert not host, f"{module} imports {host}"
