"""Builds of the native library: wheels, installs without a compiler, and the tests under sanitizers."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sightline.native.library import FILE

ROOT = Path(__file__).parents[2]
COMPILER = next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler was found")
pytestmark = pytest.mark.slow


def run_setup(directory: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py with `variables` in its environment."""
    environment = {**os.environ, **variables}
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of the sources without built files."""
    copy = tmp_path / "sources"
    ignored = shutil.ignore_patterns("__pycache__", "libsightline.*")
    shutil.copytree(ROOT / "sightline", copy / "sightline", ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


def wheel_in(directory: Path) -> tuple[str, list[str]]:
    """Return the name of the only wheel in dist/, and the names of its files."""
    (wheel,) = (directory / "dist").glob("*.whl")
    return wheel.name, zipfile.ZipFile(wheel).namelist()


@needs_compiler
def test_a_wheel_has_the_library_and_a_platform_but_no_python_version(sources: Path) -> None:
    done = run_setup(sources, "bdist_wheel")
    assert done.returncode == 0, done.stdout + done.stderr
    name, files = wheel_in(sources)
    assert "-py3-none-" in name and "any" not in name
    assert f"sightline/native/{FILE}" in files


def test_without_a_compiler_the_wheel_is_pure(sources: Path, tmp_path: Path) -> None:
    done = run_setup(sources, "bdist_wheel", PATH=str(tmp_path), CXX="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no C++ compiler was found, so the native CPU kernel is not built" in done.stderr
    name, files = wheel_in(sources)
    assert name.endswith("-py3-none-any.whl") and not any(FILE in file for file in files)


@needs_compiler
def test_a_compiler_that_fails_does_not_fail_the_install(sources: Path) -> None:
    done = run_setup(sources, "build_ext", "--inplace", CXXFLAGS="--no-such-option")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no-such-option" in done.stdout + done.stderr
    assert not (sources / "sightline" / "native" / FILE).exists()


def find_runtime(name: str) -> str:
    """Return the path of a library of the compiler, or its name if the compiler does not have it."""
    command = [str(COMPILER), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def run_tests_under_sanitizers(sources: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    """Build the library with sanitizers of addresses and of undefined behavior, and run tests with it."""
    flags = "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"
    done = run_setup(sources, "build_ext", "--inplace", "--force", CXXFLAGS=flags)
    library = sources / "sightline" / "native" / FILE
    assert library.exists(), done.stdout + done.stderr
    # libstdc++ too: the sanitizer looks up its functions when the process starts, before PyTorch loads it.
    runtimes = [find_runtime(name) for name in ("libasan.so", "libstdc++.so.6")]
    if not all(Path(runtime).is_absolute() for runtime in runtimes):
        pytest.skip(f"{COMPILER} has no shared libraries to load before Python, got {runtimes}")
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "SIGHTLINE_NATIVE_LIBRARY": str(library),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-m", "not slow", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@needs_compiler
def test_the_tests_pass_under_sanitizers(sources: Path) -> None:
    """All tests of the kernel but one: a process under a sanitizer reserves more addresses than a limit allows."""
    attention = [f"tests/attention/test_native{name}.py" for name in ("", "_odd_values", "_threads")]
    limited = "tests/attention/test_native_threads.py::test_without_memory_an_error_is_raised"
    names = ("layers/test_native_norm", "native/test_linear", "native/test_plan", "native/test_library")
    others = [f"tests/{name}.py" for name in names]
    tested = run_tests_under_sanitizers(sources, *attention, *others, f"--deselect={limited}")
    assert tested.returncode == 0, tested.stdout[-5000:] + tested.stderr[-5000:]
    assert " passed" in tested.stdout and "skipped" not in tested.stdout


@needs_compiler
def test_sanitizers_find_a_read_past_the_end(sources: Path) -> None:
    """Copy one token too many."""
    header = sources / "sightline" / "native" / "csrc" / "tensors.h"
    right, wrong = "for (int64_t i = 0; i < count; i++, from", "for (int64_t i = 0; i <= count; i++, from"
    text = header.read_text()
    assert text.count(right) == 1
    header.write_text(text.replace(right, wrong))
    tested = run_tests_under_sanitizers(sources, "tests/attention/test_native.py", "-k", "test_every_head_dim")
    assert tested.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in tested.stderr
