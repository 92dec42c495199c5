"""Documents of the forward that is running: set by the hooks of `enable`, read by layers that receive no arguments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from torch import nn

from sightline.hf.documents import Documents
from sightline.torch_private import disable_compiler


class Running(NamedTuple):
    """A forward that is running: its documents, its model, and the forward that called it.

    model  None: the documents were set by `set_documents`
    """

    documents: Documents | None
    model: nn.Module | None
    outer: Running | None


_RUNNING: ContextVar[Running | None] = ContextVar("sightline_running", default=None)


def current() -> Documents | None:
    """Return the documents of the forward that is running, which the hooks of `enable` have found."""
    running = _RUNNING.get()
    return None if running is None else running.documents


def inherited(model: nn.Module) -> Documents | None:
    """Return the documents of the forward that calls `model`; None if the model is called by itself.

    A forward that was interrupted leaves its documents behind, so a model inherits only from models that contain it.
    """
    running = _RUNNING.get()
    if running is None:
        return None
    outer = running.model
    contains = outer is None or (outer is not model and any(module is model for module in outer.modules()))
    return running.documents if contains else None


def enter_forward(model: nn.Module, documents: Documents | None) -> None:
    """Make these the current documents, until `leave_forward`."""
    _RUNNING.set(Running(documents, model, _RUNNING.get()))


@disable_compiler
def leave_forward(model: nn.Module) -> None:
    """Restore the documents from before `enter_forward`; nothing if the model has not entered."""
    running = _RUNNING.get()
    if running is not None and running.model is model:
        _RUNNING.set(running.outer)


@contextmanager
def set_documents(documents: Documents) -> Iterator[None]:
    """Make these the documents of every forward inside of the block."""
    token = _RUNNING.set(Running(documents, None, _RUNNING.get()))
    try:
        yield
    finally:
        _RUNNING.reset(token)
