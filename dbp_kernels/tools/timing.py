"""Interleaved timing: every variant in turn, in alternating order, medians with their spread."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch

SHORTEST_SAMPLE = 2e-3  # seconds; faster calls are repeated within a sample
_SPIN_CYCLES = 200_000  # about 0.1 ms of device work in front of a CUDA sample


_clock = time.perf_counter


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Within it torch computes with so many threads on the CPU; None: as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def cpu_time(wanted: bool = True) -> Iterator[None]:
    """Within it CPU samples count the process's CPU time, if ``wanted``.

    For one thread, whose CPU time other work on the machine hardly changes; more would add up.
    """
    global _clock
    before = _clock
    _clock = time.process_time if wanted else before
    try:
        yield
    finally:
        _clock = before


def host_clock() -> Callable[[], float]:
    """What samples on a CPU are timed with: of elapsed time, or of the process's CPU time."""
    return _clock


@dataclass(frozen=True)
class Spread:
    """Seconds per call over the samples of one variant.

    ``calls`` is the number of calls that each sample averages.
    """

    median: float
    min: float
    q1: float
    q3: float
    max: float
    samples: int
    calls: int = 1

    def as_dict(self) -> dict[str, float | int]:
        """Plain numbers, seconds to four significant digits: result files stay small."""
        return {
            key: value if isinstance(value, int) else float(f"{value:.4g}")
            for key, value in asdict(self).items()
        }


def spread(seconds: Sequence[float], calls: int = 1) -> Spread:
    """Summarises samples. Raises ValueError when there are none."""
    if not seconds:
        raise ValueError("seconds must hold at least one sample, got none")
    ordered = sorted(seconds)
    if len(ordered) == 1:
        q1 = q3 = ordered[0]
    else:
        q1, _, q3 = statistics.quantiles(ordered, n=4, method="inclusive")
    return Spread(statistics.median(ordered), ordered[0], q1, q3, ordered[-1], len(ordered), calls)


def time_once(call: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Seconds per call of ``calls`` calls in a row.

    On CUDA between two events, with device work queued in front so that launches are hidden.
    """
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        if hasattr(torch.cuda, "_sleep"):
            torch.cuda._sleep(_SPIN_CYCLES)
        start.record()
        for _ in range(calls):
            call()
        stop.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(stop)) * 1e-3 / calls
    begin = _clock()
    for _ in range(calls):
        call()
    return (_clock() - begin) / calls


def _nothing() -> None:
    pass


def time_interleaved(
    variants: Mapping[str, Callable[[], object]],
    pairs: int,
    *,
    device: torch.device | str = "cpu",
    warmup: int = 2,
    shortest_sample: float = SHORTEST_SAMPLE,
    prepare: Mapping[str, Callable[[], object]] | None = None,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, Spread]:
    """Times every variant ``pairs`` times; each round runs all of them, every other one backwards.

    So a drift of the machine's speed touches all variants alike. ``warmup`` rounds come first; the
    last of them sets how many calls a sample averages (``shortest_sample`` seconds at least).
    ``prepare`` holds, by variant, what must run untimed before every call; a sample is then one
    call. ``tick`` is called after every round. Raises ValueError for ``pairs`` or ``warmup`` below 1.
    """
    if pairs < 1 or warmup < 1:
        raise ValueError(f"pairs and warmup must be at least 1, got {pairs} and {warmup}")
    device = torch.device(device)
    prepare = prepare or {}
    calls: dict[str, int] = {}
    for name, call in variants.items():
        for _ in range(warmup):
            prepare.get(name, _nothing)()
            once = time_once(call, device)
        calls[name] = 1 if name in prepare else _repeats(once, shortest_sample)

    def sample(name: str) -> float:
        prepare.get(name, _nothing)()
        return time_once(variants[name], device, calls[name])

    samples = _in_turn(list(variants), sample, pairs, tick)
    return {name: spread(seconds, calls[name]) for name, seconds in samples.items()}


def _repeats(once: float, shortest_sample: float) -> int:
    return max(1, math.ceil(shortest_sample / max(once, 1e-7)))


def _in_turn(
    names: list[str], sample: Callable[[str], float], pairs: int, tick: Callable[[], object]
) -> dict[str, list[float]]:
    """The samples of each, taken in rounds of alternating order."""
    samples: dict[str, list[float]] = {name: [] for name in names}
    order = list(names)
    for _ in range(pairs):
        for name in order:
            samples[name].append(sample(name))
        order.reverse()
        tick()
    return samples


MOST_REPLAYED = 100  # calls in one graph


def time_replayed(
    variants: Mapping[str, Callable[[], object]],
    pairs: int,
    *,
    device: torch.device | str = "cpu",
    shortest_sample: float = SHORTEST_SAMPLE,
    tick: Callable[[], object] = lambda: None,
) -> tuple[dict[str, Spread], dict[str, str]]:
    """As ``time_interleaved``, by replays of a CUDA graph of some calls: without what launching takes.

    Every variant has been called before. Returns (seconds per call, {variant: why it cannot be
    captured}). On a CPU the plain calls are timed.
    """
    device = torch.device(device)
    calls, replays, reasons = {}, {}, {}
    for name, call in variants.items():
        calls[name] = min(MOST_REPLAYED, _repeats(time_once(call, device), shortest_sample))
        try:
            replays[name] = captured(call, calls[name], device)
            replays[name]()  # the first replay of a graph uploads it
        except RuntimeError as failure:
            reasons[name] = f"{type(failure).__name__}: {failure}"[:200]
            replays.pop(name, None)

    def sample(name: str) -> float:
        return time_once(replays[name], device) / calls[name]

    samples = _in_turn(list(replays), sample, pairs, tick)
    return {name: spread(seconds, calls[name]) for name, seconds in samples.items()}, reasons


def captured(call: Callable[[], object], calls: int, device: torch.device) -> Callable[[], object]:
    """What does ``calls`` calls in a row: replays a CUDA graph of them; on a CPU calls them."""

    def several() -> None:
        for _ in range(calls):
            call()

    if device.type != "cuda":
        return several
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    # a capture that fails leaves its own stream current: what is timed next would run there
    with torch.cuda.stream(torch.cuda.current_stream(device)), torch.cuda.graph(graph):
        several()
    return graph.replay
