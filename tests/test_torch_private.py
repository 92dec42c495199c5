"""Private APIs of PyTorch are used only in files named `torch_private.py`, to find them when PyTorch changes."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "sightline"
EXCEPTIONS = {"masks/mask.py", "parallel/context/shard.py"}
"""Pytrees are registered where they are defined, so that importing masks and `plan_context` loads little of PyTorch."""
FILES = sorted(
    path
    for path in ROOT.rglob("*.py")
    if path.name != "torch_private.py" and str(path.relative_to(ROOT)) not in EXCEPTIONS
)


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def private_names(path: Path) -> list[str]:
    """Return imports from torch and attributes of torch that have a part with a leading underscore."""
    tree = ast.parse(path.read_text())
    imported = {"torch": "torch"}  # {local name: full name}
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
def test_no_private_torch_api_outside_torch_private(path: Path) -> None:
    assert not private_names(path)
