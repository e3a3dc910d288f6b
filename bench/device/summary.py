"""The short report of a device check: stages, what went wrong, tables of what was measured."""

from __future__ import annotations

from bench.core import report, table
from bench.device.describe import FOUND
from bench.device.stage import SKIPPED
from dbp_kernels.verify.workers import NOT_RUN, PASSED

_MOST = 40  # lines of what went wrong


def summary(content: dict) -> str:
    """Of a result file's content."""
    parts = [stages_table(content["checks"]), wrong(content["checks"])]
    if content["kernels"]:
        parts += ["patch_gram by kernels", families_table(content["kernels"])]
    parts += [matrices_table(content.get("matrices", [])), report.text_report(content)]
    return "\n\n".join(part for part in parts if part)


def stages_table(checks: dict) -> str:
    """One row a stage."""
    rows = [["stage", "status", "seconds", "cases"]]
    for name, check in checks.items():
        counts = ", ".join(f"{n} {what}" for what, n in check.get("outcomes", {}).items())
        rows.append([name, check["status"], str(check.get("seconds", "-")), counts or "-"])
    return table.format_table(rows)


def wrong(checks: dict) -> str:
    """One line for every case that went wrong or was left out for a reason of its own."""
    lines = []
    for stage, check in checks.items():
        for case in check["cases"]:
            if case["status"] not in (PASSED, NOT_RUN, SKIPPED):
                reason = (str(case.get("reason", "-")).splitlines() or ["-"])[0]
                lines.append(f"{stage}: {case['case']}: {case['status']}: {reason[:200]}")
        for family, problem in _unusable(check).items():
            lines.append(f"{family} kernels cannot run here: {problem}")
    rest = [f"and {len(lines) - _MOST} more"] if len(lines) > _MOST else []
    return "\n".join(lines[:_MOST] + rest)


def _unusable(check: dict) -> dict[str, str]:
    families: dict[str, str] = {}
    for case in check["cases"]:
        families.update(case.get(FOUND, {}).get("families", {}))
    return {name: problem for name, problem in families.items() if problem}


def families_table(records: list[dict]) -> str:
    """Milliseconds of each family's kernels, replayed / as called, and of the rivals."""
    names = list(dict.fromkeys(name for r in records for name in _methods(r)))
    rows = [["replayed / as called, ms", *names]]
    for record in records:
        methods = _methods(record)
        rows.append([record["name"], *(_times(methods.get(name)) for name in names)])
    return table.format_table(rows)


def _methods(record: dict) -> dict:
    return {**record["methods"], **record.get("backends", {})}


def matrices_table(records: list[dict]) -> str:
    """Milliseconds of the kernels on D x D, and of the libraries."""
    if not records:
        return ""
    names = list(dict.fromkeys(name for r in records for name in r["methods"]))
    rows = [["replayed / as called, ms", *names]]
    rows += [[r["name"], *(_times(r["methods"].get(name)) for name in names)] for r in records]
    return table.format_table(rows)


def _times(method: dict | None) -> str:
    if method is None:
        return "-"
    if "seconds" not in method:
        return method["status"]
    parts = [method[key]["median"] if key in method else None for key in ("replay", "seconds")]
    return " / ".join("-" if part is None else f"{1e3 * part:.3g}" for part in parts)
