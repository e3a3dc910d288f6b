"""Suite "kernels": patch_gram against its rivals on the registry's cases."""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from bench.core import bars, check, machine, registry
from bench.core.memory import extra_bytes
from bench.core.plots import COLOURS, LEGEND_ABOVE, OTHER
from bench.core.registry import Case
from bench.core.suite import CPU, Job, Panel, Settings, Suite, batch_of, failed
from bench.core.table import format_table, milliseconds
from bench.rivals import RIVALS, NotApplicable, Rival, rivals_on
from bench.rivals.algorithms import algorithms
from dbp_kernels.tools.cases import error, oracle, random_input
from dbp_kernels.tools.timing import time_interleaved, time_replayed

OURS = "dbp"
PLAIN = "unfold"  # what correctness bounds and most bars refer to


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
    exact = oracle(x, case)
    records: dict[str, dict] = {}
    plain = methods.get(PLAIN, RIVALS[PLAIN])
    plain_error = error(plain.compute(x, case), exact)
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
    """Random normal data, as the settings ask for it; the same in every run on a type of device."""
    return random_input(case, settings.device, settings.dtype, settings.channels_last)


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
            err = error(method.compute(x, case), exact)
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


def planned(case: Case, x: Tensor) -> dict:
    """The planner's {"choice": algorithm, "predicted_seconds"}; empty where it does not say."""
    choices = plans_for("gram_choices", x, case.window)
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


def kernel_table(records: Sequence[dict]) -> str:
    """One row a case: ours in milliseconds, then how many times as long each rival takes.

    In brackets the quartiles of our time. "of peak" is our rate in operations that cannot be avoided
    over the rate of a large matrix product, "of copy" our rate in bytes that cannot be avoided over
    that of a large copy. "memory" is the extra memory of one call over the bytes of the float32
    input, ours and (unfold's).
    """
    rivals = rivals_of(records)
    head = ["case", "n", "D", "ours ms [quartiles]", *(f"{r} x" for r in rivals)]
    rows = [[*head, "of peak", "of copy", "memory (unfold)", "algorithm"]]
    for record in records:
        row = [record["name"], str(record["n"]), str(record["D"])]
        row.append(milliseconds(record["methods"].get(bars.OURS)))
        row += [ratio_cell(record, rival) for rival in rivals]
        ours = record["methods"].get(bars.OURS, {})
        row += [_percent(ours.get("of_peak")), _percent(ours.get("of_copy"))]
        memory = (_memory(record, name) for name in (bars.OURS, "unfold"))
        row.append("{} ({})".format(*memory))
        rows.append([*row, record.get("choice") or "-"])
    return format_table(rows)


def rivals_of(records: Iterable[dict]) -> list[str]:
    """The rivals of patch_gram that some case was measured with, in the order of the records."""
    measured = {name: None for record in records for name in record["methods"]}
    return [name for name in measured if name != bars.OURS]


def geometric_means(records: Iterable[dict]) -> dict[str, tuple[float, int]]:
    """{what: (geometric mean of the speed-up, number of cases)}, over cases with both numbers.

    Per rival over all cases and over kernels of at least 3 with stride 1; and against the best
    rival of each case.
    """
    logs: dict[str, list[float]] = {}
    records = list(records)
    rivals = rivals_of(records)
    for record in records:
        ratios = {rival: bars.speedup(record, rival) for rival in rivals}
        known = {rival: ratio for rival, ratio in ratios.items() if ratio}
        structured = bool(record["kernel"]) and min(record["kernel"]) >= 3
        structured = structured and set(record["stride"]) == {1}
        entries = dict(known)
        others = [x for name, x in known.items() if not record["methods"][name].get("ours")]
        if others:
            entries["best rival"] = min(others)
        for name, ratio in entries.items():
            logs.setdefault(f"{name}, all cases", []).append(math.log(ratio))
            if structured:
                logs.setdefault(f"{name}, K >= 3 stride 1", []).append(math.log(ratio))
    return {
        name: (math.exp(sum(values) / len(values)), len(values)) for name, values in logs.items()
    }


def means_text(records: Iterable[dict]) -> str:
    """The geometric means as a table."""
    rows = [["geometric mean speed-up over", "x", "cases"]]
    rows += [
        [n, f"{mean:.2f}", str(count)] for n, (mean, count) in geometric_means(records).items()
    ]
    return format_table(rows)


