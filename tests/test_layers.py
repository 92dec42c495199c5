"""The layers of docs/design.md: import contracts, what the page says of them, how long a file or function may be."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from sightline.attention import BACKENDS

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "sightline").rglob("*.py"))


def test_imports_keep_the_contracts() -> None:
    """In a process of its own, since import-linter disables the loggers of the one it runs in."""
    script = (
        "from importlinter.cli import lint_imports; raise SystemExit(lint_imports('pyproject.toml', no_cache=True))"
    )
    linted = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout + linted.stderr


def test_the_page_says_what_the_contract_says() -> None:
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    section = (ROOT / "docs" / "design.md").read_text().split("\n## Layers\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\d+) \| (.+?) \| ", section, flags=re.M)
    page = [" | ".join(re.findall(r"`(\w+)(?:/|\.py)`", names)) for _, names in rows]
    assert page == contract["layers"]
    assert [int(number) for number, _ in rows] == list(reversed(range(len(rows))))


def test_the_contract_of_backends_names_them_all() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (backends,) = (contract["modules"] for contract in contracts if contract["type"] == "independence")
    assert set(backends) == {type(backend).__module__ for backend in BACKENDS}


def test_imports_stand_at_the_top() -> None:
    """Nothing is imported inside a function: not in the package, and without an exception of the linter."""
    hidden = [
        f"{path}:{node.lineno}"
        for path in FILES
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert not hidden


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_or_function_is_two(path: Path) -> None:
    """A file has at most 350 lines, a function 50, its docstring left out."""
    text = path.read_text()
    assert len(text.splitlines()) <= 350, f"{path} has more than 350 lines: split it"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1 - len((ast.get_docstring(node) or "").splitlines())
            assert lines <= 50, f"{path}: {node.name} has {lines} lines: split it"
