"""Private APIs of PyTorch stand in one file of a package, `torch_private.py`, to look at when PyTorch changes."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "sightline"
ELSEWHERE = {"masks/mask.py", "parallel/context/shard.py"}
"""Pytrees, registered where they are defined: `plan_context` and masks are imported without the rest of PyTorch."""
FILES = sorted(
    path
    for path in ROOT.rglob("*.py")
    if path.name != "torch_private.py" and str(path.relative_to(ROOT)) not in ELSEWHERE
)


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def private_names(path: Path) -> list[str]:
    """Imports from torch and attributes of it that begin with an underscore anywhere."""
    tree = ast.parse(path.read_text())
    imported = {"torch": "torch"}  # what a name at the top of the file stands for
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    names = [name for name in imported.values() if name.startswith("torch")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, *rest = ast.unparse(node).split(".")
            if all(map(str.isidentifier, rest)) and imported.get(first, "").startswith("torch"):
                names.append(".".join([imported[first], *rest]))
    return sorted({name for name in names if is_private(name)})


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_private_torch_stands_in_one_file(path: Path) -> None:
    assert not private_names(path)
