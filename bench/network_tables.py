"""Tables of whole networks: suites "update", "step" and "memory"."""

from __future__ import annotations

from collections.abc import Sequence

from bench import bars
from bench.steps import IDLE, SAMPLES, UPDATE_EVERY, sampled
from bench.table import format_table, milliseconds


def step_table(records: Sequence[dict]) -> str:
    """One row a network and variant: milliseconds a step and the ratio to plain backpropagation."""
    rows = [["network", "sample", "variant", "ms [quartiles]", "x bp", "pairs"]]
    for record in records:
        for name, method in record["methods"].items():
            slowdown = bars.speedup(record, name, "bp")
            rows.append(
                [
                    record["name"],
                    f"{record['sample']:g}",
                    name,
                    milliseconds(method),
                    "-" if slowdown is None else f"{slowdown:.3f}",
                    str(method["seconds"]["samples"]) if "seconds" in method else "-",
                ]
            )
    return format_table(rows)


def step_text(records: Sequence[dict]) -> str:
    """The table of steps; samplings where they were measured; where the extra time goes."""
    parts = [step_table(records)]
    grid = [record for record in records if IDLE in record["methods"]]
    if grid:
        parts += ["by sample and update_every", sampling_table(grid)]
    broken_down = [record for record in records if "breakdown" in record]
    if broken_down:
        parts += ["where our extra time goes", breakdown_table(broken_down)]
    return "\n\n".join(parts)


def sampling_table(records: Sequence[dict]) -> str:
    """Ratio to plain backpropagation by sample and update_every.

    With update_every=k: one step with an update and k - 1 idle ones, as measured, over k plain ones.
    """
    rows = [["network", "sample", *(f"every {k}" for k in UPDATE_EVERY)]]
    for record in records:
        idle = bars.speedup(record, IDLE, "bp")
        for sample in SAMPLES:
            updating = bars.speedup(record, sampled(sample), "bp")
            cells = ["-"] * len(UPDATE_EVERY)
            if None not in (idle, updating):
                cells = [f"{(updating + (k - 1) * idle) / k:.3f}" for k in UPDATE_EVERY]
            rows.append([record["name"], f"{sample:.0%}", *cells])
    return format_table(rows)


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


def update_table(records: Sequence[dict]) -> str:
    """One row a network: our update, and how many times as long the published one takes."""
    rows = [["network", "images", "R MB", "ours ms [quartiles]", "published ms", "published x"]]
    for record in records:
        ours, published = (record["methods"].get(name) for name in ("dbp", "published"))
        ratio = bars.speedup(record, "published")
        rows.append(
            [
                record["name"],
                str(record["images"]),
                f"{record['R_bytes'] / 1e6:.0f}",
                milliseconds(ours),
                milliseconds(published),
                "-" if ratio is None else f"{ratio:.2f}",
            ]
        )
    return format_table(rows)


def memory_table(records: Sequence[dict]) -> str:
    """One row a network and variant: megabytes at the peak, and over plain backpropagation's.

    "resident" is what stays between steps: weights, gradients, Adam's moments, R.
    """
    rows = [["network", "variant", "peak MB", "x bp", "peak - bp, MB", "resident MB", "R MB"]]
    for record in records:
        plain = record["methods"].get("bp", {}).get("peak_bytes")
        for name, method in record["methods"].items():
            peak = method.get("peak_bytes")
            row = [record["name"], name, method["status"], "-", "-", "-", "-"]
            if peak is not None:
                row[2] = f"{peak / 1e6:.0f}"
                row[5] = f"{method['resident_bytes'] / 1e6:.0f}"
                if plain:
                    row[3:5] = [f"{peak / plain:.2f}", f"{(peak - plain) / 1e6:.0f}"]
                if name != "bp":
                    row[6] = f"{record['R_bytes'] / 1e6:.0f}"
            rows.append(row)
    return format_table(rows)
