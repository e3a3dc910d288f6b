"""Tables of whole networks: suites "update", "step" and "memory"."""

from __future__ import annotations

from collections.abc import Sequence

from . import bars
from .table import format_table, milliseconds


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
    """The table, then what else was measured of the steps."""
    return step_table(records)


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
