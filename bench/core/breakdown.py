"""Where the extra time of a decorrelated training step goes, part by part, by torch's profiler.

The package marks its phases itself, as ranges of the profiler, which also show in a trace. Where ranges
lie within ranges, each has the time that is none of the inner ones'.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from bench.core.table import format_table
from dbp_kernels.phases import (
    BACKWARD,
    CONDENSE,
    COPY,
    MOMENTS,
    PATCHES,
    PREFIX,
    PRODUCTS,
    REPLAY,
    WRITE,
)

PARTS = (COPY, CONDENSE, BACKWARD, MOMENTS, PATCHES, PRODUCTS, WRITE)
STEP = "DecorUpdate.step()"  # a range of torch's own, as of every optimiser
OURS, PLAIN = "decorrelated step", "plain step"
_NODE = "autograd::engine::evaluate_function"
_STEPS = ("Optimizer.step#DecorUpdate.step", "Optimizer.step#Engine.step")
_OPERATOR = 0  # the scope of a recorded forward operator


def _profile(device: torch.device) -> profile:
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    return profile(activities=activities)


def parts_of(
    step: Callable[[], object],
    device: torch.device,
    rounds: int = 3,
    plain: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """{part: seconds}, medians over ``rounds`` eager decorrelated steps.

    Of STEP what is in none of the parts, and of a replayed CUDA graph all of it (REPLAY); OURS and
    PLAIN are whole. Before each step comes one ``plain`` step. On CUDA seconds of kernels, which count
    where they are launched, else wall-clock time.
    """
    seen: list[dict[str, float]] = []
    for _ in range(rounds):
        with _profile(device) as prof:
            for name, call in ((PLAIN, plain), (OURS, step)):
                with record_function(PREFIX + name):
                    call()
                    if device.type == "cuda":
                        torch.cuda.synchronize(device)
        seen.append(phase_times(prof.events(), device.type == "cuda"))
    return {part: statistics.median(found[part] for found in seen) for part in seen[0]}


def phase_times(events: Iterable[Any], of_kernels: bool) -> dict[str, float]:
    """{part: seconds} of one record of the profiler (its ``FunctionEvent``s), as ``parts_of``."""
    on_host = [event for event in events if event.device_type == DeviceType.CPU]
    nodes = _nodes_of_condense(on_host)
    # the profiler copies ranges to the device's timeline, where they are no kernels
    ranges = {event.name for event in on_host if event.is_user_annotation}

    def own(event: Any) -> float:
        """Microseconds of the event itself, without those within it."""
        if of_kernels:
            return sum(k.duration for k in event.kernels if k.name not in ranges)
        return event.self_cpu_time_total

    found = dict.fromkeys((*PARTS, REPLAY, STEP), 0.0)
    for event in on_host:
        part = _part(event, nodes)
        if part is not None:
            found[part] += 1e-6 * own(event)
    for name in (OURS, PLAIN):
        found[name] = 0.0
        for whole in (event for event in on_host if event.name == PREFIX + name):
            if not of_kernels:
                found[name] += 1e-6 * whole.cpu_time_total
                continue
            # by time: what launches the kernels of a backward pass is a thread of its own
            span = whole.time_range
            within = (e for e in on_host if span.start <= e.time_range.start <= span.end)
            found[name] += 1e-6 * sum(map(own, within))
    return found


def _part(event: Any, nodes: set[int]) -> str | None:
    """The part of the innermost range that an event lies in, or is."""
    while event is not None:
        name = event.name.removeprefix(PREFIX)
        if name != event.name:
            return None if name in (OURS, PLAIN) else name
        if name in _STEPS:
            return STEP
        if event.name.startswith(_NODE) and event.sequence_nr in nodes:
            return BACKWARD
        event = event.cpu_parent
    return None


def _nodes_of_condense(on_host: Iterable[Any]) -> set[int]:
    """Sequence numbers of the autograd nodes that A = W R makes: a backward pass is known by them.

    An operator is recorded with the number that the next node will get. So a node was made by the
    last of those that have its number: others made none.
    """
    made_by: dict[int, Any] = {}
    for event in on_host:
        backward = event.scope != _OPERATOR or event.name.startswith(_NODE)
        if backward or event.sequence_nr < 0:
            continue
        last = made_by.setdefault(event.sequence_nr, event)
        if event.time_range.start >= last.time_range.start:
            made_by[event.sequence_nr] = event
    return {number for number, maker in made_by.items() if _part(maker, set()) == CONDENSE}


def breakdown(
    step: Callable[[], object],
    plain: Callable[[], object],
    device: torch.device,
    rounds: int = 3,
) -> dict[str, float]:
    """{part: seconds} of what a decorrelated ``step`` takes beyond a ``plain`` one, medians.

    The parts, then what else ``DecorUpdate.step()`` does, then what is outside of all of these
    (noise included: it may be negative). They add up to "extra".
    """
    found = parts_of(step, device, rounds, plain)
    ours, theirs = found.pop(OURS), found.pop(PLAIN)
    found["the rest of step()"] = found.pop(STEP)
    if not found[REPLAY]:
        del found[REPLAY]
    found["elsewhere"] = ours - theirs - sum(found.values())
    found["extra"] = ours - theirs
    return {part: float(f"{value:.4g}") for part, value in found.items()}


def breakdown_table(records: Sequence[dict]) -> str:
    """A column a network: milliseconds and share of the extra time of our step, part by part."""
    rows = [["part", *(f"{record['name']}, ms" for record in records)]]
    for part in dict.fromkeys(part for record in records for part in record["breakdown"]):
        row = [part]
        for record in records:
            seconds, extra = (record["breakdown"].get(key, 0.0) for key in (part, "extra"))
            share = f" ({seconds / extra:.0%})" if extra > 0 else ""
            row.append(f"{seconds * 1e3:.1f}{share}")
        rows.append(row)
    return format_table(rows)


def write_trace(
    path: Path,
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    prepare: Mapping[str, Callable[[], object]] | None = None,
) -> None:
    """Writes a Chrome trace (for Perfetto or chrome://tracing) of each of ``calls`` once."""
    with _profile(device) as prof:
        for name, call in calls.items():
            if prepare:
                with record_function(f"forward passes of {name}"):
                    prepare[name]()
            with record_function(name):
                call()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    prof.export_chrome_trace(str(path))
