"""Sizes near 2**31 and 2**62, which are refused at once or answered rightly, and long kernels."""

import itertools
import math
import random
import resource
import time

import pytest
import torch

import dbp_kernels as dbp
from dbp_kernels.planning.geometry import ConvGeometry, make_geometry
from dbp_kernels.planning.planner import gram_choices

AT_ONCE = 1.0  # seconds of the calling thread
ABSURD = (
    2**31 - 1,
    2**31,
    2**31 + 1,
    2**32,
    2**40,
    2**61,
    2**62 - 1,
    2**62,
    2**63 - 1,
    2**63,
    2**64,
)


def second_moment(x: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
    """S by the definition, from the positions that see a pixel: others add nothing to the sum."""
    seen = []
    for axis in geometry.axes:
        by_position: dict[int, list[tuple[int, int]]] = {}
        for k, pixel in itertools.product(range(axis.kernel), range(axis.size)):
            place, rest = divmod(pixel + axis.padding - axis.dilation * k, axis.stride)
            if rest == 0 and 0 <= place < axis.output:
                by_position.setdefault(place, []).append((k, pixel))
        seen.append(list(by_position.values()))
    total = x.new_zeros(geometry.groups, geometry.dim, geometry.dim)
    grouped = x.view(x.shape[0], geometry.groups, -1, *x.shape[2:])
    for position in itertools.product(*seen):
        z = x.new_zeros(*grouped.shape[:3], *geometry.kernel_size)
        for taps in itertools.product(*position):
            ks, pixels = zip(*taps)
            z[(..., *ks)] = grouped[(..., *pixels)]
        z = z.flatten(2).transpose(0, 1)
        total += z.mT @ z
    return total / geometry.samples


def drawn(rng: random.Random) -> tuple[torch.Tensor, tuple[list[int], ...], int]:
    """A small input with the arguments of an op, of which one to three are absurd."""
    dims = rng.choice((1, 1, 2, 3))
    size = [rng.randint(1, 4) for _ in range(dims)]
    channels = rng.choice((1, 2, 4))
    x = torch.randn(2, channels, *size, dtype=torch.float64)
    small = ((1, 3), (1, 3), (0, 2), (1, 2))
    columns = [[rng.randint(*limits) for _ in range(dims)] for limits in small]
    for _ in range(rng.randint(1, 3)):
        rng.choice(columns)[rng.randrange(dims)] = rng.choice(ABSURD)
    if rng.random() < 0.5:  # taps far apart that the padding makes room for
        axis = rng.randrange(dims)
        columns[2][axis] = (columns[0][axis] - 1) * columns[3][axis]
    groups = rng.choice((1, 1, 1, channels, rng.choice(ABSURD)))
    return x, tuple(columns), groups


@pytest.fixture
def little_memory():
    """So that memory for gigabytes of padding is refused whatever the machine has."""
    with open("/proc/self/statm") as sizes:
        used = int(sizes.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def attempt(call, *args, **kwargs):
    """The call's result, or None where it is refused; both at once."""
    start = time.thread_time()
    try:
        return call(*args, **kwargs)
    except RuntimeError:
        return None
    finally:
        assert time.thread_time() - start < AT_ONCE, (call, args, kwargs)


@pytest.mark.kind("absurd sizes")
def test_absurd_sizes_are_refused_or_right_at_once(campaign, little_memory):
    dbp.patch_gram(torch.randn(1, 1, 5), 3)  # all modules are there
    answered = 0
    for rng in campaign.cases(5000):
        torch.manual_seed(rng.randrange(2**31))
        x, columns, groups = drawn(rng)
        S = attempt(dbp.patch_gram, x, *columns, groups)
        if S is None:
            continue
        answered += 1
        geometry = make_geometry(x.shape, *columns, groups)
        torch.testing.assert_close(S, second_moment(x, geometry))
        R = torch.eye(geometry.dim, dtype=x.dtype).expand(groups, -1, -1)
        stats = attempt(dbp.decor_stats, x, R, *columns, groups)
        if stats is not None:
            torch.testing.assert_close(stats[0] + torch.diag_embed(stats[1] + 1), S)
        m = attempt(dbp.patch_mean, x, *columns, groups)
        demean = rng.random() < 0.5 and m is not None
        update = attempt(dbp.decor_update, x, R, *columns, groups, lr=0.1, kappa=0.5, demean=demean)
        if update is not None:
            M = S - m.unsqueeze(-1) * m.unsqueeze(-2) if demean else S
            # with R = I and kappa = 0.5 both parts of M - I weigh the same
            torch.testing.assert_close(update[0], R - 0.05 * (M - R))
    assert answered > 100


@pytest.mark.kind("long kernels")
def test_long_kernels_are_planned_at_once(campaign):
    for rng in campaign.cases(300):
        kernel = [rng.choice((31, 80, 400, 512, 1024, 4000))]
        if rng.random() < 0.3:
            kernel = [rng.randint(5, 31), rng.randint(5, 31)]
        dims = len(kernel)
        stride = [rng.choice((1, 1, 2, 4, k // 2, k, 3 * k)) for k in kernel]
        dilation = [rng.choice((1, 1, 2, 3, 7)) for _ in kernel]
        padding = [rng.choice((0, k // 2, k)) for k in kernel]
        size = [rng.randint(k * d, 40 * k * d) for k, d in zip(kernel, dilation)]
        channels = rng.choice((1, 3, 64))
        shape = (rng.randint(1, 32), channels, *size)
        geometry = make_geometry(shape, kernel, stride, padding, dilation, 1)
        start = time.thread_time()
        choices = gram_choices(geometry, *rng.choice((("cpu",), ("cuda", 4, "triton", "bf16"))))
        spent = time.thread_time() - start
        assert spent < 0.2 * max(1, max(kernel) / 512) * dims, (geometry, spent)
        assert "unfold" in {choice.name for choice in choices}
        assert all(math.isfinite(c.seconds) for c in choices)