def ratio_cell(record: dict, rival: str) -> str:
    """How many times as long the rival takes, or its status."""
    ratio = bars.speedup(record, rival)
    if ratio is not None:
        return f"{ratio:.2f}"
    status = record["methods"].get(rival, {"status": "-"})["status"]
    return "-" if status == "ok" else status


def _memory(record: dict, name: str) -> str:
    extra = record["methods"].get(name, {}).get("extra_bytes")
    return "-" if extra is None else f"{extra / (4 * record['input_elements']):.2f}"


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{fraction:.0%}"


def plot_speedups(axes, records: Sequence[dict]) -> None:
    """Two bars a case: the rivals' times over ours."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    for row, record in enumerate(records):
        for offset, rival in zip((-0.2, 0.2), ("unfold", "self_wgrad"), strict=True):
            ratio = bars.speedup(record, rival)
            if ratio:
                axes.barh(row + offset, ratio, 0.38, color=COLOURS[rival])
        for bar in bars.thresholds(record["name"], "unfold"):
            for limit, style in ((bar.bar, "-"), (bar.goal, ":")):
                if limit is not None:
                    axes.plot([limit, limit], [row - 0.45, row + 0.05], "k" + style, linewidth=1.6)
    for bar in bars.thresholds("*", "unfold"):
        axes.axvline(bar.bar, color="black", linewidth=0.8)
    axes.set_yticks(range(len(records)), [record["name"] for record in records], fontsize=8)
    axes.set_ylim(len(records) - 0.4, -0.6)
    axes.set_xscale("log")
    ticks = [0.5, 1, 2, 4, 8, 16]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("time of the rival over time of patch_gram")
    axes.legend(
        handles=[
            Patch(color=COLOURS["unfold"], label="unfold + matmul"),
            Patch(color=COLOURS["self_wgrad"], label="self weight gradient + borders"),
            Line2D([], [], color="k", label="bar (against unfold)"),
            Line2D([], [], color="k", linestyle=":", label="goal"),
        ],
        **LEGEND_ABOVE,
    )


def plot_roofline(axes, records: Sequence[dict], peaks: dict) -> None:
    """Useful operations per second against useful operations per byte, under the measured roofs.

    Useful are the operations and bytes that no way to S can avoid, whatever a method did.
    """
    intensity = [r["useful_gflop"] * 1e9 / r["useful_bytes"] for r in records]
    peak, copy = peaks["gemm_tflops"], peaks["copy_gbytes"] / 1e3
    left, right = min(intensity) / 2, max(max(intensity), peak / copy) * 2
    axes.plot([left, peak / copy, right], [left * copy, peak, peak], "k-", linewidth=1.2)
    axes.annotate("large matrix product", (right, peak), ha="right", va="bottom", fontsize=8)
    axes.annotate("large copy", (left, left * copy), va="bottom", fontsize=8)
    for name in (*rivals_of(records), bars.OURS):  # ours on top
        points = [
            (x, record["methods"][name]["useful_tflops"])
            for x, record in zip(intensity, records, strict=True)
            if "useful_tflops" in record["methods"].get(name, {})
        ]
        axes.scatter(
            *zip(*points, strict=True) if points else ((), ()),
            s=22 if name == bars.OURS else 12,
            color="#000000" if name == bars.OURS else COLOURS.get(name, OTHER),
            label="patch_gram" if name == bars.OURS else name,
        )
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("useful operations per useful byte")
    axes.set_ylabel("useful TFLOP/s")
    axes.grid(alpha=0.3)
    axes.legend(**LEGEND_ABOVE)


def _jobs(options: argparse.Namespace, settings: Settings) -> Iterator[Job]:
    tag = "core" if options.quick and not options.filter else None
    methods = chosen_methods(options.methods, settings)
    for case in registry.select(options.filter, batch_of(options), tag):
        run = lambda tick, case=case: run_case(case, settings, methods, tick)  # noqa: E731
        yield Job("kernels", case.name, run, settings.pairs or DEFAULT_PAIRS)


def _panels(result: dict) -> Iterator[Panel]:
    records = [r for r in result.get("kernels", ()) if bars.speedup(r, "unfold")]
    if records:
        height = len(records) * 0.3 + 1.2
        yield Panel(height, lambda part: plot_speedups(part.subplots(), records))
    rated = [r for r in records if r.get("useful_gflop") and r.get("useful_bytes")]
    if rated and "peaks" in result:
        yield Panel(4.2, lambda part: plot_roofline(part.subplots(), rated, result["peaks"]))


SUITE = Suite("patch_gram", lambda r: f"{kernel_table(r)}\n\n{means_text(r)}", _jobs, _panels)
