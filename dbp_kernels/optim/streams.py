"""Work beside the current CUDA streams: forked off them, and joined again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch


class SideStreams:
    """One more stream for every CUDA device; on other devices work is done in its turn.

    From ``fork`` to ``close``, keep alive what the work reads and what it makes, and change nothing
    it reads: then no tensor's memory is reused too early on either stream.
    """

    def __init__(self) -> None:
        # kept, because memory is cached by stream
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @contextmanager
    def fork(self, devices: Iterable[torch.device]) -> Iterator[None]:
        """Work in this block comes after all so far, and runs beside what comes after the block."""
        cuda = [device for device in devices if device.type == "cuda"]
        current = torch.cuda.current_device() if cuda else None
        with ExitStack() as stack:
            for device in cuda:
                if device not in self._streams:
                    self._streams[device] = torch.cuda.Stream(device)
                side = self._streams[device]
                side.wait_stream(torch.cuda.current_stream(device))
                stack.enter_context(torch.cuda.stream(side))
            if cuda:  # entering a stream makes its device the current one
                stack.enter_context(torch.cuda.device(current))
            yield

    def join(self) -> None:
        """Work from now on comes after all that was forked."""
        for device, side in self._streams.items():
            torch.cuda.current_stream(device).wait_stream(side)

    def close(self) -> None:
        """As ``join``; and what the streams get next, from whomever, comes after all work so far."""
        self.join()
        for device, side in self._streams.items():
            side.wait_stream(torch.cuda.current_stream(device))
