"""Suite "regret": what the planner's choice costs against the best of all that it could choose.

For each case every algorithm of ``patch_gram`` is timed (question "gram"), and on the images that
are sampled from the batch every plan of the update ("update"). The regret is the time of the
predicted best over that of the measured best, less one. No candidate is left out unseen: it is out
once a single run takes more than ``_OUT`` times the fastest so far, if need be on a part of the
images, which cannot take longer than all of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from bench.core import bars, check, registry
from bench.core.registry import Case, with_batch
from bench.core.suite import Job, Settings, Suite, batch_of, failed
from bench.core.table import format_table, short
from bench.suites.kernels import make_input, plans_for
from dbp_kernels.tools.cases import error
from dbp_kernels.tools.timing import time_interleaved, time_once

QUESTIONS = ("gram", "update")
DEFAULT_PAIRS = 7
_OUT = 1.5
_BRIEF = 0.05  # seconds below which a single run is repeated: the first call of a shape is slow
# One update; of a size at which an error in C shows in R.


def regret_cases(cases: Sequence[Case], sample: float) -> Iterator[tuple[str, Case]]:
    """(question, case): S of the whole batch, the update from the sampled images of it."""
    for case in cases:
        yield "gram", case
    sampled = [with_batch(case, max(1, round(sample * case.N))) for case in cases]
    for case in {case.name: case for case in sampled}.values():
        yield "update", case


def run_regret(
    question: str,
    case: Case,
    settings: Settings,
    tick: Callable[[], object] = lambda: None,
) -> dict:
    """Times all candidates of one question on one case; returns the result record.

    Each candidate's record has "status" ("ok", or "wrong" or "failed" with a reason),
    "predicted_seconds", "once" (seconds of a single run, of "images" if not of all) and, unless
    that told enough, "seconds". "best" and "regret" are there if there was a choice.
    """
    x = make_input(case, settings)
    choices, run = _candidates(question, case, x)
    predicted = str(choices[0])
    with torch.no_grad():
        methods = _single_runs(choices, run, x)
        whole = {n: m["once"] for n, m in methods.items() if "once" in m and "images" not in m}
        near = {n for n, s in whole.items() if n == predicted or s <= _OUT * min(whole.values())}
        if len(choices) > 1:
            times = time_interleaved(
                {str(c): partial(run, c) for c in choices if str(c) in near},
                settings.pairs or DEFAULT_PAIRS,
                device=settings.device,
                warmup=1,
                tick=tick,
            )
            for name, spread in times.items():
                methods[name]["seconds"] = spread.as_dict()
    return {
        "name": case.name,
        "question": question,
        "tags": list(case.tags),
        "n": case.n,
        "D": case.D,
        "groups": case.groups,
        "predicted": predicted,
        **_outcome(predicted, methods),
        "methods": methods,
    }


def _candidates(question: str, case: Case, x: Tensor) -> tuple[tuple, Callable]:
    """All that the planner could choose, its choice first, and run(choice, images=all)."""
    from dbp_kernels import backends
    from dbp_kernels.planning.geometry import make_geometry
    from dbp_kernels.rules import UpdateRule

    geometry, backend = make_geometry(x.shape, *case.window), backends.select(x.device.type)
    R = _matrix(geometry, x) if question == "update" else None

    def run(choice, images: int | None = None) -> Tensor:
        part, g = (x, geometry) if images is None else (x[:images], geometry.with_batch(images))
        if R is None:
            return backend.patch_gram(part, g, choice)
        rule = UpdateRule.make("standard", 0.5, g.dim)
        return backend.decor_update(part, R, g, rule, False, choice).new(R, 1e-2)

    return plans_for(f"{question}_choices", x, case.window), run


def _matrix(geometry, x: Tensor) -> Tensor:
    """R: the identity and some noise."""
    from dbp_kernels.precision import statistics_dtype

    generator, dim = torch.Generator().manual_seed(1), geometry.dim
    noise = torch.randn(geometry.groups, dim, dim, generator=generator)
    R = torch.eye(dim) + noise * (0.1 / dim**0.5)
    return R.to(x.device, statistics_dtype(x.dtype))


def _single_runs(choices: Sequence, run: Callable, x: Tensor) -> dict[str, dict]:
    """The record of every candidate; one whose result differs from the first's is wrong."""
    limit, expected, fastest, records = 10 * check.plain_cap(x), None, float("inf"), {}
    for choice in choices:
        record = records[str(choice)] = {"predicted_seconds": float(f"{choice.seconds:.4g}")}
        try:
            images = _images_until(lambda k, c=choice: run(c, k), x, _OUT * fastest)
            if images:
                record.update(status="ok", images=images[0], once=images[1])
                continue
            result: list[Tensor] = []
            once = time_once(lambda c=choice, r=result: r.append(run(c)), x.device)
            expected = result[0].double() if expected is None else expected
            difference = error(result.pop(), expected)
            if once < _BRIEF:
                once = min(once, time_once(lambda c=choice: run(c), x.device))
        except Exception as failure:  # whatever it is, the other candidates get their numbers
            record.update(failed(failure))
            continue
        if difference <= limit:
            record.update(status="ok", once=float(f"{once:.4g}"))
            fastest = min(fastest, once)
        else:
            reason = f"differs by {difference:.2e}, {limit:.0e} allowed"
            record.update(status="wrong", reason=reason)
    return records


