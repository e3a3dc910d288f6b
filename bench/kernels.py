"""Suite "kernels": patch_gram against its rivals on the registry's cases."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import check, machine
from bench.algorithms import algorithms
from bench.memory import extra_bytes
from bench.registry import Case
from bench.rivals import RIVALS, NotApplicable, Rival, rivals_on
from bench.timing import time_interleaved, time_replayed

OURS = "dbp"
PLAIN = "unfold"  # what correctness bounds and most bars refer to


CPU = torch.device("cpu")


@dataclass(frozen=True)
class Settings:
    """How a suite is run; ``pairs=None`` is each suite's own default.

    With ``replay`` methods are also timed by replays of a CUDA graph. ``profiled``: steps of which a
    breakdown is the median.
    """

    device: torch.device = CPU
    dtype: torch.dtype = torch.float32
    pairs: int | None = None
    warmup: int = 2
    channels_last: bool = False
    replay: bool = False
    profiled: int = 3


DEFAULT_PAIRS = 9
MOST_COPIES = 1023  # of a small input


def patch_gram(x: Tensor, case: Case) -> Tensor:
    """The library's second moment, called as its user would."""
    import dbp_kernels as dbp

    return dbp.patch_gram(x, case.kernel, case.stride, case.padding, case.dilation, case.groups)


def default_methods(device: torch.device = CPU) -> dict[str, Rival]:
    """Ours first, then the rivals."""
    return {OURS: Rival("dbp.patch_gram", patch_gram, lambda case: ""), **rivals_on(device)}


def chosen_methods(names: str | None, settings: Settings) -> dict[str, Rival] | None:
    """The methods of these names, separated by commas; None for no names: the default ones.

    Beside the default ones there is every single algorithm of a backend. Raises ValueError for a
    name that is neither.
    """
    if names is None:
        return None
    known = default_methods(settings.device) | algorithms(settings.device, settings.dtype)
    chosen = names.split(",")
    for name in chosen:
        if name not in known:
            raise ValueError(f"--methods {name}: expected some of {', '.join(known)}")
    return {name: known[name] for name in chosen}


def run_case(
    case: Case,
    settings: Settings,
    methods: Mapping[str, Rival] | None = None,
    tick: Callable[[], object] = lambda: None,
) -> dict:
    """Checks, times and weighs every method on one case; returns the case's result record.

    Each method's record has "status": "ok" (with "seconds", "error", "extra_bytes", and "ours" if
    it is no rival), "wrong" or "failed" (with a reason and no number), or "n/a". "seconds" are those
    of calls; "replay", if the settings ask for it, those of replays, or else there is "no_replay",
    why not.
    """
    methods = default_methods(settings.device) if methods is None else methods
    x = make_input(case, settings)
    exact = check.oracle(x, case)
    records: dict[str, dict] = {}
    plain = methods.get(PLAIN, RIVALS[PLAIN])
    plain_error = check.error(plain.compute(x, case), exact)
    for name, method in methods.items():
        records[name] = _judge(name, method, x, case, exact, plain_error)
    # S is float64 for float64 inputs and float32 for all others
    result_bytes = exact.numel() * max(4, x.element_size())
    del exact

    right = [name for name, record in records.items() if record["status"] == "ok"]
    inputs = rotation(x)
    calls = {name: _rotating(methods[name], inputs, case) for name in right}
    with torch.no_grad():
        for name in right:
            records[name]["extra_bytes"] = extra_bytes(calls[name], settings.device)
        times = time_interleaved(
            calls,
            settings.pairs or DEFAULT_PAIRS,
            device=settings.device,
            warmup=settings.warmup,
            tick=tick,
        )
        for name in right:
            records[name]["seconds"] = times[name].as_dict()
        if settings.replay:
            replays, reasons = time_replayed(
                calls, settings.pairs or DEFAULT_PAIRS, device=settings.device, tick=tick
            )
            for name in right:
                if name in replays:
                    records[name]["replay"] = replays[name].as_dict()
                else:
                    records[name]["no_replay"] = reasons[name]
    return {
        "name": case.name,
        "tags": list(case.tags),
        "n": case.n,
        "D": case.D,
        "groups": case.groups,
        "kernel": list(case.kernel),
        "stride": list(case.stride),
        "input_elements": case.input_elements,
        "inputs": len(inputs),
        "useful_bytes": x.numel() * x.element_size() + result_bytes,
        **planned(case, x),
        "methods": records,
    }


