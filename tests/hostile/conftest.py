"""Hostile suites: many seeded cases of each kind, counted; `make test-hostile` runs them all.

A suite has a fixed number of cases, each with a generator of its own. ``--minutes M`` has every
suite go on with further seeds until its share of M minutes is over; ``--tally FILE`` writes how many
cases of each kind were tried and failed.
"""

import json
import os
import platform
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.hostile)


class Campaign:
    """The cases of one kind that one test tries; the first failure ends it, and counts.

    Args:
        kind: what the cases have in common, such as "signals": a row of the tally.
        seconds: to go on for after the fixed number of cases.
    """

    def __init__(self, kind: str, seconds: float) -> None:
        self.kind, self.tried = kind, 0
        self._seconds = seconds

    def cases(self, count: int, first_seed: int = 0) -> Iterator[random.Random]:
        """``count`` generators, seeded by consecutive numbers, and more while there is time."""
        end = time.monotonic() + self._seconds
        while self.tried < count or time.monotonic() < end:
            self.tried += 1  # before it is tried: a failure is among them
            yield random.Random(first_seed + self.tried)


@pytest.fixture
def campaign(request: pytest.FixtureRequest) -> Iterator[Campaign]:
    """Of the kind that the test's marker ``kind("...")`` names."""
    marker = request.node.get_closest_marker("kind")
    assert marker is not None, "expected @pytest.mark.kind(...)"
    tests = sum(1 for item in request.session.items if item.get_closest_marker("kind"))
    seconds = 60 * request.config.getoption("--minutes") * _workers() / tests
    own = Campaign(marker.args[0], seconds)
    request.node.user_properties.append(("kind", own.kind))
    yield own
    request.node.user_properties.append(("tried", own.tried))


def _workers() -> int:
    return int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """The tally, from the reports: with several processes only these reach the one that writes."""
    tried: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    for outcome, reports in terminalreporter.stats.items():
        for report in reports:
            known = dict(getattr(report, "user_properties", ()))
            if "kind" not in known:
                continue
            tried[known["kind"]] += known.get("tried", 0)  # of a teardown's report
            failed[known["kind"]] += outcome in ("failed", "error")
    if not tried:
        return
    terminalreporter.section("hostile cases")
    table = {kind: {"tried": tried[kind], "failed": failed[kind]} for kind in sorted(tried)}
    for kind, own in table.items():
        terminalreporter.line(f"{kind}: {own['tried']} tried, {own['failed']} failed")
    if (path := config.getoption("--tally")) is not None:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        whole = {"command": " ".join(["pytest", *sys.argv[1:]]), **versions, "kinds": table}
        Path(path).write_text(json.dumps(whole, indent=1) + "\n")
