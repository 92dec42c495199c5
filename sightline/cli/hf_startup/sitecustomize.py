"""Imports `sightline.hf` in every Python process that imports the models of transformers.

Python imports the first `sitecustomize` of its path when it starts. This one waits: a process that never imports
`transformers.modeling_utils`, such as a launcher or a loader of data, imports neither torch nor Sightline for it. The
`sitecustomize` that this file hides runs after it, as if it were the first.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import warnings
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

MODELS = "transformers.modeling_utils"
"""The module that defines the table of attention names, which every model class imports."""


class RegisterAfterModels(MetaPathFinder):
    """Finder that leaves every module to the other finders, and imports `sightline.hf` once `MODELS` has run."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != MODELS:
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Register the name and enable models loaded by it; warn if this environment does not contain Sightline."""
    if importlib.util.find_spec("sightline") is None:
        remedy = "install it there, pip install 'sightline[hf]', or start this process without `sightline hf`"
        warnings.warn(f"`sightline hf` started {sys.executable}, which does not find sightline; {remedy}")
        return
    importlib.import_module("sightline.hf.on_load").enable_on_load()


def run_hidden_sitecustomize() -> None:
    """Run the `sitecustomize` that Python would have imported without this one, under its own name."""
    here = os.path.dirname(os.path.abspath(__file__))
    spec = PathFinder.find_spec("sitecustomize", [path for path in sys.path if os.path.abspath(path) != here])
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


if __name__ == "sitecustomize":
    sys.meta_path.insert(0, RegisterAfterModels())
    run_hidden_sitecustomize()
