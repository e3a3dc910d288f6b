"""Long runs: every step leaves as much behind, and takes as long, as those before.

20,000 steps of each form are ``python -m bench long-run``.
"""

import pytest

from bench.suites import long_run

STEPS, WINDOWS = 600, 8


@pytest.mark.kind("long runs")
def test_nothing_grows(campaign):
    for case, rng in enumerate(campaign.cases(len(long_run.FORMS))):
        form = long_run.FORMS[case % len(long_run.FORMS)]
        record = long_run.measure(form, STEPS, WINDOWS, seed=rng.randrange(2**32))
        assert long_run.grows(record) == [], form
