"""The promises that a result is held to, as data, and their evaluation. The only place they live.

Figures are ratios of medians within one run. A bar whose conditions (device, dtype, pairs) a result
does not meet, or whose case it lacks, is "not measured"; a case where our own method was wrong or
failed is "missed".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bench.core import registry

MET, MISSED, NOT_MEASURED = "met", "missed", "not measured"
NEAR = 0.1  # a regret up to here is a good prediction
BUDGETS = (0.01, 0.02, 0.05, 0.1)  # shares of the step that the bar on budgets asks for


_AT_LEAST = ("speedup", "mean")


@dataclass(frozen=True)
class Bar:
    """One promise.

    Attributes:
        suite: "kernels", "step" and "passes" (judged at a sample of 10 %), "regret" or "budget".
        case: the case's name, or "*": all of them, the worst one counts. For metric "mean" a name
            of ``GROUPS``.
        metric: "speedup" (rival's median / ours; at least ``bar``), "slowdown" (ours / rival's; at
            most ``bar``), "mean" (geometric mean of the speed-ups of a group; at least ``bar``),
            "well predicted" (suite "regret", of a question in place of a case: the share of cases
            with a choice whose regret is at most ``NEAR``; at least ``bar``), "overhead" (what our
            step takes beyond plain backpropagation's over what the rival's does; at most ``bar``),
            "memory" (extra bytes beyond the result over the bytes of 3 float32 inputs and D^2; at
            most ``bar``) or "share" (of a step's time, the actual over the requested one, the worst
            of ``BUDGETS``; at most ``bar``).
        rival: the method compared with; "best rival": in each case the fastest of its rivals but
            unfold; "any rival": the fastest of all.
        bar, goal: what must hold, and what we would like.
        pairs: fewest alternating pairs; of a budget, steps after the warm-up.
        needs: a further method that must have been measured in the same run, or "".
        device, dtype: where it holds.
    """

    suite: str
    case: str
    metric: str
    rival: str
    bar: float
    goal: float | None = None
    pairs: int = 9
    needs: str = ""
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def on_registry(self) -> bool:
        """Whether it speaks of all of the registry's cases, or of a group of them."""
        return self.device == "cpu" and self.suite == "kernels" and self.case in ("*", *GROUPS)

    @property
    def text(self) -> str:
        what = "every case" if self.case == "*" else self.case
        if self.suite == "passes":
            what += ", forward and backward"
        if self.metric == "well predicted":
            return f"planner, {self.case}: cases within {NEAR:.0%} of the best >= {self.bar:.0%}"
        if self.metric == "share":
            return f"{what}: actual over requested share of the step <= {self.bar:g}"
        sign = ">=" if self.metric in _AT_LEAST else "<="
        against = "3 inputs + D^2" if self.metric == "memory" else self.rival
        return f"{what}: {self.metric} against {against} {sign} {self.bar:g}"


WHOLE_REGISTRY = "whole registry"
# The images that DecorUpdate samples of 256, which is what it costs; then all of them.
GPU_BATCHES = (26, 256)
# ResNets at 224x224, at these batches: where n >= D, S has something to average over.
GROUPS: dict[str, Callable[[dict], bool]] = {
    "resnet 3x3 stride 1, n >= D": lambda r: _resnet(r, [3, 3]) and r["n"] >= r["D"],
    "resnet 1x1": lambda r: _resnet(r, [1, 1]),
    "K >= 3 stride 1": lambda r: min(r["kernel"], default=1) >= 3 and set(r["stride"]) == {1},
    WHOLE_REGISTRY: lambda r: True,
}


def _resnet(record: dict, kernel: list[int]) -> bool:
    shaped = list(record["kernel"]) == kernel and set(record["stride"]) == {1}
    tagged = any(tag.startswith("resnet") for tag in record["tags"])
    batches = tuple(f" b{n}" for n in GPU_BATCHES)
    return shaped and tagged and record["name"].endswith(batches)


def _gpu(**bar) -> Bar:
    return Bar(device="cuda", dtype="bfloat16", **bar)


def _mean(group: str, rival: str, bar: float, goal: float | None = None) -> Bar:
    return _gpu(suite="kernels", case=group, metric="mean", rival=rival, bar=bar, goal=goal)


def _speedup(case: str, bar: float, goal: float | None = None) -> Bar:
    return Bar("kernels", case, "speedup", "unfold", bar, goal)


def _predicted(question: str, **more) -> Bar:
    return Bar("regret", question, "well predicted", "", 0.9, pairs=7, **more)


