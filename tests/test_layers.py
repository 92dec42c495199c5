"""Import contracts, the table of layers in docs/design.md, and the maximum length of files and functions."""

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


def test_import_contracts() -> None:
    """import-linter runs in a subprocess because it disables the loggers of its process."""
    script = (
        "from importlinter.cli import lint_imports; raise SystemExit(lint_imports('pyproject.toml', no_cache=True))"
    )
    linted = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout + linted.stderr


def test_design_page_lists_the_layers_of_the_contract() -> None:
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    section = (ROOT / "docs" / "design.md").read_text().split("\n## Layers\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\d+) \| (.+?) \| ", section, flags=re.M)
    page = [" | ".join(re.findall(r"`(\w+)(?:/|\.py)`", names)) for _, names in rows]
    assert page == contract["layers"]
    assert [int(number) for number, _ in rows] == list(reversed(range(len(rows))))


def test_backend_contract_lists_every_backend() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (backends,) = (contract["modules"] for contract in contracts if contract["type"] == "independence")
    assert set(backends) == {type(backend).__module__ for backend in BACKENDS}


def test_imports_are_at_module_level() -> None:
    """No function or class of the package contains an import, not even one that the linter is told to ignore."""
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
def test_maximum_length_of_files_and_functions(path: Path) -> None:
    """A file has at most 350 lines, a function at most 50 without its docstring."""
    text = path.read_text()
    assert len(text.splitlines()) <= 350, f"{path} has more than 350 lines: split it"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1 - len((ast.get_docstring(node) or "").splitlines())
            assert lines <= 50, f"{path}: {node.name} has {lines} lines: split it"


def test_nothing_but_commands_can_import_hf() -> None:
    """`hf` is above all packages but `cli`, and no package evades the contract by importing it by name."""
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    assert contract["layers"][:2] == ["cli", "hf"]
    above = (ROOT / "sightline" / "cli", ROOT / "sightline" / "hf")
    below = [path for path in FILES if not any(path.is_relative_to(directory) for directory in above)]
    assert not [path for path in below if re.search(r"""import_module\(\s*["']sightline\.hf""", path.read_text())]


def test_the_library_and_its_commands_import_no_trainer() -> None:
    """transformers takes seconds to import; only `sightline.hf` and commands for its models need it."""
    script = (
        "import sys, sightline; from sightline.cli import main; main.run(['train', '--help']); main.run(['hf']); "
        "print(*({'transformers', 'trl', 'accelerate', 'peft', 'datasets', 'sightline.hf'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "", done.stdout[-200:] + done.stderr


def test_hf_without_transformers_names_the_extra() -> None:
    script = "import sys; sys.modules['transformers'] = None; import sightline.hf"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    error = done.stderr.splitlines()[-1]
    assert error == "ImportError: sightline.hf needs transformers 5: pip install 'sightline[hf]'"
