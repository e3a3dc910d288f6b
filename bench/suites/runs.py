"""Table of a study's runs; its page is made by ``python -m experiments report``."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from bench.core.suite import Suite
from bench.core.table import format_table, short


def runs_table(records: Sequence[dict]) -> str:
    """One row for a method's trials, one for its final runs: how many, how they ended, medians."""
    kinds = dict.fromkeys((record["method"], record["phase"]) for record in records)
    rows = [["method", "phase", "runs", "lost", "epochs", "s", "test score, median and range"]]
    for method, phase in sorted(kinds):
        found = [r for r in records if (r["method"], r["phase"]) == (method, phase)]
        done = [r for r in found if r["status"] == "finished"]
        row = [method, phase, str(len(found)), str(len(found) - len(done))]
        if done:
            scores = sorted(r["test_score"] for r in done)
            row.append(f"{statistics.median(r['epochs'] for r in done):g}")
            row.append(short(statistics.median(r["seconds"] for r in done)))
            row.append(f"{statistics.median(scores):.4f} ({scores[0]:.4f} to {scores[-1]:.4f})")
        rows.append(row + ["-"] * (len(rows[0]) - len(row)))
    return format_table(rows)


SUITE = Suite("training runs", runs_table)
