"""What launchers refuse: arguments that are not those of the plan, and GPUs without the kernel's code.

The calls are those that the Python side makes, recorded; each is then made with one thing wrong, of the
compiled library (on CPU tensors: all checks come before the device) and under emulation.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cuda_library import library as compiled
from emulation import LaunchError, call
from helpers import LAYOUTS, case, rows

from bench.counters.cuda_ptx import array
from dbp_kernels.backends.cuda import gram, library, pack, stats, update
from dbp_kernels.rules import UpdateRule

Arguments = dict[str, Any]
Wrong = tuple[str, Arguments]  # the argument that the message names, the arguments

GRAM = ("gram_shift", "gram_shift_sm90", "gram_matrix_sm90", "gram_box", "gram_direct")
KERNELS = (*GRAM, "reduce", "pack", "stats", "update")
NOT_THERE = r"dbp: \w+: \w+ is not a CUDA tensor"  # the last check of all


def recorded() -> dict[str, Arguments]:
    """One call of every kernel, with the arguments that Python gives it."""
    calls: dict[str, Arguments] = {}
    library.simulate(lambda kernel, arguments: calls.setdefault(kernel, arguments))
    try:
        c = case(2, 40, (9, 12), 3, padding=1)
        x = c.input(torch.bfloat16, layout="channels_last")
        gram.patch_gram_shift(x, c.geometry)
        gram.patch_gram_shift(x, c.geometry, sm90=True)
        few = case(2, 3, (9, 12), 3, padding=1, stride=2)
        gram.patch_gram_direct(few.input(torch.float32), few.geometry)
        matrix = rows((70, 24))
        gram.patch_gram_matrix_sm90(matrix.input(torch.float16), matrix.geometry)
        pack.pack(few.input(torch.float32), mean=torch.zeros(3))
        stats.decor_stats(few.input(torch.float32), few.R(torch.float32), few.geometry)
        update.weigh(torch.zeros(2, 5, 5), UpdateRule.make("standard", 0.5, 5))
    finally:
        library.simulate(None)
    assert calls.keys() == set(KERNELS)
    return calls


CALLS = recorded()


def wrong_sizes(kernel: str) -> Iterator[Wrong]:
    """The arrays of a plan with an element too few or too many, and counts of another plan."""
    good = CALLS[kernel]
    for name, t in good.items():
        if not torch.is_tensor(t) or name == "x":
            continue
        flat = t.flatten()
        yield name, {**good, name: flat[:-1].clone()}
        if t.dtype == torch.int32:
            yield name, {**good, name: torch.cat([flat, flat[:1]])}
    counts = {
        "item_count": "items",
        "slots": "workspace",
        "sets": "shifts",
        "box_count": "boxes",
        "entries": "slots",
        "upper": "workspace",
        "straight": "symmetric_base",
        "symmetric": "workspace",
        "tap_count": "out",
        "splits": "workspace",
    }
    for count, named in counts.items():
        if isinstance(good.get(count), int):
            yield named, {**good, count: good[count] + 1}
        if isinstance(good.get(count), int) and count in ("item_count", "slots", "sets", "entries"):
            yield named, {**good, count: 2**31 - 1}


def wrong_values(kernel: str) -> Iterator[Wrong]:
    """Numbers that the kernel cannot work with, whatever the arrays are."""
    good = CALLS[kernel]
    values: dict[str, list[Any]] = {
        "item_count": [-1],
        "block": [0, -16, 24, 256],
        "halo": [-1, 1 << 20],
        "pixels": [-1, 2**31 - 1, good.get("pixels", 0) + 1],
        "rows": [-1, 2**31],
        "row_stride": [0, good.get("row_stride", 0) + 1],
        "size": [[0, 1, 1], [1, -1, 1]],
        "step": [[1, 0, 1]],
        "kernel": [[1, 0, 3]],
        "conv_stride": [[1, 0, 1]],
        "columns": [0, 28],
        "group_channels": [0, 200],
        "tap_count": [0],
        "straight": [-1],
        "upper": [-1],
        "splits": [0],
        "groups": [-1],
        "dim": [-1],
        "row": [1],
    }
    if kernel in GRAM and kernel != "gram_direct":
        values["channels"] = [0, good["channels"] + 1, 1 << 20 | 4]
    if kernel == "reduce":
        values["block"] = [0]
    if kernel == "pack":
        values["size"] = [[2, 1, -9, 12]]
    if kernel == "stats":
        values["size"] = []
    if kernel.endswith("_sm90"):
        values["block"] = [32]
        yield "dtype", {**good, "x": good["x"].float(), "dtype": 0}
    for name, several in values.items():
        for value in several if name in good else ():
            yield name, {**good, name: value}


# --------------------------------------------------------------------------- the compiled library

_ANSWERS = """
import sys, torch
torch.ops.load_library(sys.argv[1])
answers = []
for kernel, arguments in torch.load(sys.argv[2]):
    try:
        getattr(torch.ops.dbp_cuda, kernel)(**arguments)
        answers.append(None)
    except RuntimeError as error:
        answers.append(str(error).splitlines()[0])
