"""The torch ops of the compiled library take exactly what Python and the emulation call them with."""

import json
import re
import subprocess
import sys

import pytest
import torch
from cuda_library import library
from emulation import CSRC, call
from helpers import LAYOUTS, random, strided
from stand_in import emulated

from dbp_kernels.backends.cuda import pack as cuda_pack
from dbp_kernels.backends.rows import in_rows


def in_a_process(code: str) -> str:
    """Output of code run with the compiled library loaded (it stays loaded for good)."""
    lines = f"import json, torch\ntorch.ops.load_library({str(library())!r})\n"
    done = subprocess.run(
        [sys.executable, "-c", lines + code], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def schemas() -> dict[str, list[str]]:
    """Kernel -> argument names, of the compiled library."""
    code = """
names = {s.name.split("::")[1]: [a.name for a in s.arguments]
         for s in torch._C._jit_get_all_schemas() if s.name.startswith("dbp_cuda::")}
print(json.dumps(names))
"""
    found = json.loads(in_a_process(code))
    assert {"build", "device_problem"} <= found.keys()
    return {name: names for name, names in found.items() if name not in ("build", "device_problem")}


@pytest.mark.aot
def test_every_kernel_is_bound_under_the_name_and_arguments_of_its_emulation(schemas):
    sources = "".join(f.read_text() for f in (CSRC / "emulation").glob("*.cpp"))
    assert schemas.keys() == set(re.findall(r'Register \w+\("(\w+)"', sources))
    for kernel, names in schemas.items():
        # the emulation names the first argument it misses
        given = {}
        while True:
            with pytest.raises((ValueError, RuntimeError)) as caught:
                call(kernel, **given, no_such_argument=0)
            missing = re.fullmatch(r"(\w+): missing", str(caught.value))
            if missing is None:
                break
            assert missing[1] in names, f"{kernel} takes {missing[1]}"
            given[missing[1]] = 0
        if "no such argument" in str(caught.value):
            assert set(given) == set(names)


@pytest.mark.aot
def test_tensors_elsewhere_and_of_another_dtype_are_refused_by_name():
    code = """
def refusal(kernel, **arguments):
    try:
        getattr(torch.ops.dbp_cuda, kernel)(**arguments)
    except RuntimeError as error:
        return str(error).splitlines()[0]

x = torch.zeros(2, 4, 8, 8)
pack = dict(x=x, out=torch.zeros(2, 8, 8, 4), mean=None, size=[2, 1, 8, 8], x_stride=[256, 0, 8, 1],
            out_stride=[256, 0, 32, 4], x_channel_stride=64, channels=4, row=4, x_dtype=0, out_dtype=0)
print(json.dumps([
    refusal("pack", **pack),
    refusal("pack", **{**pack, "x": x.bfloat16()}),
    refusal("pack", **{**pack, "x_dtype": 7}),
    refusal("pack", **{**pack, "size": [2, 8, 8]}),
    refusal("pack", **{**pack, "channels": 2**31}),
    refusal("pack", **{**pack, "mean": torch.zeros(3)}),
]))
"""
    elsewhere, dtype, number, size, wide, mean = json.loads(in_a_process(code))
    assert elsewhere == "dbp: pack: x is not a CUDA tensor"
    assert dtype == "dbp: pack: x is bfloat16[2, 4, 8, 8], which does not go with dtype number 0"
    assert "dtype number 7" in number
    assert size == "dbp: pack: size has 3 entries, expected 4"
    assert wide == "dbp: pack: channels is 2147483648, expected a 32-bit integer"
    assert "mean is float32[3], expected a contiguous float32 tensor of at least 4" in mean


@pytest.mark.emulation
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pack(layout, dtype):
    x = strided(random((2, 5, 4, 6)), layout).to(dtype)
    mean = torch.linspace(-1, 1, 5)
    with emulated() as launched:
        copy = cuda_pack.pack(x)
        centred = cuda_pack.pack(x, torch.float32, mean)
    assert launched == ["pack", "pack"]
    row = copy.shape[1]
    assert row * dtype.itemsize % 16 == 0
    assert torch.equal(copy[:, :5], x)
    assert torch.equal(copy[:, 5:], torch.zeros_like(copy[:, 5:]))
    assert torch.equal(centred[:, :5], x.float() - mean.view(-1, 1, 1))
    assert in_rows(copy)
