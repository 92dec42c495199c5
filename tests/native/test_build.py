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


@needs_compiler
def test_the_tests_pass_under_sanitizers(sources: Path) -> None:
    """Address and undefined-behavior sanitizers watch the kernel in all its tests."""
    flags = "-g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"
    done = run_setup(sources, "build_ext", "--inplace", CXXFLAGS=flags)
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
    files = ("attention/test_native", "layers/test_native_norm", "native/test_plan", "native/test_library")
    tests = [f"tests/{file}.py" for file in files]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-m", "not slow", "-p", "no:cacheprovider", *tests]
    tested = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert tested.returncode == 0, tested.stdout[-5000:] + tested.stderr[-5000:]
    assert " passed" in tested.stdout and "skipped" not in tested.stdout