torch.save(answers, sys.argv[2])
"""


def answers(calls: list[tuple[str, Arguments]], folder) -> list[str]:
    """What the compiled library says to each of these calls."""
    file = folder / "calls.pt"
    torch.save(calls, file)
    command = [sys.executable, "-c", _ANSWERS, compiled(), file]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return torch.load(file)


@pytest.fixture(scope="module")
def refusals(tmp_path_factory) -> list[tuple[str, str, str]]:
    """(kernel, argument that is wrong, what the compiled library says)"""
    wrong = [(k, *w) for k in KERNELS for w in (*wrong_sizes(k), *wrong_values(k))]
    said = answers([(k, arguments) for k, _, arguments in wrong], tmp_path_factory.mktemp("wrong"))
    return [(kernel, name, answer) for (kernel, name, _), answer in zip(wrong, said)]


@pytest.mark.aot
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_compiled_library_names_what_is_wrong(kernel, refusals):
    of_kernel = [(name, answer) for k, name, answer in refusals if k == kernel]
    assert of_kernel
    for name, answer in of_kernel:
        assert re.match(rf"dbp: {kernel}: {name} is .*, expected ", answer), (name, answer)


@pytest.mark.aot
def test_no_call_that_python_makes_is_refused(tmp_path):
    """Over geometries, layouts and dtypes, every launch gets as far as the missing device."""
    calls: list[tuple[str, Arguments]] = []
    library.simulate(lambda kernel, arguments: calls.append((kernel, arguments)))
    try:
        for c, layout, dtype in itertools.product(
            [
                case(2, 5, (6, 7), 3, padding=1),
                case(3, 24, (5, 9), (2, 3), stride=(2, 1), padding=(0, 1), groups=2),
                case(1, 70, (8, 8), 1),
                case(2, 3, (30,), 5, padding=2, dilation=3),
                case(1, 8, (3, 4, 5), 2, padding=1),
                case(1, 4, (1, 1), 3, padding=1),
                rows((2, 9, 40)),
                rows((1, 300), 2),
            ],
            LAYOUTS,
            [torch.float32, torch.float16, torch.bfloat16],
        ):
            x, geometry = c.input(dtype, layout=layout), c.geometry
            gram.patch_gram_box(x, geometry)
            if geometry.axes:
                gram.patch_gram_direct(x, geometry)
            if not geometry.pointwise:
                gram.patch_gram_shift(x, geometry)
            if gram.sm90_problem(x, geometry) is None and geometry.pointwise:
                gram.patch_gram_matrix_sm90(x, geometry)
            elif gram.sm90_problem(x, geometry) is None:
                gram.patch_gram_shift(x, geometry, sm90=True)
            if stats.supported(x, geometry):
                stats.decor_stats(x, c.R(torch.float32), geometry)
    finally:
        library.simulate(None)
    assert {kernel for kernel, _ in calls} == set(KERNELS) - {"update"}
    for (kernel, arguments), answer in zip(calls, answers(calls, tmp_path)):
        assert re.fullmatch(NOT_THERE, answer), (kernel, answer, arguments)


@pytest.mark.aot
def test_other_refusals(tmp_path):
    shift, reduce, stats_ = CALLS["gram_shift"], CALLS["reduce"], CALLS["stats"]
    wanted = {
        r"masks is int64\[.*expected a contiguous int32 tensor": ("gram_shift", shift | {"masks": shift["masks"].long()}),
        r"workspace is float64\[.*expected a contiguous float32": ("gram_shift", shift | {"workspace": shift["workspace"].double()}),
        r"item_count is 2147483648, expected a 32-bit integer": ("gram_shift", shift | {"item_count": 2**31}),
        r"size has 2 entries, expected 3": ("gram_shift", shift | {"size": [9, 12]}),
        r"x is bfloat16\[1, 40, 9, 12\] over \d+ elements of memory, expected at least \d+": ("gram_shift", shift | {"x": shift["x"][:1]}),
        r"x does not begin at a multiple of 16 bytes": ("gram_shift", shift | {"x": torch.zeros(99999, dtype=torch.bfloat16)[1:]}),
        r"x is float32\[1, 3, 9, 12\] over 324 elements of memory, expected at least 648": ("stats", stats_ | {"x": stats_["x"][:1]}),
        r"images is .*, expected at most 2147483519 samples": ("stats", stats_ | {"images": 2**40}),
        r"group_channels is 30, expected patches of 1 to 128 elements": ("stats", stats_ | {"group_channels": 30}),
        r"upper is .*, expected 0 or more, and a grid": ("reduce", reduce | {"upper": 2**31 - 1}),
    }  # fmt: skip
    found = answers(list(wanted.values()), tmp_path)
    for (pattern, (kernel, _)), answer in zip(wanted.items(), found):
        assert re.match(rf"dbp: {kernel}: {pattern}", answer), answer


@pytest.mark.aot
def test_a_larger_workspace_will_do(tmp_path):
    calls = [(kernel, dict(CALLS[kernel])) for kernel in GRAM]
    for _, arguments in calls:
        arguments["workspace"] = torch.empty(arguments["workspace"].numel() + 64)
    for answer in answers(calls, tmp_path):
        assert re.fullmatch(NOT_THERE, answer)


# --------------------------------------------------------------------------- emulated


def arrays(arguments: Arguments) -> Arguments:
    return {k: array(v) if torch.is_tensor(v) else v for k, v in arguments.items()}


@pytest.mark.emulation
@pytest.mark.parametrize("kernel", [*GRAM, "reduce"])
def test_wrong_sizes_under_emulation(kernel):
    for name, changed in wrong_sizes(kernel):
        with pytest.raises((ValueError, LaunchError), match=rf"{name}: expected|CUDA error 1$"):
            call(kernel, **arrays(changed))


@pytest.mark.emulation
@pytest.mark.parametrize("kernel", KERNELS)
def test_wrong_values_under_emulation(kernel):
    for name, changed in wrong_values(kernel):
        with pytest.raises(LaunchError) as caught:
            call(kernel, **arrays(changed))
        assert caught.value.code == 1, name  # cudaErrorInvalidValue


@pytest.mark.emulation
@pytest.mark.parametrize("kernel", ["gram_shift_sm90", "gram_matrix_sm90"])
@pytest.mark.parametrize("capability", [80, 89, 100, 120])
def test_kernels_for_sm90_do_not_start_elsewhere(kernel, capability):
    with pytest.raises(LaunchError) as caught:
        call(kernel, capability=capability, **arrays(CALLS[kernel]))
    assert caught.value.code == 209  # cudaErrorNoKernelImageForDevice
    assert call(kernel, capability=90, **arrays(CALLS[kernel]))["launches"] == 1
