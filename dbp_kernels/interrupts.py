"""Ctrl-C waits for what must not be left half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Within it SIGINT, which would raise KeyboardInterrupt anywhere, waits for the end of the block.

    Only the main thread is interrupted that way, so in other threads there is nothing to do. A handler
    of C code that was set behind Python's back is replaced by Python's, for good.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    received: list[tuple[int, FrameType | None]] = []
    try:
        signal.signal(signal.SIGINT, lambda *arguments: received.append(arguments))
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if received:
            handler(*received[-1])
