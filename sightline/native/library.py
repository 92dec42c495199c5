"""Load the shared library of the native CPU kernel and choose its instruction set."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import struct
import sys
import warnings
from pathlib import Path
from typing import Any

from sightline.native.torch_private import find_thread_pool

FILE = "libsightline.dylib" if sys.platform == "darwin" else "libsightline.so"
ARGUMENTS = struct.Struct("9q2d41q")
"""Layout of `sightline_attention` in csrc/attention.h: fields of 8 bytes, of which scale and softcap are floats."""
OUT_OF_MEMORY = 4
"""Return code in csrc/attention.h."""
ISA_VARIABLE = "SIGHTLINE_NATIVE_ISA"
"""Environment variable that selects an instruction set, in place of the widest one that the processor has."""
LIBRARY_VARIABLE = "SIGHTLINE_NATIVE_LIBRARY"
"""Environment variable with the path of another library, such as one that is built with sanitizers."""


class Missing(Exception):
    """The library cannot be used. The message gives the reason and the remedy."""


@functools.cache
def _load() -> ctypes.CDLL | Missing:
    path = Path(os.environ.get(LIBRARY_VARIABLE) or Path(__file__).with_name(FILE))
    if not path.exists():
        compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
        if compiler is None:
            return Missing("no C++ compiler was found; install g++ or clang++, and run `make setup` again")
        return Missing(f"{path} does not exist; run `make setup`, or install again with {compiler}")
    try:
        library = ctypes.CDLL(str(path))
        _declare(library)
    except (OSError, AttributeError) as error:
        return Missing(f"{path} cannot be loaded ({error}); run `make setup` to build it again")
    if library.sightline_native_struct_size() != ARGUMENTS.size:
        return Missing(f"{path} was built from other sources; run `make setup` to build it again")
    pool = find_thread_pool()
    if pool is None:
        warnings.warn("this PyTorch has no thread pool for C code: the native kernel uses one thread", stacklevel=2)
    library.sightline_native_init(*(pool or (None, None)))
    name = os.environ.get(ISA_VARIABLE)
    if name:
        select_instruction_set(name, library)
    return library


def _declare(library: ctypes.CDLL) -> None:
    """Declare the types of the functions in csrc/attention.h, csrc/linear.h and csrc/norm.h."""
    text, code, size, pointer = ctypes.c_char_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
    norms: dict[str, list[Any]] = {
        "forward": [pointer, size, pointer, size, size, ctypes.c_double, pointer, pointer],
        "backward": [pointer, pointer, size, pointer, pointer, size, size, pointer, pointer, pointer],
    }
    for name, types in norms.items():
        function = getattr(library, f"sightline_rms_norm_{name}")
        function.argtypes, function.restype = types, code
    library.sightline_native_init.argtypes = [pointer, pointer]
    library.sightline_native_init.restype = None
    for name in ("isa", "compiled", "supported"):
        function = getattr(library, f"sightline_native_{name}")
        function.argtypes, function.restype = [], text
    library.sightline_native_select.argtypes = [text]
    library.sightline_native_select.restype = code
    library.sightline_native_struct_size.argtypes = []
    library.sightline_native_struct_size.restype = size
    library.sightline_native_error.argtypes = [code]
    library.sightline_native_error.restype = text
    numbers = ctypes.POINTER(size)
    inputs: list[Any] = [pointer, pointer, size, size, size, size]
    outputs: list[Any] = [pointer, size, pointer, size, numbers, numbers]
    library.sightline_attention_plan.argtypes = inputs + outputs
    library.sightline_attention_plan.restype = code
    for name in ("forward", "backward"):
        function = getattr(library, f"sightline_attention_{name}")
        function.argtypes, function.restype = [text], code  # the arguments are packed in bytes
    library.sightline_linear.argtypes, library.sightline_linear.restype = [text], code


def get_library() -> ctypes.CDLL:
    """Return the library, loaded at the first call.

    Raises:
        Missing: if it is not built, or was built from other sources.
        ValueError: if SIGHTLINE_NATIVE_ISA names an instruction set that cannot be used.
    """
    library = _load()
    if isinstance(library, Missing):
        raise library
    return library


def why_missing() -> str | None:
    """Return why the library cannot be used and the remedy, or None if it can."""
    library = _load()
    return str(library) if isinstance(library, Missing) else None


def check(code: int) -> None:
    """Check the return code of a function of the library.

    Raises:
        MemoryError: if the library found no memory.
        ValueError: if it refused the arguments.
    """
    if code:
        text = get_library().sightline_native_error(code).decode()
        raise (MemoryError if code == OUT_OF_MEMORY else ValueError)(f"native kernel: {text}")


def instruction_set() -> str:
    """Return the name of the instruction set in use: "baseline", "avx2" or "avx512"."""
    return get_library().sightline_native_isa().decode()


def supported_instruction_sets() -> list[str]:
    """Return the instruction sets that are compiled and that this processor has, widest first."""
    return get_library().sightline_native_supported().decode().split(",")


def select_instruction_set(name: str, library: ctypes.CDLL | None = None) -> None:
    """Use an instruction set by name, in the whole process.

    Raises:
        ValueError: if it is not compiled or this processor lacks it.
    """
    library = library or get_library()
    if library.sightline_native_select(name.encode()):
        names = library.sightline_native_supported().decode().replace(",", ", ")
        raise ValueError(
            f"the native kernel cannot use the instruction set {name!r} ({ISA_VARIABLE}) on this machine; expected one "
            f"of: {names}"
        )


def describe() -> str:
    """Return one line that says whether the kernel is built, and for which instruction sets."""
    reason = why_missing()
    if reason is not None:
        return f"native CPU kernel: not built, attention on a CPU uses the tiled backend: {reason}"
    supported, used = supported_instruction_sets(), instruction_set()
    compiled = get_library().sightline_native_compiled().decode().split(",")
    others = ", ".join(name for name in compiled if name != used) or "none"
    lacking = ", ".join(name for name in compiled if name not in supported) or "none"
    return f"native CPU kernel: built, uses {used} (also compiled: {others}; not run on this machine: {lacking})"
