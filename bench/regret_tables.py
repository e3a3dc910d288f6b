"""The tables of suite "regret"."""

from __future__ import annotations

from collections.abc import Sequence

from bench import bars
from bench.table import format_table, short


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
