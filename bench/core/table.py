"""Markdown tables, and how times are written in them."""

from __future__ import annotations

from collections.abc import Sequence


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, columns aligned; the first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def milliseconds(method: dict | None) -> str:
    if method is None or "seconds" not in method:
        return (method or {"status": "-"})["status"]
    seconds = method["seconds"]
    median, q1, q3 = (short(seconds[key] * 1e3) for key in ("median", "q1", "q3"))
    return f"{median} [{q1}-{q3}]"


def short(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
