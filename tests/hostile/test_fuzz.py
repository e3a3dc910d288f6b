"""Convolutions of all sorts against the float64 oracle: every algorithm and every function of patches."""

import math
import random

import pytest
import torch
from helpers import LAYOUTS, Case, algorithms, error, moment_error
from helpers import random as data

import dbp_kernels as dbp
from dbp_kernels import reference
from dbp_kernels.backends.eager import ops as eager

DTYPES = (torch.float64, torch.float64, torch.float32, torch.bfloat16, torch.float16)
ELEMENTS = 1 << 18  # of all patches, and of S: what the oracle does in milliseconds


def drawn(rng: random.Random) -> Case:
    """One whose oracle is quick. Kernels are short, long, as long as the image, or longer."""
    while True:
        dims = rng.choice((1, 1, 2, 2, 3))
        longest = {1: rng.choice((3, 12, 80, 200)), 2: rng.choice((3, 11)), 3: rng.choice((2, 5))}
        columns = []
        for _ in range(dims):
            kernel = rng.randint(1, longest[dims])
            stride = rng.choice((1, 1, 2, 3, kernel, kernel + 1, rng.randint(1, 40)))
            dilation = rng.choice((1, 1, 1, 2, 3, 8))
            span = dilation * (kernel - 1) + 1
            padding = rng.choice((0, 0, 1, span // 2, span - 1, rng.randint(0, 2 * span)))
            least = max(1, span - 2 * padding)
            size = least + rng.choice((0, 1, rng.randint(0, 12), rng.randint(0, 6 * kernel)))
            columns.append((size, kernel, stride, padding, dilation))
        groups = rng.choice((1, 1, 1, 2, 5))
        channels = groups * rng.choice((1, 1, 2, 3, 8))
        case = Case(rng.choice((0, 1, 1, 2, 5)), channels, *zip(*columns), groups)
        g = case.geometry
        if max(g.patch_numel, math.prod(case.shape), groups * g.dim**2) <= ELEMENTS:
            return case


@pytest.mark.kind("geometries")
def test_every_algorithm_and_function(campaign, poison):
    for rng in campaign.cases(2000):
        case, dtype, layout = drawn(rng), rng.choice(DTYPES), rng.choice(LAYOUTS)
        seed = rng.randrange(2**31)
        x = case.input(dtype, seed, layout if case.batch else "contiguous")
        about = (campaign.tried, case, dtype, layout, seed)
        before, exact = x.clone(), x.double()
        S, m = (f(exact, *case.arguments) for f in (reference.patch_gram, reference.patch_mean))

        def bound(plain, oracle, measure, exact=dtype == torch.float64):
            """Twice the error of plain torch in that precision, which computes in float32."""
            return 1e-12 if exact else 2 * measure(plain, oracle) + 1e-6

        computed = x if dtype == torch.float64 else x.float()
        most = bound(reference.patch_gram(computed, *case.arguments), S, moment_error)
        assert moment_error(dbp.patch_gram(x, *case.arguments), S) <= most, about
        if case.geometry.samples:
            # what the planner passes over may add up a thousand float32 one after the other
            most += 0 if dtype == torch.float64 else 2e-6
            for choice in algorithms(case.geometry):
                forced = eager.patch_gram(x, case.geometry, choice)
                assert moment_error(forced, S) <= most, (str(choice), about)

        R = data((case.groups, *2 * (case.geometry.dim,)), computed.dtype, seed)
        R = torch.eye(case.geometry.dim, dtype=R.dtype) + R / max(1, case.geometry.dim)
        most = bound(reference.patch_mean(computed, *case.arguments), m, error)
        assert error(dbp.patch_mean(x, *case.arguments), m) <= most, about
        C, V = reference.decor_stats(exact, R.double(), *case.arguments)
        stats = [dbp.decor_stats(x, R, *case.arguments)]
        stats += [reference.decor_stats(computed, R, *case.arguments)]
        M, *results = (c + torch.diag_embed(v.double() + 1) for c, v in [(C, V), *stats])
        ours, plain = results
        assert error(ours, M) <= bound(plain, M, error), about
        options = {
            "lr": rng.choice((0.0, 1e-3, 0.1)),
            "kappa": rng.choice((0.0, 0.3, 1.0)),
            "rule": rng.choice(("standard", "normalized")),
            "demean": rng.random() < 0.3,
        }
        update = dbp.decor_update(x, R, *case.arguments, **options)
        expected = reference.decor_update(exact, R.double(), *case.arguments, *options.values())
        plain = reference.decor_update(computed, R, *case.arguments, *options.values())
        assert error(update[0], expected[0]) <= bound(plain[0], expected[0], error), (
            options,
            about,
        )
        # the loss is what is left of M's squares without some: good to their size
        scale = ((M.square().sum((1, 2)) + 1).max() / max(1, case.geometry.dim)).item()
        most = 1e-12 if dtype == torch.float64 else 1e-5
        assert abs(update[1].item() - expected[1].item()) <= most * scale, (options, about)
        assert torch.equal(x, before), about
