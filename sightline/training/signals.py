"""SIGTERM and Ctrl-C: the first asks the run to leave after its step, the second Ctrl-C leaves at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

ASKED = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Remembers the first signal while the `with` block runs; `received` is None until then.

    Python lets only the main thread set handlers; in another thread the block changes nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in ASKED}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.received = number
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the next Ctrl-C is not asked to wait
        if os.environ.get("RANK", "0") == "0":  # of several processes the first speaks
            # os.write, since a handler may run in the middle of another print
            os.write(sys.stderr.fileno(), b"\nfinishing this step, then saving; Ctrl-C again leaves at once\n")
