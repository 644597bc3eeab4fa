"""Imports only go down: what each package of lib may import, as lib/README.md draws it."""

import ast
from collections.abc import Iterator
from pathlib import Path

from conftest import ROOT

# From the ground up; packages on one level do not import each other.
LEVELS = (
    {"models", "datasets"},
    {"runtime"},
    {"files"},
    {"loading"},
    {"objectives", "features", "graph", "labels"},
    {"training", "propagation", "report"},
    {"cli"},
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}


def modules() -> list[Path]:
    return sorted(p for top in ("lib", "models", "datasets") for p in (ROOT / top).rglob("*.py"))


def package_of(name: str) -> str:
    """Package of a dotted name of ours: `lib.files.checkpoint` -> files, `datasets.images` -> datasets."""
    parts = name.split(".")
    return parts[1] if parts[0] == "lib" and len(parts) > 1 else parts[0]


def imported(path: Path) -> Iterator[str]:
    """The packages of ours that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] in ("lib", "models", "datasets"):
                yield package_of(name)


def test_every_package_has_a_level():
    found = {p.name for p in (ROOT / "lib").iterdir() if (p / "__init__.py").is_file()}
    assert found | {"models", "datasets"} == set(LEVEL)


def test_imports_only_go_down():
    upward = []
    for path in modules():
        own = package_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        own_level = -1 if own == "__init__" else LEVEL[own]  # lib/__init__.py is below all others
        upward += [
            f"{path.relative_to(ROOT)} imports {other}"
            for other in sorted(set(imported(path)) - {own})
            if LEVEL[other] >= own_level
        ]
    assert not upward
