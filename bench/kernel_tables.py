"""Tables of patch_gram on layers: suites "kernels" and "scaling"."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from bench import bars
from bench.table import format_table, milliseconds, short


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
        row += [_ratio(record, rival) for rival in rivals]
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


def _ratio(record: dict, rival: str) -> str:
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


def scaling_table(records: Sequence[dict]) -> str:
    """One row a point of a sweep: measured and predicted time, and the exponents in between.

    "grows" is the exponent of n or D (whichever the sweep makes grow) from the row before.
    """
    head = ["sweep", "value", "n", "D", "ours ms [quartiles]", "predicted ms", "predicted/ours"]
    rows = [[*head, "grows", "unfold x", "algorithm"]]
    before = None
    for record in records:
        ours = record["methods"][bars.OURS]
        row = [record["sweep"], str(record["value"]), str(record["n"]), str(record["D"])]
        row.append(milliseconds(ours))
        predicted = record.get("predicted_seconds")
        row.append("-" if predicted is None else short(predicted * 1e3))
        known = predicted is not None and "seconds" in ours
        row.append(f"{predicted / ours['seconds']['median']:.2f}" if known else "-")
        row += [_exponent(before, record), _ratio(record, "unfold"), record.get("choice") or "-"]
        rows.append(row)
        before = record
    return format_table(rows)


def _exponent(before: dict | None, record: dict) -> str:
    """The power of n or D with which our time grew, for neighbours in one sweep."""
    if before is None or before["sweep"] != record["sweep"]:
        return "-"
    times = [r["methods"][bars.OURS].get("seconds") for r in (before, record)]
    for size in ("n", "D"):
        if before[size] != record[size] and None not in times:
            ratio = math.log(times[1]["median"] / times[0]["median"])
            return f"{size}^{ratio / math.log(record[size] / before[size]):.2f}"
    return "-"