def _images_until(run: Callable, x: Tensor, limit: float) -> tuple[int, float] | None:
    """(images, seconds) of a part of x that already takes longer than ``limit`` seconds, or None.

    One run of a shape may be slow because it is the first, so brief ones are not trusted.
    """
    for images in sorted({1, max(1, len(x) // 8)} - {len(x)}):
        if limit == float("inf"):
            return None
        once = time_once(lambda k=images: run(k), x.device)
        if once > limit and once < _BRIEF:
            once = time_once(lambda k=images: run(k), x.device)
        if once > limit:
            return images, float(f"{once:.4g}")
    return None


def _outcome(predicted: str, methods: dict[str, dict]) -> dict:
    """{"best", "regret"}; nothing where there was no choice or the predicted best has no time."""
    medians = {n: m["seconds"]["median"] for n, m in methods.items() if "seconds" in m}
    if predicted not in medians:
        return {}
    best = min(medians, key=medians.get)
    return {"best": best, "regret": float(f"{medians[predicted] / medians[best] - 1:.4g}")}


def regret_table(records: Sequence[dict], worst: int = 5) -> str:
    """For each question the share of cases predicted well, and the ``worst`` predictions."""
    lines = []
    for question in dict.fromkeys(record["question"] for record in records):
        asked = [r for r in records if r["question"] == question]
        known = [r for r in asked if "regret" in r]
        if not known:
            continue
        good = sum(r["regret"] <= bars.NEAR for r in known)
        lines.append(
            f"{question}: the predicted best is within {bars.NEAR:.0%} of the measured best in "
            f"{good} of {len(known)} cases ({good / len(known):.0%}); "
            f"{len(asked) - len(known)} further cases without a choice"
        )
        rows = [["case", "n", "D", "predicted best", "ms", "measured best", "ms", "regret"]]
        for r in sorted(known, key=lambda r: -r["regret"])[:worst]:
            row = [r["name"], str(r["n"]), str(r["D"])]
            for choice in (r["predicted"], r["best"]):
                row += [choice, short(1e3 * r["methods"][choice]["seconds"]["median"])]
            rows.append([*row, f"{r['regret']:.1%}"])
        lines += ["", format_table(rows), ""]
    return "\n".join(lines).rstrip()


def _jobs(options: argparse.Namespace, settings: Settings) -> Iterator[Job]:
    tag = "core" if options.quick and not options.filter else None
    cases = registry.select(options.filter, batch_of(options), tag)
    for question, case in regret_cases(cases, options.sample):
        run = lambda tick, q=question, c=case: run_regret(q, c, settings, tick)  # noqa: E731
        yield Job("regret", case.name, run, settings.pairs or DEFAULT_PAIRS)


SUITE = Suite("the planner's choices", regret_table, _jobs)