BARS: tuple[Bar, ...] = (
    _speedup("3x3 64@56 b32", 4, 6),
    _speedup("3x3 128@28 b32", 4, 6),
    _speedup("3x3 256@14 b32", 4, 6),
    _speedup("3x3 512@7 b32", 2.5, 4),
    _speedup("5x5 64@27 b16", 6, 10),
    _speedup("7x7 s2 3@224 b32", 2),
    _speedup("*", 0.95),
    Bar("kernels", "*", "memory", "", 1.0),
    Bar("kernels", "K >= 3 stride 1", "mean", "unfold", 4.5),
    Bar("kernels", WHOLE_REGISTRY, "mean", "any rival", 1.0, 1.3),
    Bar("step", "convnet 32x32 b128", "slowdown", "bp", 1.20, 1.10, pairs=25, needs="published"),
    Bar("step", "resnet18 32x32 b128", "overhead", "published", 0.5, needs="bp"),
    *(
        Bar("passes", f"{network} 32x32 b128", "slowdown", "bp", 1.02, pairs=pairs)
        for network, pairs in (("convnet", 25), ("resnet18", 9))
    ),
    _predicted("gram"),
    _predicted("update"),
    Bar("budget", "convnet 32x32 b128", "share", "", 1.25),
    Bar("budget", "resnet18 32x32 b128", "share", "", 1.25),
)
GPU_BARS: tuple[Bar, ...] = (
    _mean("resnet 3x3 stride 1, n >= D", "unfold", 5),
    _mean("resnet 3x3 stride 1, n >= D", "best rival", 1.0, 1.5),
    _mean("resnet 1x1", "unfold", 1.0, 1.6),
    _gpu(
        suite="step",
        case="resnet50 224x224 b256",
        metric="slowdown",
        rival="bp",
        bar=1.25,
        goal=1.05,
    ),
    _gpu(
        suite="step",
        case="resnet18 224x224 b256",
        metric="slowdown",
        rival="bp",
        bar=1.4,
        goal=1.10,
    ),
)

OURS, BP = "dbp", "bp"
SAMPLE = 0.1  # of the bars on steps and passes


@dataclass(frozen=True)
class Verdict:
    """A bar's outcome: its figure, if there is one, and ``where``, the case that decided."""

    bar: Bar
    status: str
    figure: float | None = None
    where: str = ""
    goal_met: bool | None = None
    why: str = ""

    def as_dict(self) -> dict:
        figure = None if self.figure is None else round(self.figure, 3)
        record = {"text": self.bar.text, "status": self.status, "figure": figure}
        record.update(goal=self.bar.goal, goal_met=self.goal_met, where=self.where, why=self.why)
        return {key: value for key, value in record.items() if value not in (None, "")}


def evaluate(result: dict, bars: tuple[Bar, ...] | None = None) -> list[Verdict]:
    """Holds a result (as saved) to the bars, in their order; by default to its device's."""
    if bars is None:
        bars = GPU_BARS if result.get("settings", {}).get("device") == "cuda" else BARS
    return [_evaluate(result, bar) for bar in bars]


def _evaluate(result: dict, bar: Bar) -> Verdict:
    settings = result.get("settings", {})
    for key in ("device", "dtype"):
        if settings.get(key) != getattr(bar, key):
            return Verdict(bar, NOT_MEASURED, why=f"holds for {key} {getattr(bar, key)}")
    if bar.metric == "well predicted":
        return _well_predicted(result, bar)
    if bar.metric == "share":
        return _within_budget(result, bar)
    if bar.on_registry and not settings.get("whole_registry"):
        return Verdict(bar, NOT_MEASURED, why="not the whole registry")
    if bar.metric == "mean":
        records = [r for r in result.get(bar.suite, ()) if GROUPS[bar.case](r)]
    else:
        records = [r for r in result.get(bar.suite, ()) if bar.case in ("*", r["name"])]
    if not records:
        return Verdict(bar, NOT_MEASURED, why="case not run")
    figures: list[float] = []
    worst: tuple[float, str] | None = None
    for record in records:
        figure = figure_of(record, bar)
        if isinstance(figure, str):
            ours_right = record["methods"].get(OURS, {}).get("status") == "ok"
            status = NOT_MEASURED if ours_right else MISSED
            return Verdict(bar, status, where=record["name"], why=figure)
        figures.append(figure)
        pick = min if bar.metric in _AT_LEAST else max
        worst = (figure, record["name"]) if worst is None else pick(worst, (figure, record["name"]))
    figure, where = worst
    if bar.metric == "mean":
        figure, where = math.exp(sum(map(math.log, figures)) / len(figures)), f"worst {where}"
        lacking = bar.device == "cuda" and _group_on_gpu(bar.case) - {r["name"] for r in records}
        if lacking:  # the figure is of those that the time did for
            why = f"{len(lacking)} of its cases not run"
            return Verdict(bar, NOT_MEASURED, figure, where, why=why)
    return Verdict(
        bar,
        MET if _holds(bar, figure, bar.bar) else MISSED,
        figure,
        where,
        None if bar.goal is None else _holds(bar, figure, bar.goal),
    )


def _group_on_gpu(group: str) -> set[str]:
    """Names of the registry's cases that a mean on a GPU is over."""
    cases = [c for n in GPU_BATCHES for c in registry.select(registry.RESNETS, n)]
    return {c.name for c in cases if GROUPS[group]({**vars(c), "n": c.n, "D": c.D})}


