"""The result of a run: a line a case, written at once, and from the lines the result file.

<stem>.jsonl has every case as it was recorded. <stem>.json has the format of other results: what
cases reported for it (the records of suites "kernels" and "step" among it), and "checks", of each
stage its status, seconds, outcomes and cases.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from bench.core import machine, results
from bench.device.stage import RESULT, SKIPPED
from dbp_kernels.verify.workers import NOT_RUN, PASSED

CUT_SHORT, FAILED = "cut short", "failed"


def merge(into: dict, more: dict) -> None:
    """Adds what a case reported: lists grow, dictionaries are merged, what is there stays.

    Records of the same name, of different methods on one problem, become one.
    """
    for key, value in more.items():
        if isinstance(value, dict):
            merge(into.setdefault(key, {}), value)
        elif isinstance(value, list):
            there = into.setdefault(key, [])
            for item in value:
                merge_item(there, item)
        else:
            into.setdefault(key, value)


def merge_item(there: list, item: object) -> None:
    """Appends it, or merges it into the record of its name."""
    if isinstance(item, dict) and "name" in item and "methods" in item:
        for record in there:
            if record["name"] == item["name"]:
                merge_record(record, item)
                return
    there.append(item)


def merge_record(record: dict, more: dict) -> None:
    """Its methods and parts; of all else the first word stands."""
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(record.get(key), dict):
            for name, entry in value.items():
                record[key].setdefault(name, entry)
        else:
            record.setdefault(key, value)


class Result:
    """The content of the result file so far, and where it is written."""

    def __init__(self, header: dict, stem: Path) -> None:
        self.content = {**header, "checks": {}, "kernels": [], "step": []}
        self.path = stem.with_name(stem.name + ".json")
        self.lines = stem.with_name(stem.name + ".jsonl")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._log = self.lines.open("w")

    def add(self, stage: str, line: dict) -> None:
        """A case of a stage: a line, and the whole file anew."""
        self._log.write(json.dumps({"stage": stage, **line}) + "\n")
        self._log.flush()
        merge(self.content, line.get(RESULT, {}))
        check = self.content["checks"].setdefault(stage, {"status": NOT_RUN, "cases": []})
        check["cases"].append({key: value for key, value in line.items() if key != RESULT})
        self.save()

    def close_stage(self, stage: str, seconds: float) -> str:
        """Sums up a stage; returns its status."""
        check = self.content["checks"].setdefault(stage, {"status": NOT_RUN, "cases": []})
        outcomes = Counter(case["status"] for case in check["cases"])
        check.update(status=_status(outcomes), seconds=round(seconds, 1), outcomes=dict(outcomes))
        self.save()
        return check["status"]

    def save(self) -> None:
        """Replaces the file in one step: a reader never sees half of it."""
        measured = self.content.get("peaks")
        for record in self.content["kernels"] if measured else ():
            machine.add_fractions(record, measured)
        partial = self.path.with_suffix(".partial")
        partial.write_text(results.to_text(self.content))
        partial.replace(self.path)


def _status(outcomes: Counter) -> str:
    if set(outcomes) - {PASSED, SKIPPED, NOT_RUN}:
        return FAILED
    if outcomes[NOT_RUN]:
        return CUT_SHORT
    return PASSED if outcomes[PASSED] else SKIPPED
