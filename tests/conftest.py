"""Settings shared by all tests: one thread per process, Triton's mode, and hypothesis profiles."""

import os

# Before torch is imported: several test processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Before Triton is imported: without a GPU its kernels run in the interpreter. What this means
    # for tests of compiled code is in tests/backends/triton/conftest.py.
    os.environ.setdefault("TRITON_INTERPRET", "1")

_COMMON = {
    "deadline": None,  # first calls build programs and kernels
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
# The same examples on every run. HYPOTHESIS_PROFILE=random explores new ones, =thorough ten times
# as many.
settings.register_profile("deterministic", derandomize=True, max_examples=50, **_COMMON)
settings.register_profile("random", max_examples=50, print_blob=True, **_COMMON)
settings.register_profile("thorough", max_examples=500, print_blob=True, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "deterministic"))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hostile cases (tests/hostile)")
    group.addoption("--minutes", type=float, default=0, help="go on with further seeds for so long")
    group.addoption(
        "--tally", metavar="FILE", help="write the cases tried and failed, by kind, as JSON"
    )


@pytest.fixture(scope="module")
def poison():
    """Fills what torch.empty returns with NaN, so that an element nobody writes shows.

    Of module scope because hypothesis runs many examples within one function-scoped fixture.
    """
    from dbp_kernels.verify.checks import poisoned  # only now: TRITON_INTERPRET is set

    with poisoned():
        yield
