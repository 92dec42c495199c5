"""The floors of docs/design.md as a test: a file imports only from lower floors, and only at its top."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "sightline"
FLOORS = {
    "numbers": 0, "batch": 0, "config": 0, "errors": 0, "torch_private": 0,
    "masks": 1,
    "attention": 2, "plots": 2,
    "layers": 3,
    "models": 4,
    "data": 5, "parallel": 5, "generation": 5,
    "planning": 6, "training": 6, "verify": 6,
    "cli": 7, "recipes": 7,
}  # fmt: skip
ABOVE = {("cli", "recipes"), ("config", "numbers")}
"""Pairs of one floor of which the first may import the second."""
SIBLINGS = {("data", "models"), ("data", "parallel"), ("parallel", "data"), ("planning", "data"), ("recipes", "cli")}
"""Pairs that may not meet although their floors would let them: data knows no models, parallel knows no data."""
MASKS_MAY_IMPORT = {"torch", "sightline"}
BACKENDS = {"reference", "sdpa", "flex", "varlen"}
FILES = sorted(ROOT.rglob("*.py"))


def room(path: Path) -> str | None:
    """The top-level package or module a file belongs to; None for sightline/__init__.py and __main__.py."""
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    return None if part.startswith("__") else part


def imports(path: Path) -> list[tuple[str, int]]:
    """(module, column) of every import statement, at any depth."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.col_offset) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide which floor they reach"
            found += [(f"{node.module}.{alias.name}", node.col_offset) for alias in node.names]
    return found


def reached(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "sightline" and len(parts) > 1 and parts[1] in FLOORS else None


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_file_keeps_to_its_floor(path: Path) -> None:
    here = room(path)
    if here is None:
        return
    assert here in FLOORS, f"{path} stands on no floor: name it in FLOORS"
    for module, _ in imports(path):
        there = reached(module)
        if there is None or there == here:
            continue
        allowed = FLOORS[there] < FLOORS[here] or (here, there) in ABOVE
        assert allowed, f"{path} (floor {FLOORS[here]}) imports {module} (floor {FLOORS[there]})"
        assert (here, there) not in SIBLINGS, f"{here} must not know {there}: {path} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_stand_at_the_top(path: Path) -> None:
    """Optional extras may stand in a `try:` at the top of the file, never inside a function."""
    tree = ast.parse(path.read_text())
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            hidden = [n.lineno for n in ast.walk(function) if isinstance(n, ast.Import | ast.ImportFrom)]
            assert not hidden, f"{path}:{hidden} imports inside {function.name}"


def test_masks_know_only_torch() -> None:
    stdlib = __import__("sys").stdlib_module_names
    for path in (ROOT / "masks").rglob("*.py"):
        for module, _ in imports(path):
            top = module.split(".")[0]
            assert top in MASKS_MAY_IMPORT or top in stdlib, f"{path} imports {module}"


def test_backends_do_not_know_each_other() -> None:
    for path in (ROOT / "attention").glob("*.py"):
        if path.stem in BACKENDS:
            for module, _ in imports(path):
                others = BACKENDS - {path.stem}
                assert not (module.startswith("sightline.attention.") and module.split(".")[2] in others), path


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_is_two(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 450, f"{path} is past 450 lines and wants to be two"
