"""Operands more than 2^32 elements apart: every offset is computed in 64 bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emulation import call
from helpers import error, random, rows
from test_cuda_reduce import arguments_of, partials

from dbp_kernels import reference
from dbp_kernels.planning import boxes
from dbp_kernels.planning import work as W

pytestmark = pytest.mark.emulation


@pytest.mark.parametrize("last_first", [0, 1])
def test_pack(last_first):
    x = random((2, 70, 12), torch.float32).numpy()
    out = np.full_like(x, np.nan), np.full_like(x, np.nan)
    images = {"x0": x[0].copy(), "x1": x[1].copy(), "out0": out[0][0], "out1": out[1][1]}
    call("far_pack", **images, pixels=70, channels=12, last_first=last_first)
    np.testing.assert_array_equal(out[0][0], x[0])
    np.testing.assert_array_equal(out[1][1], x[1])


def test_stats():
    case = rows((2, 20))
    x, R = case.input(torch.float32), case.R(torch.float32)
    c, v = np.full((1, 20, 20), np.nan, np.float32), np.full((1, 20), np.nan, np.float32)
    call(
        "far_stats",
        x0=x[0].numpy().copy(),
        x1=x[1].numpy().copy(),
        r=R.numpy(),
        workspace=np.full((1, 20, 20), np.nan, np.float32),
        c=c,
        v=v,
        channels=20,
    )
    C, V = reference.decor_stats(x.double(), R.double(), *case.arguments)
    assert error(torch.from_numpy(c), C) < 1e-6
    assert error(torch.from_numpy(v), V) < 1e-6


def test_reduce():
    X = torch.randn(37, 20, dtype=torch.float64)
    work = W.make_work(boxes.direct_program(37), 1, 20, 20, 16, 4, 20)
    assert work.straight == 0  # all slots are of symmetric boxes
    workspace = partials(X.T.reshape(1, 20, 37), work, (1, 1, 1))
    arguments = arguments_of(work, workspace, 37)
    del arguments["entries"]  # which the launcher does not see
    call("far_reduce", **arguments)
    assert error(torch.from_numpy(arguments["out"])[0], X.T @ X / 37) < 1e-6
