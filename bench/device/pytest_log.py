"""A pytest plugin: every test's outcome as a line of JSON, at once, so that a killed run leaves them.

``python -m pytest -p bench.device.pytest_log`` with the file's name in DBP_TEST_LOG.
"""

from __future__ import annotations

import json
import os


def pytest_runtest_logreport(report) -> None:
    """In the main process, also for tests that other processes ran."""
    path = os.environ.get("DBP_TEST_LOG")
    if not path or os.environ.get("PYTEST_XDIST_WORKER"):
        return
    # a test counts once: by its call, or by the set-up or tear-down that ended it otherwise
    if report.when != "call" and report.passed:
        return
    line = {"test": report.nodeid, "outcome": report.outcome}
    if report.failed:
        line["why"] = str(report.longrepr)[-1000:]
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")
