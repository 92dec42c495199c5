"""Access to PyTorch's thread pool from C++. Tested with torch 2.11 to 2.13."""

from __future__ import annotations

import ctypes

import torch


def find_thread_pool() -> tuple[ctypes.c_void_p, ctypes.c_void_p] | None:
    """Return the addresses of `torch_parallel_for` and `torch_get_num_threads`, or None if PyTorch exports neither.

    They belong to its stable C interface (torch/csrc/stable/c/shim.h). A look-up in the extension module also searches
    the libraries that it depends on, wherever they are installed.
    """
    library = ctypes.CDLL(torch._C.__file__)
    try:
        found = library.torch_parallel_for, library.torch_get_num_threads
    except AttributeError:
        return None
    parallel_for, num_threads = (ctypes.cast(function, ctypes.c_void_p) for function in found)
    return parallel_for, num_threads
