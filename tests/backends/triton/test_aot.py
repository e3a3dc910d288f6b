"""Every shipped (kernel, configuration, dtype), compiled for every target: no spills, it fits."""

import importlib

import compiler
import pytest
import triton
import triton.language as tl

from dbp_kernels.backends.triton import runtime

pytestmark = pytest.mark.aot

PARTS = 6  # of a module's cases: so many tests for every target


def parts():
    """All of sm_90 and a sixth of the other targets; the rest is compiled by `make test-all`."""
    for target in runtime.TARGETS:
        for part in range(PARTS):
            quick = target == 90 or part == 0
            marks = [] if quick else [pytest.mark.slow]
            yield pytest.param(target, part, marks=marks, id=f"sm_{target}-{part}")


def short(module):
    return module.rpartition(".")[2]


@pytest.mark.parametrize(("target", "part"), list(parts()))
@pytest.mark.parametrize("module", compiler.kernel_modules(), ids=short)
def test_compiled_code(compiled, module, target, part):
    limit = runtime.shared_limit(target)
    for code in compiled(compiler.compile_cases, module, target, part, PARTS):
        assert code.stack == 0, f"{code} spills"
        assert code.shared <= limit, f"{code} needs more than {limit} bytes of shared memory"
        assert code.registers <= 255
        if code.tensor_cores and target == 90:
            assert code.wgmma, f"{code} does not use wgmma"
        if code.tensor_cores and target < 90:
            assert code.mma, f"{code} does not use mma.sync"


@pytest.mark.parametrize("module", compiler.kernel_modules(), ids=short)
def test_every_kernel_is_shipped_for_every_target(module):
    for target in runtime.TARGETS:
        cases = importlib.import_module(module).cases(target)
        names = [case.name for case in cases]
        assert len(set(names)) == len(names)
        assert {case.kernel.fn.__name__ for case in cases} == compiler.kernels_of(module)
        for case in cases:
            arguments = [*case.signature, *case.constexprs]
            assert sorted(arguments) == sorted(case.kernel.arg_names), case.name


def test_a_spill_would_be_seen(compiled):
    """A tile far too large for its registers."""
    assert compiled(spilling_stack) > 0


def spilling_stack() -> int:
    assert not runtime.INTERPRET
    case = runtime.KernelCase(
        name="too large",
        kernel=too_large_kernel,
        signature={"a": "*fp16", "b": "*fp16", "out": "*fp32"},
        constexprs={"BLOCK": 128},
        num_warps=1,
        num_stages=1,
        tensor_cores=False,
    )
    return compiler.compile_case(case, 80).stack


@triton.jit
def too_large_kernel(a, b, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out + i, tl.dot(tl.load(a + i), tl.load(b + i)))