def _well_predicted(result: dict, bar: Bar) -> Verdict:
    asked = [r for r in result.get("regret", ()) if r["question"] == bar.case]
    if not asked:
        return Verdict(bar, NOT_MEASURED, why="suite not run")
    if not result["settings"].get("whole_registry"):
        return Verdict(bar, NOT_MEASURED, why="not the whole registry")
    known = [r for r in asked if len(r["methods"]) > 1]
    for record in known:
        predicted = record["methods"][record["predicted"]]
        if predicted["status"] != "ok":
            return Verdict(bar, MISSED, where=record["name"], why=predicted["reason"])
        if predicted["seconds"]["samples"] < bar.pairs:
            why = f"{predicted['seconds']['samples']} pairs, {bar.pairs} needed"
            return Verdict(bar, NOT_MEASURED, where=record["name"], why=why)
    share = sum(r["regret"] <= NEAR for r in known) / len(known)
    worst = max(known, key=lambda r: r["regret"])
    where = f"{worst['regret']:.0%} slower at worst, {worst['name']}"
    return Verdict(bar, MET if share >= bar.bar else MISSED, share, where)


def budget_case(record: dict) -> str:
    """What a bar calls the network of a budget's record, of which there may be several."""
    return f"{record['network']} b{record['batch']}"


def _within_budget(result: dict, bar: Bar) -> Verdict:
    records = [r for r in result.get("budget", ()) if budget_case(r) == bar.case]
    runs = [run for record in records for run in record["runs"] if run["budget"] in BUDGETS]
    missing = sorted(set(BUDGETS) - {run["budget"] for run in runs})
    if missing:
        why = f"no run at {missing[0]:.0%}" if runs else "case not run"
        return Verdict(bar, NOT_MEASURED, why=why)
    fewest = min(record["steps"] - record["warm_up"] for record in records)
    if fewest < bar.pairs:
        return Verdict(bar, NOT_MEASURED, why=f"{fewest} steps, {bar.pairs} needed")
    worst = max(runs, key=lambda run: run["share"] / run["budget"])
    figure = worst["share"] / worst["budget"]
    status = MET if _holds(bar, figure, bar.bar) else MISSED
    return Verdict(bar, status, figure, f"worst {worst['budget']:.0%}")


def _holds(bar: Bar, figure: float, limit: float) -> bool:
    return figure >= limit if bar.metric in _AT_LEAST else figure <= limit


def figure_of(record: dict, bar: Bar) -> float | str:
    """The bar's figure on one case record, or a sentence why there is none."""
    methods = record["methods"]
    if bar.suite in ("step", "passes") and record.get("sample", SAMPLE) != SAMPLE:
        return f"holds at sample {SAMPLE:g}, not {record['sample']:g}"
    rival = bar.rival
    if rival in ("best rival", "any rival"):
        rival = _fastest_rival(methods, but="unfold" if rival == "best rival" else "")
    for name in filter(None, (OURS, rival, bar.needs)):
        method = methods.get(name, {"status": "not run"})
        if method["status"] != "ok":
            reason = f": {method['reason']}" if "reason" in method else ""
            return f"{name} {method['status']}{reason}"
        if method["seconds"]["samples"] < bar.pairs:
            return f"{method['seconds']['samples']} pairs, {bar.pairs} needed"
    if bar.metric == "memory":
        allowance = memory_allowance(record)
        return methods[OURS]["extra_bytes"] / allowance
    if bar.metric == "overhead":
        ours, theirs = (speedup(record, name, BP) - 1 for name in (OURS, rival))
        return ours / theirs if theirs > 0 else f"{rival} takes no more than {BP}"
    ratio = speedup(record, rival)
    return ratio if bar.metric in _AT_LEAST else 1 / ratio


def _fastest_rival(methods: dict, but: str) -> str:
    others = {
        name: method.get("replay", method["seconds"])["median"]
        for name, method in methods.items()
        if name not in (OURS, but) and "seconds" in method and not method.get("ours")
    }
    return min(others, key=others.get, default="any other rival")


def memory_allowance(record: dict) -> int:
    """Bytes of 3 float32 inputs and of one float32 S."""
    return 4 * (3 * record["input_elements"] + record["groups"] * record["D"] ** 2)


def speedup(record: dict, rival: str, ours: str = OURS) -> float | None:
    """The rival's median over ours, of replayed CUDA graphs where there are such times of both.

    None unless both were measured.
    """
    pair = [record["methods"].get(name, {}) for name in (rival, ours)]
    for key in ("replay", "seconds"):
        if all(key in method for method in pair):
            return pair[0][key]["median"] / pair[1][key]["median"]
    return None


def thresholds(case: str, rival: str) -> Iterator[Bar]:
    """The speed-up bars of one kernel case."""
    return (
        bar
        for bar in BARS
        if bar.suite == "kernels" and bar.metric == "speedup" and bar.rival == rival
        if bar.case == case
    )


def as_records(verdicts: list[Verdict]) -> list[dict]:
    """For a result file."""
    return [verdict.as_dict() for verdict in verdicts]
