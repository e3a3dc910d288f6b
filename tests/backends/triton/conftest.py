"""Where the Triton kernels run in tests.

Triton decides at import whether kernels are interpreted or compiled, so one process can only do one:

* Without a GPU ``tests/conftest.py`` sets TRITON_INTERPRET=1 for the pytest process: kernels take
  CPU tensors and run in the interpreter (marker ``interpreter``). With a GPU (or with
  TRITON_INTERPRET=0) they are compiled, and the same tests run on the device: use ``DEVICE``.
* Tests of compiled code without a GPU (markers ``aot`` and ``ptx``) use the fixture ``compiled``:
  ``compiled(function, *args)`` calls a module-level function in a child process without the
  interpreter (one child for the whole pytest process) and returns its result; arguments and result
  are pickled. In that function, ``with simulator.simulated(target=80, seed=0):`` runs every launch's
  compiled PTX in the simulator, on CPU tensors.

File names must differ from those in ``tests/`` (there are no packages here): test_triton_ops.py.
"""

import importlib.util
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import child
import pytest

from dbp_kernels.backends.triton import runtime

HERE = Path(__file__).parent

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]


@pytest.fixture(scope="session")
def compiled():
    """``compiled(function, *args, **kwargs)``: the call's result in a process that compiles."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=child.compile_kernels) as pool:
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()


def pytest_collection_modifyitems(items):
    """Marks tests by where they run; ``ptx`` is skipped where the simulator is not installed."""
    simulator = importlib.util.find_spec("ptxsim")
    for item in items:
        if item.path.parent != HERE:
            continue
        if item.get_closest_marker("ptx"):
            if simulator is None:
                item.add_marker(pytest.mark.skip(reason="ptxsim is not installed"))
        elif not item.get_closest_marker("aot"):
            item.add_marker("interpreter" if runtime.INTERPRET else "gpu")
