"""Build of the native CPU kernel; everything else about the package is in pyproject.toml.

The kernel is a plain shared library that Python loads with ctypes. It needs a C++ compiler, and neither torch nor the
headers of Python. Without a compiler the package is installed without it. CXX, CXXFLAGS and LDFLAGS are respected.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CSRC = Path("sightline/native/csrc")
LIBRARY = "libsightline.dylib" if sys.platform == "darwin" else "libsightline.so"
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wall", "-Wextra", "-Wshadow"),
)
AVX2 = ("-mavx2", "-mfma")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma")
VARIANTS = {"baseline": (4, ()), "avx2": (8, AVX2), "avx512": (16, AVX512)}
"""Instruction sets of the kernel: floats per vector and flags. Other processors than x86-64 have only the first."""


KERNELS = ("forward", "backward", "linear", "norm")
"""Sources that are compiled for each instruction set."""


def find_compiler() -> list[str]:
    """Return the command of the C++ compiler, or an empty list if there is none."""
    if sys.platform == "win32":
        return []
    names = (os.environ.get("CXX", ""), "c++", "g++", "clang++")
    return next((shlex.split(name) for name in names if name and shutil.which(shlex.split(name)[0])), [])


class BuildNative(build_ext):
    """Compiles the kernel once per instruction set, and links all into one library that chooses at run time."""

    def build_extension(self, ext: Extension) -> None:
        compiler, objects, is_x86 = find_compiler(), [], platform.machine() in ("x86_64", "AMD64")
        common = [*FLAGS, *(["-DSIGHTLINE_X86"] if is_x86 else []), *shlex.split(os.environ.get("CXXFLAGS", ""))]
        directory = Path(self.build_temp)
        directory.mkdir(parents=True, exist_ok=True)
        jobs = [(CSRC / f"{name}.cpp", name, ()) for name in ("dispatch", "plan")]
        for name, (width, flags) in VARIANTS.items() if is_x86 else [("baseline", VARIANTS["baseline"])]:
            defines = (f"-DSIGHTLINE_ISA={name}", f"-DSIGHTLINE_LANES={width}")
            jobs += [(CSRC / f"{source}.cpp", f"{source}_{name}", (*flags, *defines)) for source in KERNELS]
        for source, name, flags in jobs:
            objects.append(str(directory / f"{name}.o"))
            self.run_compiler([*compiler, *common, *flags, "-c", str(source), "-o", objects[-1]])
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        linked = output.with_name(f".{output.name}.partial")  # a running process may have mapped the old file
        link_flags = shlex.split(f"{os.environ.get('CXXFLAGS', '')} {os.environ.get('LDFLAGS', '')}")
        self.run_compiler([*compiler, "-shared", *objects, *link_flags, "-o", str(linked)])
        linked.replace(output)

    def run_compiler(self, command: list[str]) -> None:
        self.announce(shlex.join(command), level=2)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise CompileError(f"{shlex.join(command)} failed:\n{done.stderr}")
        print(done.stderr, end="")

    def get_ext_filename(self, fullname: str) -> str:
        """Return the path of the library: not the name of a Python module."""
        return str(Path(*fullname.split(".")[:-1], LIBRARY))


class Wheel(bdist_wheel):
    """Tags the wheel for the platform but for no version of Python: the library does not use Python's ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


extension = Extension(
    "sightline.native.libsightline",
    sources=[str(CSRC / f"{name}.cpp") for name in (*KERNELS, "dispatch", "plan")],
    depends=[str(path) for path in sorted(CSRC.glob("*.h"))],
    optional=True,  # a compiler that fails gives a warning
)
if not find_compiler():
    print(
        "warning: no C++ compiler was found, so the native CPU kernel is not built: attention on a CPU will use the "
        "slower tiled backend. Install g++ or clang++ and install again to build it.",
        file=sys.stderr,
    )
setup(
    ext_modules=[extension] if find_compiler() else [],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
