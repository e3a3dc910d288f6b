"""How kernels start: interpreted in this process, compiled and simulated in the child's."""

import pytest
import simulator
import torch
import triton
import triton.language as tl
from helpers import DEVICE, case

from bench.suites.host_time import stub_driver
from dbp_kernels.backends.triton import runtime


@triton.jit
def scale_kernel(x, out, n, stride, factor, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + index * stride, mask=index < n)
    tl.store(out + index * stride, value * factor, mask=index < n)


def scaled(x: torch.Tensor, stride: int = 1) -> torch.Tensor:
    out = torch.full_like(x, float("nan"))
    n, grid = x.numel() // stride, (triton.cdiv(x.numel(), 64),)
    runtime.launch(
        scale_kernel, grid, x, out, n, stride, factor=2.5, BLOCK=64, num_warps=1, num_stages=1
    )
    return out


def scaled_in_simulator(target: int, x: torch.Tensor, stride: int) -> tuple[torch.Tensor, list]:
    assert not runtime.INTERPRET
    assert runtime.unusable("cpu") is not None
    with simulator.simulated(target) as launched:
        assert runtime.unusable("cpu") is None
        assert runtime.target(x.device) == target
        return scaled(x, stride), launched


def test_launch_runs_the_kernel():
    x = torch.randn(100, device=DEVICE)
    assert torch.equal(scaled(x), x * 2.5)


def test_an_empty_grid_launches_nothing():
    assert scaled(torch.empty(0, device=DEVICE)).numel() == 0


@pytest.mark.ptx
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("stride", [1, 3])
def test_compiled_code_runs_in_the_simulator(compiled, dtype, target, stride):
    x = torch.randn(99, dtype=dtype)
    out, launched = compiled(scaled_in_simulator, target, x, stride)
    assert launched == ["scale_kernel"]
    written = torch.arange(99) < 99 // stride * stride
    written &= torch.arange(99) % stride == 0
    assert torch.equal(out[written], (x.float() * 2.5).to(dtype)[written])
    assert out[~written].isnan().all()


@pytest.mark.ptx
def test_the_child_reports_what_goes_wrong(compiled):
    with pytest.raises(ZeroDivisionError):
        compiled(divmod, 1, 0)


@pytest.mark.skipif(not runtime.INTERPRET, reason="kernels are compiled here")
def test_the_interpreter_takes_cpu_tensors():
    assert runtime.unusable("cpu") is None
    assert runtime.target(torch.device("cpu")) == 90


def started_without_a_gpu() -> tuple[list, list[int]]:
    """The launches of one Launch under a stub of Triton's driver; how often Triton looked at it."""
    started, looked = [], []
    find = scale_kernel.run
    scale_kernel.run = lambda *args, **options: (
        looked.append(len(started)) or find(*args, **options)
    )
    memory = torch.zeros(1000)
    inputs = (memory, memory[4:], memory[1:], memory[1:], memory.half(), memory, memory.half())
    launch = runtime.Launch(scale_kernel, (2,), 99, 3, 2.5, BLOCK=64, num_warps=1, num_stages=1)
    try:
        with stub_driver(lambda *launched: started.append(launched)):
            for x in inputs:
                launch(x=x, out=memory)
    finally:
        scale_kernel.run = find
    offsets = [
        (name, grid, (x.data_ptr() - out.data_ptr(), x.dtype), *rest)
        for name, grid, (x, out, *rest) in started
    ]
    return offsets, looked


@pytest.mark.aot
def test_triton_looks_once_for_the_variant_of_a_prepared_launch(compiled):
    """Tensors begin at multiples of 16 bytes or not, and differ in dtype: each has its own code."""
    started, looked = compiled(started_without_a_gpu)
    assert looked == [0, 2, 4]
    inputs = [(launch[2][0], launch[2][1]) for launch in started]
    full = torch.float32
    assert inputs[:4] == [(0, full), (16, full), (4, full), (4, full)]
    assert [dtype for _, dtype in inputs[4:]] == [torch.float16, full, torch.float16]
    for name, grid, _, *rest in started:
        assert (name, grid, rest) == ("scale_kernel", (2, 1, 1), [99, 3, 2.5, 64])


def started_twice_without_a_gpu() -> dict[str, list]:
    """{kernel: what its launcher was given in two calls of everything there is}."""
    from dbp_kernels.backends.triton import gram_direct, gram_shift, gram_shift_tma, stats, update
    from dbp_kernels.rules import UpdateRule

    started: dict[str, list] = {}

    def shown(argument):
        if isinstance(argument, torch.Tensor):
            return tuple(argument.shape), argument.stride(), str(argument.dtype)
        if hasattr(argument, "block_shape"):  # a descriptor
            return argument.shape, argument.strides, argument.block_shape
        return argument

    def note(name, grid, arguments):
        started.setdefault(name, []).append((grid, [shown(a) for a in arguments]))

    c = case(2, 3, (6, 5), 3, padding=1)
    x, R = c.input(torch.bfloat16), c.R(torch.float32)
    rule = UpdateRule.make("standard", 0.5, 27)
    with stub_driver(note):
        for _ in range(2):
            gram_shift.patch_gram_shift(x, c.geometry)
            gram_direct.patch_gram_direct(x, c.geometry)
            gram_shift_tma.patch_gram_shift_tma(x, c.geometry)
            stats.decor_stats(x, R, c.geometry)
            update.symmetric_update(R, R, 1.0, rule)
    return started


@pytest.mark.aot
def test_a_kept_variant_is_given_what_triton_gives_it(compiled):
    started = compiled(started_twice_without_a_gpu)
    assert started.keys() == {
        "pack_kernel",
        "gram_shift_kernel",
        "gram_direct_kernel",
        "gram_shift_tma_kernel",
        "reduce_kernel",
        "decor_stats_kernel",
        "decor_stats_reduce_kernel",
        "symmetric_update_kernel",
    }
    for name, launches in started.items():
        half = len(launches) // 2
        assert launches[:half] == launches[half:], name