def make_input(case: Case, settings: Settings) -> Tensor:
    """Random normal data, the same in every run on a type of device."""
    generator = torch.Generator(settings.device).manual_seed(0)
    x = torch.randn(case.input_shape, generator=generator, device=settings.device)
    x = x.to(settings.dtype)
    if settings.channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    return x


def rotation(x: Tensor) -> list[Tensor]:
    """x and as many copies as it takes not to find the input in the last cache, call after call."""
    copies = machine.cache_bytes(x.device) // max(1, x.numel() * x.element_size())
    return [x, *(x.clone() for _ in range(min(copies, MOST_COPIES)))]


def _rotating(method: Rival, inputs: Sequence[Tensor], case: Case) -> Callable[[], Tensor]:
    following = itertools.cycle(inputs)
    return lambda: method.compute(next(following), case)


def _judge(
    name: str, method: Rival, x: Tensor, case: Case, exact: Tensor, plain_error: float
) -> dict:
    ours = {"ours": True} if method.ours else {}
    reason = method.why_not(case)
    if reason:
        return {"status": "n/a", "reason": reason}
    try:
        with torch.no_grad():
            err = check.error(method.compute(x, case), exact)
    except NotApplicable as reason:
        return {"status": "n/a", "reason": str(reason)}
    except Exception as failure:  # whatever it is, the other methods get their numbers
        return failed(failure)
    limit = check.bound(name == OURS or method.ours, plain_error, x)
    if name == PLAIN:
        limit = check.plain_cap(x)
    if not err <= limit:
        return {"status": "wrong", "reason": f"error {err:.2e} above the bound {limit:.2e}"}
    return {"status": "ok", "error": float(f"{err:.2e}"), **ours}


def failed(failure: Exception) -> dict:
    """The record of a method that raised."""
    return {"status": "failed", "reason": f"{type(failure).__name__}: {failure}"[:200]}


def planned(case: Case, x: Tensor) -> dict:
    """The planner's {"choice": algorithm, "predicted_seconds"}; empty where it does not say."""
    lists = (case.kernel, case.stride, case.padding, case.dilation)
    window = (*(() if case.is_linear else v for v in lists), case.groups)
    choices = plans_for("gram_choices", x, window)
    if not choices:
        return {}
    best = choices[0]
    return {
        "choice": str(best),
        "predicted_seconds": float(f"{best.seconds:.3g}"),
        # the fewest operations of any algorithm
        "useful_gflop": float(f"{min(choice.gflop for choice in choices):.4g}"),
    }


def plan_for(question: str, x: Tensor, window: tuple):
    """The planner's first answer, or None: see ``plans_for``."""
    return next(iter(plans_for(question, x, window)), None)


def plans_for(question: str, x: Tensor, window: tuple) -> tuple:
    """The planner's answers to ``question`` ("gram_choices", "update_choices") for input x.

    ``window`` is (kernel_size, stride, padding, dilation, groups). Empty where the library at hand
    has no such planner: the benchmark also runs on older and newer ones.
    """
    try:
        from dbp_kernels import choose
        from dbp_kernels.planning import geometry

        shape = geometry.make_geometry(x.shape, *window)
        return getattr(choose, question)(shape, x.device.type, x.dtype)
    except (ImportError, AttributeError, TypeError, LookupError):
        return ()
