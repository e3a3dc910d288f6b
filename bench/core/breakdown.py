"""Where the extra time of a decorrelated training step goes, part by part, by torch's profiler.

The package has no marks of its own: for the time of a measurement the functions that do each part
are wrapped in ranges, which also show in a trace.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

COPY = "forward copy of the samples"
CONDENSE = "A = W R"
BACKWARD = "its backward"
MOMENTS = "second moments S"
PATCHES = "patches of few samples"  # plans that work on Z itself
PRODUCTS = "update products"
WRITE = "write-back of R"
PARTS = (COPY, CONDENSE, BACKWARD, MOMENTS, PATCHES, PRODUCTS, WRITE)
STEP = "DecorUpdate.step()"
OURS, PLAIN = "decorrelated step", "plain step"
_PREFIX = "dbp: "


def _targets(device_type: str) -> list[tuple[object, str, str]]:
    """(object, attribute, part) of the functions that do the parts."""
    import dbp_kernels as dbp
    from dbp_kernels import backends, ops, rules, sampling
    from dbp_kernels.backends.eager import ops as eager
    from dbp_kernels.optim import decor_update, step
    from dbp_kernels.optim.engine import Engine
    from dbp_kernels.optim.site import Site

    backend = backends.select(device_type)
    return [
        (sampling.Recorder, "record", COPY),
        (ops, "condensed_weight", CONDENSE),
        (ops, "condensed_weight_transposed", CONDENSE),
        (Site, "form", CONDENSE),
        (Site, "gradient_of_W", BACKWARD),
        (backend, "patch_gram", MOMENTS),
        (step, "rows", PATCHES),
        (eager, "patches", PATCHES),
        (rules, "update_from_gram", PRODUCTS),
        (rules, "update_direct", PRODUCTS),
        (rules, "gram_update", PRODUCTS),
        (rules, "direct_update", PRODUCTS),
        (rules, "low_rank_update", PRODUCTS),
        (backend, "update_from_gram", PRODUCTS),
        (backend, "update_direct", PRODUCTS),
        (backend, "low_rank_update", PRODUCTS),
        (rules.LowRankUpdate, "new", PRODUCTS),
        (decor_update, "write_back", WRITE),
        (Engine, "step", STEP),  # before the class it extends: torch may have given it its own
        (dbp.DecorUpdate, "step", STEP),
    ]


@contextmanager
def marked(device_type: str) -> Iterator[set[int]]:
    """Within it every part is a range of the profiler.

    Yields the sequence numbers of the autograd nodes of A = W R, by which the profiler's record of
    a backward pass is known; they are added as forward passes run.
    """
    nodes: set[int] = set()
    inside: list[str] = []  # a part within a part counts for the outer one

    def wrap(function: Callable, part: str) -> Callable:
        @functools.wraps(function)
        def ranged(*arguments, **options):
            if inside:
                return function(*arguments, **options)
            if part != STEP:  # which has parts within
                inside.append(part)
            try:
                with record_function(_PREFIX + part):
                    result = function(*arguments, **options)
            finally:
                inside.clear()
            if part == CONDENSE and result is not None:  # of the layer form
                nodes.update(_sequence_numbers(result))
            return result

        return ranged

    targets = _targets(device_type)
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in targets]
    try:
        for owner, name, part in targets:
            setattr(owner, name, wrap(getattr(owner, name), part))
        yield nodes
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def _sequence_numbers(A: Tensor) -> Iterator[int]:
    """Of the autograd nodes between A and the weight."""
    pending = [A.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None and node.name() != "torch::autograd::AccumulateGrad":
            yield node._sequence_nr()
            pending += [before for before, _ in node.next_functions]


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
    """{part: seconds}, medians over ``rounds`` eager decorrelated steps; STEP, OURS, PLAIN in all.

    Before each of them one ``plain`` step. On CUDA seconds of kernels, else wall-clock time.
    """
    seen: list[dict[str, float]] = []
    for _ in range(rounds):
        with marked(device.type) as nodes, _profile(device) as prof:
            for name, call in ((PLAIN, plain), (OURS, step)):
                with record_function(_PREFIX + name):
                    call()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
        found = dict.fromkeys((*PARTS, STEP, OURS, PLAIN), 0.0)
        for event in prof.events():
            part = event.name.removeprefix(_PREFIX)
            if event.name.startswith("autograd::engine::evaluate_function"):
                part = BACKWARD if event.sequence_nr in nodes else ""
            if part in found and event.device_type == torch.autograd.DeviceType.CPU:
                cuda = device.type == "cuda"
                found[part] += 1e-6 * (event.device_time_total if cuda else event.cpu_time_total)
        seen.append(found)
    return {part: statistics.median(found[part] for found in seen) for part in seen[0]}


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
    whole, ours, theirs = (found.pop(name) for name in (STEP, OURS, PLAIN))
    found["the rest of step()"] = whole - sum(found[p] for p in (MOMENTS, PATCHES, PRODUCTS, WRITE))
    found["elsewhere"] = ours - theirs - sum(found.values())
    found["extra"] = ours - theirs
    return {part: float(f"{value:.4g}") for part, value in found.items()}


def write_trace(
    path: Path,
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    prepare: Mapping[str, Callable[[], object]] | None = None,
) -> None:
    """Writes a Chrome trace (for Perfetto or chrome://tracing) of each of ``calls`` once."""
    with marked(device.type), _profile(device) as prof:
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
