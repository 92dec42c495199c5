"""Command line options from dataclasses, with one message for an invalid value."""

from __future__ import annotations

import contextlib
import io
import traceback
from typing import Any

import tyro


def parse_options(kind: Any, argv: list[str], **settings: Any) -> Any:
    """Return `tyro.cli(kind, args=argv, ...)`.

    Tyro prints a box for an option that it does not know or cannot convert, and exits.

    Raises:
        ValueError: if the dataclass rejects a value; tyro would print the message in a box.
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return tyro.cli(kind, args=argv, **settings)
    except SystemExit as ended:
        error: BaseException | None = ended
        while error is not None and not _is_from_validation(error):
            error = error.__context__
        if error is not None:
            raise error from None
        if not ended.code:
            raise  # has printed the help
    return tyro.cli(kind, args=argv, **settings)  # prints its message


def _is_from_validation(error: BaseException) -> bool:
    """Return whether the `__post_init__` of a dataclass has raised the error."""
    frames = traceback.walk_tb(error.__traceback__)
    return isinstance(error, ValueError) and any(frame.f_code.co_name == "__post_init__" for frame, _ in frames)
