"""SIGTERM and Ctrl-C: the first stops the run after the current step, a second Ctrl-C stops it immediately."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Context manager that records a stop signal in `received`, which is None before.

    Python allows only the main thread to set signal handlers; in any other thread the context manager does nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._record) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _record(self, number: int, _: FrameType | None) -> None:
        self.received = number
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C stops immediately
        if os.environ.get("RANK", "0") == "0":  # only one process prints
            # os.write, because the handler may interrupt another print
            os.write(sys.stderr.fileno(), b"\nfinishing this step, then saving; Ctrl-C again exits immediately\n")
