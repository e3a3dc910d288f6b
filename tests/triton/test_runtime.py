"""How kernels start: interpreted in this process, compiled and simulated in the child's."""

import pytest
import simulator
import torch
import triton
import triton.language as tl
from helpers import DEVICE

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
